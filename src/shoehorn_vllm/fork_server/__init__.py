"""Fork server: a process that has imported vLLM, from which the engine's processes are forked.

vLLM starts its API server, engine core and workers as fresh interpreters, and each of them imports vLLM again. Here one
process imports it, and all of them are forked from that process, as by `multiprocessing`'s own fork server, which
cannot be used: it has no environment for each child, no process groups, and starts no program but a `Process`.

Rules:
- the server never runs the engine's code: it has one thread and no CUDA context, or it reports itself unusable;
- a child has the environment that its order names; a variable that was read during the import cannot change;
- a child is in the process group of its API server; once the exit of an API server is reported, its group has no member
  and gets no new one;
- the server exits with the engine program, and kills what it forked.
"""
