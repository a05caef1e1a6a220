"""CUDA C++ kernels, for what Triton cannot bring to the limit of the hardware: `loader` compiles and launches them."""
