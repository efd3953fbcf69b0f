"""The CPU kernel for 4-bit weights: C code behind torch tensors.

`products` multiplies, `team` owns the threads, `cpus` chooses their CPUs, `library` loads the C code, `build` compiles
it when the package is installed.

Use it from any thread of a process, with tensors in ordinary or pinned host memory:

    team.start(reserved=2)                                     # once; cores to leave free
    weights = PackedWeights(codes, scales)                     # the checkpoint's tensors, read in place
    products.linear(weights, x, out=y)                         # y[M, N] = x[M, K] @ weights.T
    products.experts(ExpertWeights(up, down), x, router_weights, ids, out=y)

Rules:
- a call blocks until `out` is written and releases the interpreter's lock; it starts no operator of torch, so torch's
  thread pool stays idle;
- calls of several threads take turns;
- the tensors may not change or be freed during a call.
"""
