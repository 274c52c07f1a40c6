"""What runs inside Triton's Python backend: without twotower, but for the GPU's kernels."""
