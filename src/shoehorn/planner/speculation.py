"""Speculative decoding: n-gram lookup where a forward pass waits for PCIe, or the draft model that SPECULATIVE names.

`deployment` finds the draft model and decides whether it is worth its memory.
"""

from __future__ import annotations

from shoehorn.model.shape import ModelShape
from shoehorn.planner.inputs import Draft, PlanSettings
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.serving_config import BITSANDBYTES
from shoehorn.planner.throughput import ACCEPTED
from shoehorn.planner.vllm_args import NGRAM

OPTION = "speculative-config"
DRAFT = {"method": "draft_model", "num_speculative_tokens": 7}
"""A draft model, as vLLM's `speculative-config`."""


def apply_setting(options: OptionSet, settings: PlanSettings) -> OptionSet:
    """Apply SPECULATIVE as far as it names no draft model."""
    if settings.speculative == "ngram":
        return options.set_by_user(OPTION, dict(NGRAM), setting="SPECULATIVE=ngram")
    return options.fix(OPTION) if settings.speculative == "off" else options


def apply_draft(options: OptionSet, draft: Draft | None) -> OptionSet:
    """Use the draft model that SPECULATIVE names."""
    if draft is None:
        return options
    return options.set_by_user(OPTION, {**DRAFT, "model": str(draft.directory)}, "draft-model", model=draft.ref.id,
                               accepted=ACCEPTED)


def match_quantization(options: OptionSet, draft: Draft | None, nf4: bool) -> OptionSet:
    """Load the draft in NF4 where the model is: vLLM loads both in one way."""
    if draft is None or draft.shape.quantization or not nf4:
        return options
    return options.amend(OPTION, {**DRAFT, "model": str(draft.directory), "quantization": BITSANDBYTES})


def is_possible(options: OptionSet, shape: ModelShape) -> bool:
    """Return whether vLLM can verify draft tokens: for models that generate text, on one pipeline stage."""
    return shape.architecture.endswith(("ForCausalLM", "ForConditionalGeneration")) and \
        options.integer("pipeline-parallel-size", 1) == 1
