"""Triton kernels for NVIDIA GPUs. Nothing else imports this package before a GPU tensor is seen."""
