"""Sizes in text for users."""

from __future__ import annotations

import pytest

from shoehorn.common.units import GIB, format_size, parse_size


@pytest.mark.parametrize(("text", "size"), [
    ("7GiB", 7 << 30), ("7 GiB", 7 << 30), ("7g", 7 << 30), ("8GB", 8 * 10**9), ("512m", 512 << 20),
    ("1.5gib", 3 << 29), ("1073741824", 1 << 30), ("2TB", 2 * 10**12), ("10 KiB", 10240)])
def test_sizes_are_parsed_in_all_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1e9", "7 GiBs", "seven"])
def test_invalid_size_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_size(text)


def test_sizes_are_formatted_in_binary_units() -> None:
    assert [format_size(size) for size in (7 * GIB, 512 << 20, 2048, 12)] == ["7.00 GiB", "512 MiB", "2 KiB", "12 B"]
