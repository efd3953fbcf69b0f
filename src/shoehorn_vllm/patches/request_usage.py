"""Patch: the tokens of each request are reported to its meter.

vLLM reports the tokens of one request only in its answer, if the answer reports usage and arrives: not in a stream
without `include_usage`, not for a request whose client left, and never per client. Its metrics add up all requests.

The output processor sees every request and every token. It runs in the API server, in the task of the request when the
request is added, so that the task's meter is known then. The prompt of a request with several choices counts once, as
in vLLM's own usage.

Source: vLLM 0.32.0, v1/engine/output_processor.py, OutputProcessor.add_request and _update_stats_from_output, which
process_outputs calls once for each output of a request that was not aborted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.engine.output_processor import OutputProcessor

from shoehorn_vllm.api.meter import CURRENT
from shoehorn_vllm.patches.patch import Patch


def apply() -> None:
    """Patch this process."""
    for patch in PATCHES:
        patch.apply()


def _add_request(original: Callable[..., None], processor: OutputProcessor, request: Any, *arguments: Any,
                 **named: Any) -> None:
    original(processor, request, *arguments, **named)
    state: Any = processor.request_states[request.request_id]
    meter = CURRENT.get()
    state.shoehorn_meter = meter
    if meter is not None and state.request_index == 0:
        meter.count_prompt(state.lora_name or "", state.prompt_len)


def _update_stats(original: Callable[..., None], processor: OutputProcessor, state: Any, output: Any,
                  *arguments: Any, **named: Any) -> None:
    original(processor, state, output, *arguments, **named)
    if state.shoehorn_meter is not None:
        state.shoehorn_meter.count_completion(len(output.new_token_ids))


PATCHES = (Patch(OutputProcessor, "add_request", _add_request),
           Patch(OutputProcessor, "_update_stats_from_output", _update_stats))
