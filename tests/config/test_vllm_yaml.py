"""vLLM's own configuration files, also old ones: translated, dropped with a note, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shoehorn.common.errors import SettingsError
from shoehorn.config import profiles

OLD = """
model: deepseek-ai/DeepSeek-R1-Distill-Llama-70B
served-model-name: r1
host: 0.0.0.0
port: 8000
dtype: bfloat16
quantization: bitsandbytes
load-format: bitsandbytes
gpu-memory-utilization: 0.9
cpu-offload-gb: 60
swap-space: 16
max-seq-len-to-capture: 512
max-model-len: 512
max_num_seqs: 16
block-size: 16
disable-log-requests: true
disable-log-stats: false
enforce-eager: true
"""


def load(tmp_path: Path, text: str) -> profiles.Profile:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return profiles.load(str(path))


def test_a_file_for_vllm_08_becomes_a_profile_with_a_note_for_every_key_that_is_gone(tmp_path: Path) -> None:
    profile = load(tmp_path, OLD)
    assert profile.engine == {
        "dtype": "bfloat16", "quantization": "bitsandbytes", "load-format": "bitsandbytes",
        "gpu-memory-utilization": 0.9, "cpu-offload-gb": 60.0, "max-model-len": 512, "max-num-seqs": 16,
        "block-size": 16, "enforce-eager": True}
    named = " ".join(profile.notes)
    for words in ("swap-space is gone", "max-seq-len-to-capture is gone", "disable-log-requests is gone",
                  "model is left out: set MODEL_ID", "port is left out: set PORT",
                  "host is left out: Shoehorn fixes it"):
        assert words in named
    assert len(profile.notes) == 7


@pytest.mark.parametrize(("text", "option", "value"), [
    ("max-seq-len-to-capture: 0\n", "enforce-eager", True),
    ("worker-use-ray: true\n", "distributed-executor-backend", "ray"),
    ("guided-decoding-backend: xgrammar:no-fallback\n", "structured-outputs-config", {"backend": "xgrammar"}),
    ("task: embed\n", "runner", "pooling"),
    ('rope-scaling: \'{"rope_type": "yarn", "factor": 4.0}\'\nrope-theta: 1000000\n', "hf-overrides",
     {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1000000}),
    ("speculative-model: '[ngram]'\nnum-speculative-tokens: 5\n", "speculative-config",
     {"method": "ngram", "num_speculative_tokens": 5}),
    ("speculative_model: a/b\nnum_speculative_tokens: 3\n", "speculative-config",
     {"model": "a/b", "num_speculative_tokens": 3}),
])
def test_what_has_another_name_now_is_translated(tmp_path: Path, text: str, option: str, value: object) -> None:
    profile = load(tmp_path, text)
    assert profile.engine == {option: value}
    assert profile.notes


def test_a_block_size_that_is_gone_is_left_out_with_a_note(tmp_path: Path) -> None:
    profile = load(tmp_path, "block-size: 8\nseed: 1\n")
    assert profile.engine == {"seed": 1}
    assert "block_size 8" in profile.notes[0]


def test_an_unknown_key_is_refused_by_name_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="max-modle-len is no option of the engine; did you mean max-model-len"):
        load(tmp_path, "max-modle-len: 5\nseed: 1\n")


def test_a_profile_is_still_a_profile(tmp_path: Path) -> None:
    assert load(tmp_path, yaml.safe_dump({"engine": {"seed": 1}, "match": {"vram": "7GB"}})).notes == ()
    with pytest.raises(SettingsError, match="swap-space is gone"):
        load(tmp_path, yaml.safe_dump({"engine": {"swap-space": 1}}))
