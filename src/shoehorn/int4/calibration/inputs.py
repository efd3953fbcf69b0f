"""Second moments H = sum of x x^T of the inputs of a layer's linear modules, for GPTQ.

Rules:
- modules that get the same tensor share H, so q, k and v are one `Source`; each expert has its own;
- columns are divided into spans with independent H, and the spans into passes, so that the memory of a pass is bounded;
- inputs of experts count with the square of their router weight, as in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

Forward = Callable[[], None]
"""Runs the layer over all calibration sequences."""


@dataclass(frozen=True)
class Source:
    """One input of linear modules.

    Attributes:
        names: weights that it enters, as `self_attn.q_proj.weight`; those of an expert as in checkpoints.
        columns: its width.
        module: the first module that gets it, or the module of all experts.
        expert: number of the expert; None outside of mixtures.
        inner: of an expert, the input of its down projection.
    """

    names: tuple[str, ...]
    columns: int
    module: str
    expert: int | None = None
    inner: bool = False


@dataclass
class Span:
    """Some columns of a source and their H.

    Attributes:
        hessian: float32 [columns, columns], while collected.
        tokens: number of inputs.
    """

    source: Source
    begin: int
    end: int
    hessian: torch.Tensor | None = None
    tokens: int = field(default=0)

    @property
    def bytes(self) -> int:
        """Size of H."""
        return 4 * (self.end - self.begin) ** 2

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [tokens, columns of the source]."""
        part = inputs[:, self.begin:self.end].float()
        if self.hessian is None:
            width = self.end - self.begin
            self.hessian = torch.zeros(width, width, device=inputs.device)
        self.hessian.addmm_(part.T, part)
        self.tokens += len(part)


def sources(layer: torch.nn.Module, names: Iterable[str], run_once: Forward) -> list[Source]:
    """Return the inputs of the given weights, by a forward pass of one sequence.

    Args:
        names: parameters to quantize, those of experts as in checkpoints.
    """
    targets = set(names)
    seen: list[tuple[Any, list[str], int, str]] = []
    result: list[Source] = []
    with ExitStack() as stack:
        for name, module in layer.named_modules():
            if is_experts(module):
                result += _of_experts(name, module, targets)
            elif isinstance(module, torch.nn.Linear) and f"{name}.weight" in targets:
                def see(_: torch.nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
                    for tensor, members, _columns, _first in seen:
                        if tensor is arguments[0]:
                            members.append(f"{name}.weight")
                            return
                    seen.append((arguments[0], [f"{name}.weight"], arguments[0].shape[-1], name))
                stack.callback(module.register_forward_pre_hook(see).remove)
        run_once()
    return [Source(tuple(members), columns, first) for _, members, columns, first in seen] + result


def is_experts(module: torch.nn.Module) -> bool:
    """Return whether a module has the weights of all experts of a mixture."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    return all(isinstance(each, torch.nn.Parameter) and each.dim() == 3 for each in (up, down))


def _of_experts(name: str, module: Any, targets: set[str]) -> Iterator[Source]:
    for expert in range(module.gate_up_proj.shape[0]):
        prefix = f"{name}.{expert}"
        outer = tuple(each for each in (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight") if each in targets)
        if outer:
            yield Source(outer, module.gate_up_proj.shape[2], name, expert)
        if (down := f"{prefix}.down_proj.weight") in targets:
            yield Source((down,), module.down_proj.shape[2], name, expert, inner=True)


def spans(all_sources: Iterable[Source], most_columns: int, group: int) -> list[Span]:
    """Divide each source into equal spans of at most `most_columns`, a multiple of `group`."""
    result = []
    for source in all_sources:
        parts = -(-source.columns // max(most_columns, group))
        groups = source.columns // group
        edges = [groups * part // parts * group for part in range(parts + 1)]
        result += [Span(source, begin, end) for begin, end in pairwise(edges) if end > begin]
    return result


def passes(all_spans: Sequence[Span], most_bytes: int) -> Iterator[list[Span]]:
    """Divide spans into passes whose matrices take at most `most_bytes`, but at least one span each."""
    current: list[Span] = []
    for span in all_spans:
        if current and sum(each.bytes for each in current) + span.bytes > most_bytes:
            yield current
            current = []
        current.append(span)
    if current:
        yield current


def collect(layer: torch.nn.Module, some_spans: Sequence[Span], forward: Forward) -> None:
    """Run the layer and add its inputs to the spans."""
    by_module: dict[str, list[Span]] = {}
    for span in some_spans:
        by_module.setdefault(span.source.module, []).append(span)
    with ExitStack() as stack:
        for name, own in by_module.items():
            module = layer.get_submodule(name)
            hook = _experts_hook(own) if is_experts(module) else _linear_hook(own)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # products of bf16 inputs are exact in TF32
        try:
            forward()
        finally:
            torch.set_float32_matmul_precision(precision)


def _linear_hook(own: Sequence[Span]) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
    def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = arguments[0].reshape(-1, arguments[0].shape[-1])
        for span in own:
            span.add(inputs)

    return hook


def _experts_hook(own: Sequence[Span]) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
    by_expert: dict[int, list[Span]] = {}
    for span in own:
        if span.source.expert is not None:
            by_expert.setdefault(span.source.expert, []).append(span)

    def hook(module: Any, arguments: tuple[Any, ...]) -> None:
        hidden, chosen, weights = arguments[:3]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for expert, members in by_expert.items():
            token, place = torch.where(chosen.reshape(len(hidden), -1) == expert)
            if not len(token):
                continue
            inputs, weight = hidden[token], weights.reshape(len(hidden), -1)[token, place].unsqueeze(1)
            inner = None
            for span in members:
                if span.source.inner and inner is None:
                    gate, up = torch.nn.functional.linear(inputs, module.gate_up_proj[expert]).chunk(2, dim=-1)
                    inner = module.act_fn(gate) * up
                span.add((inner if span.source.inner else inputs) * weight)

    return hook
