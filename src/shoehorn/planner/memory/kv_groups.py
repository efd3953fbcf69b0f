"""Groups of layers that share the blocks of the KV cache, as vLLM 0.32.0 forms them.

Rules: a block of the pool belongs to one group at a time and holds a page of each of its layers; a request takes blocks
of every group. Layers of one kind are one group; layers of several kinds form groups of equal size, after their pages
were made equally large.

Source: vllm/v1/core/kv_cache_utils.py (get_kv_cache_groups, unify_kv_cache_spec_page_size,
_get_kv_cache_groups_uniform_page_size, _get_packed_kv_cache_groups).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shoehorn.common.units import ceil_div
from shoehorn.planner.memory.kv_pages import PageKind, Pages

_NEARLY_AS_MANY = 1.5
"""Kinds are padded to the larger number of layers where it is less than this many times the smaller one."""


@dataclass(frozen=True)
class Group:
    """Layers whose pages make up a block; each member is one kind."""

    members: tuple[Pages, ...]

    def blocks(self, length: int, in_flight: int) -> int:
        """Count the blocks of one request of that many tokens."""
        return max(member.blocks(length, in_flight) for member in self.members)

    def bytes(self, layers: range) -> int:
        """Size of a block on a GPU that holds those layers."""
        return sum(member.bytes * sum(number in layers for number in member.numbers) for member in self.members)


def group(kinds: Sequence[Pages]) -> list[Group]:
    """Divide all layers into groups."""
    if len({_type(kind) for kind in kinds}) <= 1:
        return [Group(tuple(kinds))] if kinds else []
    if any(kind.latent and kind.kind is PageKind.WINDOW for kind in kinds):
        return _packed(kinds)
    equal = _equal_pages(kinds)
    if equal is None:  # all tokens are kept, as by vLLM's fallback
        return [Group(tuple(replace(kind, kind=PageKind.FULL, window=0) if kind.window and kind.kind is not
                            PageKind.STATE else kind for kind in kinds))]
    size = group_size([len(kind.numbers) for kind in equal])
    return [Group((replace(kind, numbers=numbers),)) for kind in equal
            for numbers in _dealt(kind.numbers, ceil_div(len(kind.numbers), size))]


def group_size(layers: list[int]) -> int:
    """Number of layers in each group: the fewest of a kind, or the most where both are nearly as many."""
    return max(layers) if max(layers) < min(layers) * _NEARLY_AS_MANY else min(layers)


def _type(kind: Pages) -> tuple[object, ...]:
    """Return what layers of one group have in common: every request needs as many tokens' pages of each."""
    latent_window = kind.latent and kind.kind is PageKind.WINDOW
    size = kind.bytes if kind.kind is PageKind.STATE else 0
    return kind.kind, kind.window, kind.block_tokens, latent_window, size


def _dealt(numbers: tuple[int, ...], groups: int) -> Iterable[tuple[int, ...]]:
    """Deal the layers out, so that each pipeline stage holds some of every group."""
    return (numbers[first::groups] for first in range(groups))


def _equal_pages(kinds: Sequence[Pages]) -> list[Pages] | None:
    """Make all pages as large as the largest: by more tokens in a block, else by padding.

    Returns None where a page of compressed attention does not divide the largest; it cannot be padded.
    """
    largest = max(kind.bytes for kind in kinds)
    equal = []
    for kind in kinds:
        ratio, rest = divmod(largest, kind.bytes)
        if kind.kind is PageKind.STATE or (rest and not kind.latent):
            equal.append(replace(kind, bytes=largest))
        elif rest:
            return None
        else:
            equal.append(replace(kind, bytes=largest, block_tokens=kind.block_tokens * ratio))
    return equal


def _packed(kinds: Sequence[Pages]) -> list[Group]:
    """Pack pages of different sizes side by side: DeepSeek-V4's windows, compressors and compressed caches.

    Kinds of one type form a bucket. Buckets with equally many layers of every page size are divided into groups of
    about the same number of layers; others stay whole.
    """
    buckets: dict[tuple[object, ...], list[Pages]] = {}
    for kind in kinds:
        buckets.setdefault(_type(kind), []).append(kind)
    sizes = [Counter({size: sum(len(kind.numbers) for kind in bucket if kind.bytes == size)
                      for size in {kind.bytes for kind in bucket}}) for bucket in buckets.values()]
    balanced = [len(set(size.values())) == 1 for size in sizes]
    least = max((max(size.values()) for size, even in zip(sizes, balanced, strict=True) if even and len(size) > 1),
                default=0)
    repeats = _least_padding([max(size.values()) for size, even in zip(sizes, balanced, strict=True) if even], least)
    groups = []
    for bucket, size, even in zip(buckets.values(), sizes, balanced, strict=True):
        number = ceil_div(max(size.values()), repeats) if even and least else 1
        groups += [Group(tuple(replace(kind, numbers=kind.numbers[first::number]) for kind in bucket))
                   for first in range(number)]
    return groups


def _least_padding(counts: list[int], least: int) -> int:
    """Find the size of groups that adds the fewest layers to fill them, the largest of equals; at least `least`."""
    sizes = range(max(1, least), max([*counts, least, 1]) + 1)
    return min(sizes, key=lambda size: (sum(-count % size for count in counts), -size))
