"""What everybody may see of the plan: figures of its own, for the console page and `/status`.

Rules: nothing that a user typed freely (engine options, names of files) is in it, since no key is asked for; every size
has its unit in its name; a plan for the CPU has no `vram`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shoehorn.common.errors import DoesNotFitError
from shoehorn.planner.inputs import Draft
from shoehorn.planner.memory.breakdown import VramParts
from shoehorn.planner.option_set import Reason
from shoehorn.planner.serving_config import Choices


def of(plan: Plan) -> dict[str, Any]:
    """JSON-ready; all sizes in bytes, `expected_tokens_per_second` by batch size or None where nothing is known.

    `quantization` is `bitsandbytes`, `int4`, or empty: as the checkpoint is. `vram` has one entry a GPU, whose parts
    add up to its `total_bytes`.
    """
    choices = plan.choices
    return {"quantization": choices.quantization or "", "max_model_len": choices.max_model_len,
            "max_num_seqs": choices.max_num_seqs, "kv_cache_tokens": plan.kv_cache_tokens,
            "offloaded_bytes": plan.offloaded_bytes, "host_bytes": plan.host_bytes, "disk_bytes": plan.disk_bytes,
            "expected_tokens_per_second": dict(plan.expected_tokens_per_second),
            "vram": [parts.to_json() for parts in plan.vram]}


@dataclass(frozen=True)
class Plan:
    """What will be started.

    Attributes:
        engine_args: vLLM's options without dashes in front; model, name and addresses are added when rendering.
        vram: one entry a GPU; none on the CPU.
        host_bytes: host memory that all processes need; host_pinned_bytes: of it, what offload pins;
            offloaded_bytes: the weights that lie there.
        kv_cache_tokens: of all requests together.
        expected_tokens_per_second: `batch_1` and `batch_8`; None where nothing is known.
        disk_bytes: the model's files, and the draft's.
        choices: what the estimate was made of; fixed: the options that the user gave.
        draft: the model that guesses tokens, if one does.
    """

    engine_args: Mapping[str, object]
    engine_environment: Mapping[str, str]
    reasons: tuple[Reason, ...]
    profile: str
    vram: tuple[VramParts, ...]
    host_bytes: int
    host_pinned_bytes: int
    offloaded_bytes: int
    kv_cache_tokens: int
    expected_tokens_per_second: Mapping[str, float | None]
    disk_bytes: int
    choices: Choices = field(repr=False)
    fixed: frozenset[str] = field(repr=False)
    draft: Draft | None = field(repr=False, default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; `fits` is true."""
        return {"fits": True, "profile": self.profile, "engine_args": dict(self.engine_args),
                "engine_environment": dict(self.engine_environment),
                "reasons": [asdict(reason) for reason in self.reasons],
                "vram": [parts.to_json() for parts in self.vram], "host_bytes": self.host_bytes,
                "host_pinned_bytes": self.host_pinned_bytes,
                "offloaded_bytes": self.offloaded_bytes, "kv_cache_tokens": self.kv_cache_tokens,
                "expected_tokens_per_second": dict(self.expected_tokens_per_second), "disk_bytes": self.disk_bytes}


@dataclass(frozen=True)
class Refusal:
    """Why nothing is started.

    Attributes:
        missing: of what there is too little: `vram` (of each GPU), `host_memory` or `disk`.
        remedies: changes each of which would do, the smallest first, as a person would type them.
    """

    cause: str
    missing: str
    missing_bytes: int
    remedies: tuple[str, ...]
    profile: str
    reasons: tuple[Reason, ...] = field(repr=False)
    vram: tuple[VramParts, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; `fits` is false."""
        return {"fits": False, "profile": self.profile, "cause": self.cause, "missing": self.missing,
                "missing_bytes": self.missing_bytes, "remedies": list(self.remedies),
                "reasons": [asdict(reason) for reason in self.reasons],
                "vram": [parts.to_json() for parts in self.vram]}

    def as_error(self) -> DoesNotFitError:
        """The same as an error, whose exit code is 3."""
        return DoesNotFitError(self.cause, "Any one of these would do: " + "; ".join(self.remedies) + "."
                               if len(self.remedies) > 1 else "".join(self.remedies) + ".")
