"""C++ twins of the ops for the CPU, compiled on first use."""
