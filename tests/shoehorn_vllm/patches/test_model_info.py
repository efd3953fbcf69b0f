"""Properties of a model's class are read in a fork; vLLM's own way is taken where that fails."""

from __future__ import annotations

import os
import time
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the engine imports calls some of it deprecated
    from vllm.model_executor.models import registry

    from shoehorn_vllm.patches import model_info

pytestmark = [pytest.mark.contract,
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]  # torch and vLLM


def own_way(function: object) -> str:
    return "vLLM's own way"


def test_model_info_is_that_of_a_fresh_interpreter() -> None:
    lazy = registry._LazyRegisteredModel("vllm.model_executor.models.llama", "LlamaForCausalLM")
    read = lambda: registry._ModelInfo.from_model_cls(lazy.load_model_cls())  # noqa: E731  # as vLLM passes it
    assert model_info._run_in_fork(own_way, read) == registry._run_in_subprocess(read)
    assert model_info._run_in_fork(own_way, os.getpid) != os.getpid()


def test_failed_or_hanging_fork_is_replaced_by_a_fresh_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_info, "_LIMIT_SECONDS", 0.2)
    for broken in (lambda: os._exit(3), lambda: lambda: None, lambda: time.sleep(600)):
        assert model_info._run_in_fork(own_way, broken) == "vLLM's own way"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no process remains


def test_patch_is_applied_once() -> None:
    model_info.PATCH.revert()  # the plugin of another test of this process may have applied it
    original = registry._run_in_subprocess
    try:
        model_info.apply()
        model_info.apply()
        assert registry._run_in_subprocess is not original
        model_info.PATCH.revert()
        assert registry._run_in_subprocess is original
    finally:
        model_info.PATCH.revert()
