"""CPU kernels in C++ (AVX-512 or AVX2), compiled on the machine that runs them."""
