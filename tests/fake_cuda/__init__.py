"""A GPU for the host side alone: what the engine asks of one, kept to its rules, without one.

Kernels are computed by Triton's interpreter; ``tests/ptx_emulator`` runs them as compiled. Here
it is everything around them: which device a tensor is on, what is asynchronous, when the host
waits, what a captured graph reads and writes, what would have to be compiled while serving.
"""
