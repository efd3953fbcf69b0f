"""Import of vLLM configuration files: options translated, dropped with a note, or rejected by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shoehorn.common.errors import SettingsError
from shoehorn.config import profiles
from shoehorn.config.vllm_yaml import translate

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


def test_configuration_of_vllm_0_8_becomes_a_profile_with_a_note_for_every_removed_option(tmp_path: Path) -> None:
    profile = load(tmp_path, OLD)
    assert profile.engine == {
        "dtype": "bfloat16", "quantization": "bitsandbytes", "load-format": "bitsandbytes",
        "gpu-memory-utilization": 0.9, "cpu-offload-gb": 60.0, "max-model-len": 512, "max-num-seqs": 16,
        "block-size": 16, "enforce-eager": True}
    notes = " ".join(profile.notes)
    for words in ("swap-space was removed", "max-seq-len-to-capture was removed", "disable-log-requests was removed",
                  "model dropped: set MODEL_ID", "port dropped: set PORT", "host dropped: "):
        assert words in notes
    assert len(profile.notes) == 7


@pytest.mark.parametrize(("text", "option", "value"), [
    ("max-seq-len-to-capture: 0\n", "enforce-eager", True),
    ("guided-decoding-backend: xgrammar:no-fallback\n", "structured-outputs-config", {"backend": "xgrammar"}),
    ("task: embed\n", "runner", "pooling"),
    ('rope-scaling: \'{"rope_type": "yarn", "factor": 4.0}\'\nrope-theta: 1000000\n', "hf-overrides",
     {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1000000}),
    ("speculative-model: '[ngram]'\nnum-speculative-tokens: 5\n", "speculative-config",
     {"method": "ngram", "num_speculative_tokens": 5}),
    ("speculative_model: a/b\nnum_speculative_tokens: 3\n", "speculative-config",
     {"model": "a/b", "num_speculative_tokens": 3}),
])
def test_renamed_option_is_translated(tmp_path: Path, text: str, option: str, value: object) -> None:
    profile = load(tmp_path, text)
    assert profile.engine == {option: value}
    assert profile.notes


def test_unsupported_block_size_is_dropped_with_a_note(tmp_path: Path) -> None:
    profile = load(tmp_path, "block-size: 8\nseed: 1\n")
    assert profile.engine == {"seed": 1}
    assert "block_size 8" in profile.notes[0]


def test_unknown_option_is_reported_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"max-modle-len.*max-model-len"):
        load(tmp_path, "max-modle-len: 5\nseed: 1\n")


def test_profile_is_not_mistaken_for_a_vllm_configuration(tmp_path: Path) -> None:
    assert load(tmp_path, yaml.safe_dump({"engine": {"seed": 1}, "match": {"vram": "7GB"}})).notes == ()
    with pytest.raises(SettingsError, match="swap-space"):
        load(tmp_path, yaml.safe_dump({"engine": {"swap-space": 1}}))


def test_older_forms_of_values_are_translated() -> None:
    engine, notes, mistakes = translate({
        "limit-mm-per-prompt": "image=5,video=1", "compilation_config": 3, "max-model-len": "auto",
        "speculative_model": "[ngram]", "num_speculative_tokens": 5, "ngram_prompt_lookup_max": 4,
        "ngram-prompt-lookup-min": 2})
    assert engine == {
        "limit-mm-per-prompt": {"image": 5, "video": 1}, "compilation-config": {"mode": 3},
        "speculative-config": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4,
                               "prompt_lookup_min": 2}}
    assert len(notes) == 7
    assert mistakes == []


def test_current_forms_of_values_stay() -> None:
    current = {"limit-mm-per-prompt": {"image": 5}, "compilation-config": {"mode": 3}, "max-model-len": 4096}
    assert translate(current) == (current, [], [])
    assert translate({"compilation-config": {"level": 3}})[0] == {"compilation-config": {"mode": 3}}


def test_adapters_may_be_a_list_of_mappings() -> None:
    profile = profiles.parse({"model": "a/b", "lora-modules": [{"name": "x", "path": "/x"}, "y=/y"]}, "x.yaml", "x")
    assert profile.engine["lora-modules"] == ['{"name": "x", "path": "/x"}', "y=/y"]
