"""What launch/gpu_check runs: checks and measurements of the kernels on one GPU."""
