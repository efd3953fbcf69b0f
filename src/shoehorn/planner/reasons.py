"""Reasons for chosen options, in words."""

from __future__ import annotations

from shoehorn.common.units import format_size
from shoehorn.model.shape import ModelShape
from shoehorn.planner import search
from shoehorn.planner.memory.offload import offloaded_bytes
from shoehorn.planner.serving_config import Choices


def why(option: str, shape: ModelShape, choices: Choices, found: search.Found | None) -> str:
    """The reason of one option that was left open."""
    if found is None:
        return "nothing fits; this is the smallest that was tried"
    many = "two requests" if found.requests == 2 else "one request"
    if option == "quantization":
        whole = format_size(shape.tensor_bytes.linears.bytes + shape.tensor_bytes.experts.bytes)
        place = "everything fits on the GPU" if found.mode == 2 else "less has to cross the link"
        return f"the layers take {whole} as they are; in NF4 {place}"
    if option == "offload-backend":
        return "layers are copied to the card ahead of their turn, so that the link never waits"
    if option == "offload-num-in-group":
        return "the last of each group"
    if option == "offload-prefetch-step":
        return "one layer is worked with while the next one arrives"
    if option in ("offload-group-size", "cpu-offload-gb"):
        return (f"{format_size(offloaded_bytes(shape, choices))} of weights in host memory, the least that leaves room "
                f"for {many} of {choices.max_model_len} tokens")
    if option == "enforce-eager":
        if choices.eager and not offloaded_bytes(shape, choices):
            return "compiling and CUDA graphs would take memory that is not there without offload"
        return "CUDA graphs would take memory, and most of a pass is waiting for the link" if choices.eager else \
            "CUDA graphs save time between the kernels, and there is room for them"
    if option == "max-model-len":
        return f"the longest, of the usual lengths, with room for {many} at a time" if found.mode < 3 else \
            "a useful length; a longer one would mean more offload" if found.mode == 3 else \
            f"the longest for which {many} still fit"
    if option == "max-num-seqs":
        return "as many at a time as suit the KV cache"
    return "goes with the number of sequences; more would take memory from the KV cache"
