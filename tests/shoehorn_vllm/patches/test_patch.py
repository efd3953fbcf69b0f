"""Replacement of functions of the engine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from shoehorn_vllm.patches.patch import Patch


class Owner:
    """A class of the engine."""

    def double(self, number: int) -> int:
        """The engine's own method."""
        return 2 * number


def add_one(original: Callable[[Owner, int], int], owner: Owner, number: int) -> int:
    return original(owner, number) + 1


def test_replacement_gets_the_original_first_and_binds_as_a_method() -> None:
    patch = Patch(Owner, "double", add_one)
    patch.apply()
    try:
        assert Owner().double(5) == 11
        patch.apply()
        assert Owner().double(5) == 11, "a second application has no effect"
    finally:
        patch.revert()
    assert Owner().double(5) == 10
    patch.revert()
    assert Owner().double(5) == 10


def test_functions_of_modules_are_replaced_too() -> None:
    module = SimpleNamespace(pause=lambda: "spun")
    Patch(module, "pause", lambda original: f"not {original()}").apply()
    assert module.pause() == "not spun"


def test_two_patches_of_one_function_are_nested() -> None:
    module = SimpleNamespace(name=lambda: "engine")
    for word in ("a", "b"):
        Patch(module, "name", lambda original, word=word: f"{word} {original()}").apply()
    assert module.name() == "b a engine"
