"""The oracle: what vLLM does with a published model, asked from vLLM itself without weights, without a GPU.

    PYTHONPATH=tests python -m contract.oracle [NAME ...]     compute headers and records (--missing: only absent ones)
    PYTHONPATH=tests python -m contract.oracle.quantized      write the quantized variants of the stored models
    PYTHONPATH=tests python -m contract.oracle.report         compare the planner with the records

Parts: `cuda_platform`, `process_group` and `stand_ins` let vLLM's CPU build decide as on a GPU; `build` makes
configuration and model on the meta device, `truth` reads the record; `headers`, `multi_token` and `packing` derive the
checkpoint's headers from transformers; `store` holds both in tests/captures/oracle; `compare` and `planner_adapter`
ask the planner.

Limits: the GPU is of compute capability 8.9 (9.0 where a record says so) and FlashInfer is not installed, so attention
backends are those of such a GPU without it; kernels that repack weights after loading do not run, so their padding is
not in the records.
"""
