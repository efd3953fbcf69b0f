"""The build of the library: the same bytes each time, and an error message without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoehorn_vllm.hybrid.kernel import build, library


@pytest.mark.contract  # compiles for five seconds
def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    build.build(tmp_path / build.LIBRARY)
    assert (tmp_path / build.LIBRARY).read_bytes() == library.LIBRARY_PATH.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [build.LIBRARY]


def test_no_option_names_the_machine_that_builds() -> None:
    assert not [option for option in build.OPTIONS if option.startswith("-m")]


def test_a_compiler_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="unavailable"):
        build.build(tmp_path / "x.so", ["/nonexistent/cc"])
    with pytest.raises(build.BuildError, match="exit code 1"):
        build.build(tmp_path / "x.so", ["false"])
    assert not list(tmp_path.iterdir())


def test_cc_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "ccache gcc-12")
    assert build.find_compiler() == ["ccache", "gcc-12"]


def test_an_instruction_set_is_chosen_by_name() -> None:
    show = "from shoehorn_vllm.hybrid.kernel import library; print(library.default_isa().name)"
    for value, shown in (("portable", "PORTABLE"), ("auto", library.supported_isas()[-1].name), ("mmx", "unsupported")):
        done = subprocess.run([sys.executable, "-c", show], text=True, capture_output=True, check=False,
                              env={**os.environ, "SHOEHORN_CPU_ISA": value})
        assert shown in done.stdout + done.stderr


def test_a_library_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(library.KernelUnavailableError, match="Install a C compiler"):
        library.load(str(tmp_path / "none.so"))


def test_a_library_of_an_earlier_version() -> None:
    with pytest.raises(library.KernelUnavailableError, match="Reinstall Shoehorn"):
        library.load("libc.so.6")  # loads, and lacks the kernel's functions
