"""Execution of offloaded weights: a cache of experts on the GPU, and INT4 and MXFP4 products on the CPU."""
