"""Execution of offloaded weights: a cache of experts on the GPU, and kernels for the CPU."""
