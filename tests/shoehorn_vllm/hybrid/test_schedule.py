"""Which matrices are streamed to the GPU in hybrid execution."""

from __future__ import annotations

import pytest

from shoehorn_vllm.hybrid.offload.schedule import Level, following, select, streamed_share

LAYER = [42, 33, 235, 117]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0])
def test_selected_bytes_come_close_to_the_share(share: float) -> None:
    sizes = LAYER * 80
    chosen = select(sizes, share)
    assert chosen == sorted(set(chosen))
    assert abs(sum(sizes[number] for number in chosen) / sum(sizes) - share) < 0.01
    for begin in range(0, 320, 80):  # spread evenly: each quarter has its share
        part = sum(sizes[number] for number in chosen if begin <= number < begin + 80)
        assert abs(part / sum(sizes[begin:begin + 80]) - share) < 0.06


def test_at_least_one_matrix_is_streamed() -> None:
    assert select([10, 90, 20], 0.01) == [1]


def test_everything_beyond_the_last_level_is_streamed() -> None:
    levels = (Level(1, 0.0), Level(8, 0.4))
    assert [streamed_share(levels, tokens) for tokens in (1, 2, 8, 9, 1000)] == [0.0, 0.4, 0.4, 1.0, 1.0]
    assert streamed_share((), 1) == 1.0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_followers_are_the_next_streamed_matrices(depth: int) -> None:
    streamed = [2, 3, 6]
    lists = following(8, streamed, depth)
    order = streamed * 3
    for number, followers in enumerate(lists):
        first = next((place for place, each in enumerate(streamed) if each >= number), 0)
        length = min(depth + (streamed[first] == number), 3)
        assert followers == order[first:first + length]
        assert len(set(followers)) == len(followers)


def test_single_streamed_matrix_follows_itself() -> None:
    assert following(3, [1], 2) == [[1], [1], [1]]
