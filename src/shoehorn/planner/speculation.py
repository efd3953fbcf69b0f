"""Tokens that are guessed, and checked together in one pass: what the engine is told of it.

Rules: by n-gram look-up where a pass waits for the link, unless SPECULATIVE says otherwise; by a draft model where
SPECULATIVE names one (`drafts` finds it, and says whether it is worth its memory).
"""

from __future__ import annotations

from shoehorn.model.shape import ModelShape
from shoehorn.planner import search
from shoehorn.planner.inputs import Draft, PlanSettings
from shoehorn.planner.option_set import Options
from shoehorn.planner.serving_config import Choices
from shoehorn.planner.throughput import ACCEPTED

OPTION = "speculative-config"
NGRAM = {"method": "ngram", "num_speculative_tokens": search.GUESSED, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
DRAFT = {"method": "draft_model", "num_speculative_tokens": 7}


def apply(options: Options, settings: PlanSettings) -> None:
    """What SPECULATIVE says without a draft model."""
    if settings.speculative == "ngram":
        options.fix(OPTION, dict(NGRAM), "SPECULATIVE=ngram")
    elif settings.speculative == "off":
        options.fixed.add(OPTION)


def apply_draft(options: Options, draft: Draft) -> None:
    """The draft that SPECULATIVE names."""
    options.fix(OPTION, {**DRAFT, "model": str(draft.directory)},
                f"SPECULATIVE={draft.ref.id}; expected speeds are for {ACCEPTED:g} tokens a pass")


def load_as_nf4(options: Options, draft: Draft) -> None:
    """The draft in NF4, as the model is: the engine loads both in one way."""
    options.values[OPTION] = {**DRAFT, "model": str(draft.directory), "quantization": "bitsandbytes"}


def look_up(options: Options, choices: Choices) -> None:
    """N-gram look-up, as it was chosen."""
    options.set(OPTION, {**NGRAM, "num_speculative_tokens": choices.speculative_tokens}, "machine",
                "a pass waits for the link, and tokens guessed from the text so far are checked in the meantime; "
                "requests with min_p or logit_bias are refused then; SPECULATIVE=off does without")


def possible(options: Options, shape: ModelShape) -> bool:
    """Whether the engine can check guesses: it does for models that generate text, on one stage."""
    return shape.architecture.endswith(("ForCausalLM", "ForConditionalGeneration")) and \
        options.whole("pipeline-parallel-size", 1) == 1


def guessed(options: Options) -> int:
    """The tokens that are guessed at a time; 0 without speculation."""
    config = options.values.get(OPTION)
    found = config.get("num_speculative_tokens") if isinstance(config, dict) else 0
    return found if isinstance(found, int) else 0
