"""GPU kernels in Triton. Imported only when a tensor lies on a GPU; see kernels/ops.py."""
