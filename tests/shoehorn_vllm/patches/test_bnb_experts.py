"""Experts in NF4, loaded by the real engine's loader with and without the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fakes import captured as captured_models

pytestmark = pytest.mark.contract

HIDDEN, INNER, EXPERT_COUNT = 128, 64, 4
LOAD = """
import sys
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

directory, store = sys.argv[1:]
torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
config = EngineArgs(model=directory, quantization="bitsandbytes", dtype="bfloat16", enforce_eager=True,
                    max_model_len=64, skip_tokenizer_init=True).create_engine_config()
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
    initialize_model_parallel(1, 1)
    model = get_model(vllm_config=config)
for name, parameter in model.named_parameters():
    if "experts" in name:
        print("LOADED", name.rpartition(".")[2], tuple(parameter.bnb_quant_state.shape))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of one layer with random weights."""
    directory = tmp_path_factory.mktemp("experts")
    config = {**captured_models.config("qwen3-30b-a3b"), "num_hidden_layers": 1, "hidden_size": HIDDEN,
              "intermediate_size": 256, "moe_intermediate_size": INNER, "num_experts": EXPERT_COUNT,
              "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
              "vocab_size": 256}
    shapes = {"model.embed_tokens.weight": (256, HIDDEN), "lm_head.weight": (256, HIDDEN),
              "model.norm.weight": (HIDDEN,)}
    layer = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "self_attn.q_norm": (32,),
             "self_attn.k_norm": (32,), "self_attn.q_proj": (128, HIDDEN), "self_attn.k_proj": (64, HIDDEN),
             "self_attn.v_proj": (64, HIDDEN), "self_attn.o_proj": (HIDDEN, 128),
             "mlp.gate": (EXPERT_COUNT, HIDDEN)}
    for expert in range(EXPERT_COUNT):
        layer |= {f"mlp.experts.{expert}.{name}": shape for name, shape in {
            "gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items()}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    save_file({name: random.normal(0, 0.02, shape).astype(np.float16) for name, shape in shapes.items()},
              directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def load(model: Path, tmp_path: Path, plugins: str) -> str:
    done = subprocess.run([sys.executable, "-c", LOAD, str(model), str(tmp_path / "store")], text=True,
                          capture_output=True, timeout=300, env={**os.environ, "VLLM_PLUGINS": plugins})
    return done.stdout + done.stderr


def test_experts_are_quantized_during_the_load(model: Path, tmp_path: Path) -> None:
    output = load(model, tmp_path, "bitsandbytes,shoehorn")
    assert f"LOADED w13_weight ({EXPERT_COUNT * 2 * INNER}, {HIDDEN})" in output, output[-3000:]
    assert f"LOADED w2_weight ({EXPERT_COUNT * HIDDEN}, {INNER})" in output


def test_patch_is_still_needed(model: Path, tmp_path: Path) -> None:
    assert "doesn't match the broadcast shape" in load(model, tmp_path, "bitsandbytes"), "remove the patch"
