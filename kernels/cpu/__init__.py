"""C++ twins of the ops for the CPU, compiled for this machine on first use.

`library` finds the compiler, builds and loads; `ops` calls. One .cpp file an op family: x and outputs are float32, weights
bfloat16 or float32 as the checkpoint has them, sums float32. The bits of one row's result do not depend on the other rows
of a batch: neither greedy text nor a draw changes with what else is being served.
"""
