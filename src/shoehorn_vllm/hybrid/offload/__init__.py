"""Linear layers with weights in host memory: small batches on the CPU, large ones by streaming to the GPU."""
