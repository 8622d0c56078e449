"""What NVIDIA's management library says of the GPU: signals and cross-checks, and never a reason to bill anybody."""
