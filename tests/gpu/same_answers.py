"""Compares answers with and without offload: the same weights, prompts and machine, greedy, in three dtypes.

Every pair is one model resident and with all layers and the embedding in host memory: by prefetch, and in INT4 also
multiplied on the CPU (alone, and with a share streamed to the GPU). The weights are trained ones: the demo model, with
an output head of its own so that embedding and head can be quantized.
usage: same_answers.py OUT.json MODEL_BF16 MODEL_INT4 [KINDS]      with vLLM, src/ and the plugin reachable
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

OFFLOAD = {"offload_backend": "prefetch", "offload_group_size": 1, "offload_num_in_group": 1,
           "offload_prefetch_step": 2, "additional_config": {"shoehorn": {"embedding": "host"}}}
HYBRID = {name: {"additional_config": {"shoehorn": {"embedding": "host", "hybrid": {
    "group": 1, "last": 1, "buffers": 2, "levels": levels}}}} for name, levels in (
        ("int4-cpu", [[8, 0.0]]), ("int4-cpu-and-gpu", [[8, 0.5]]), ("int4-streamed", []))}
PROMPTS = ["What is the VRAM of plan 3?", "How do I set MAX_MODEL_LEN?", "你叫啥", "Why does it stop?"]


def answers(model: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens and their log probabilities, in this process."""
    from vllm import LLM, SamplingParams  # heavy, and only in the children

    engine = LLM(model=model, enforce_eager=True, max_model_len=256, max_num_seqs=8, gpu_memory_utilization=0.05,
                 kv_cache_memory_bytes=1 << 28, dtype="bfloat16", **arguments)
    done = engine.generate([f"<|user|>{prompt}<|assistant|>" for prompt in PROMPTS],
                           SamplingParams(temperature=0, max_tokens=32, logprobs=1), use_tqdm=False)
    return [{"tokens": list(one.outputs[0].token_ids),
             "logprobs": [next(iter(step.values())).logprob for step in one.outputs[0].logprobs or []]} for one in done]


def main() -> None:
    """Start all at once, and compare each pair."""
    if sys.argv[1] == "one":
        Path(sys.argv[4]).write_text(json.dumps(answers(sys.argv[2], json.loads(sys.argv[3]))))
        sys.stdout.flush()
        os._exit(0)
    out, bf16, int4 = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    kinds: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "bf16": (bf16, {}, OFFLOAD), "int4": (int4, {}, OFFLOAD),
        "nf4": (bf16, {"quantization": "bitsandbytes"}, OFFLOAD),
        **{name: (int4, {}, offload) for name, offload in HYBRID.items()}}
    only = sys.argv[4].split(",") if len(sys.argv) == 5 else list(kinds)
    kinds = {kind: kinds[kind] for kind in only}
    children = {}
    for kind, (model, arguments, offloaded) in kinds.items():
        for place, offload in (("resident", {}), ("offloaded", offloaded)):
            file = out.with_suffix(f".{kind}-{place}.json")
            log = out.with_suffix(f".{kind}-{place}.log").open("w")
            command = [sys.executable, __file__, "one", model, json.dumps({**arguments, **offload}), str(file)]
            children[kind, place] = (subprocess.Popen(command, stdout=log, stderr=log, env={
                **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}), file)
    for child, _ in children.values():
        child.wait()
    results = {}
    for kind in kinds:
        pair = [json.loads(children[kind, place][1].read_text()) if children[kind, place][1].exists() else None
                for place in ("resident", "offloaded")]
        if None in pair:
            results[kind] = {"failed": [children[kind, place][0].returncode for place in ("resident", "offloaded")]}
            continue
        same = [one["tokens"] == other["tokens"] for one, other in zip(*pair, strict=True)]
        differences = [abs(a - b) for one, other in zip(*pair, strict=True)
                       for a, b in zip(one["logprobs"], other["logprobs"], strict=False)]
        results[kind] = {"prompts": len(same), "same_tokens": sum(same),
                       "largest_difference_of_logprobs": max(differences)}
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
