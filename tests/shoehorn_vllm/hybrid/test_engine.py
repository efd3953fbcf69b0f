"""The real engine on a CPU with INT4 linears, experts and embedding through the kernel, against the same in bf16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fakes import captured as captured_models
from support.kernel_reference import matrix

pytestmark = pytest.mark.contract

HIDDEN, INNER, EXPERT_COUNT, GROUP, VOCABULARY, LAYERS = 128, 64, 6, 32, 256, 2
PROMPTS = [[(7 * i + j) % VOCABULARY for i in range(length)] for j, length in enumerate((5, 40, 70))]
RUN = f"""
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
engine = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=128, max_num_seqs=4, kv_cache_memory_bytes=64 << 20,
             skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False)
prompts = [{{"prompt_token_ids": prompt}} for prompt in {PROMPTS}]
done = engine.generate(prompts, SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=0, detokenize=False),
                       use_tqdm=False)
print("RESULT", json.dumps([[next(iter(place.values())).logprob for place in request.prompt_logprobs[1:]]
                            for request in done]))
"""
LINEARS = {"self_attn.q_proj": (128, HIDDEN), "self_attn.k_proj": (64, HIDDEN), "self_attn.v_proj": (64, HIDDEN),
           "self_attn.o_proj": (HIDDEN, 128)} | {
    f"mlp.experts.{expert}.{name}": shape for expert in range(EXPERT_COUNT) for name, shape in {
        "gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Qwen3-MoE with random INT4 weights, and the same values in bf16."""
    random = torch.Generator().manual_seed(0)
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}

    def add(name: str, shape: tuple[int, int], group: int = GROUP) -> None:
        source = matrix(shape, group, len(plain))
        numbers = (source.values / source.scales.double().repeat_interleave(group, -1)).round()
        scales = (source.scales.double() * 20 / shape[1] ** 0.5).to(torch.bfloat16)  # outputs of the inputs' size
        values = (numbers * scales.double().repeat_interleave(group, -1)).to(torch.bfloat16)
        packed.update({f"{name}.weight_packed": source.codes, f"{name}.weight_scale": scales,
                       f"{name}.weight_shape": torch.tensor(shape)})
        plain[f"{name}.weight"] = values

    def common(name: str, tensor: torch.Tensor) -> None:
        packed[name] = plain[name] = tensor.to(torch.bfloat16)

    add("model.embed_tokens", (VOCABULARY, HIDDEN))
    common("lm_head.weight", torch.randn(VOCABULARY, HIDDEN, generator=random) * 0.3)
    common("model.norm.weight", torch.ones(HIDDEN))
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        for name, shape in LINEARS.items():
            add(start + name, shape)
        common(f"{start}mlp.gate.weight", torch.randn(EXPERT_COUNT, HIDDEN, generator=random))
        for name, size in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN), ("self_attn.q_norm", 32),
                           ("self_attn.k_norm", 32)):
            common(f"{start}{name}.weight", torch.ones(size))
    config = {**captured_models.config("qwen3-30b-a3b"), "num_hidden_layers": LAYERS, "hidden_size": HIDDEN,
              "intermediate_size": 256, "moe_intermediate_size": INNER, "num_experts": EXPERT_COUNT,
              "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
              "vocab_size": VOCABULARY, "torch_dtype": "bfloat16", "eos_token_id": None}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                    "ignore": ["lm_head", "re:.*mlp.gate$"],
                    "config_groups": {"group_0": {"targets": ["Linear", "Embedding"], "weights": weights}}}
    directories = {}
    for name, tensors, extra in (("int4", packed, {"quantization_config": quantization}), ("bf16", plain, {})):
        directories[name] = tmp_path_factory.mktemp(name)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()},
                  directories[name] / "model.safetensors", {"format": "pt"})
        (directories[name] / "config.json").write_text(json.dumps(config | extra))
    return directories


def run(model: Path) -> tuple[list[list[float]], str]:
    """Log probabilities of the prompts' tokens from the real engine, and its output."""
    done = subprocess.run([sys.executable, "-c", RUN, str(model)], text=True, capture_output=True, timeout=400,
                          check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    output = done.stdout + done.stderr
    assert "RESULT" in done.stdout, output[-4000:]
    return json.loads(done.stdout.partition("RESULT ")[2].splitlines()[0]), output


def expected(model: Path) -> list[list[float]]:
    """The same from transformers, with the bf16 checkpoint."""
    from transformers import AutoModelForCausalLM  # slow to import

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    result = []
    for prompt in PROMPTS:
        with torch.inference_mode():
            logs = network(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        result.append(logs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist())
    return result


def difference(one: list[list[float]], other: list[list[float]]) -> float:
    """The mean distance of the prompts' log probabilities."""
    return float(np.abs(np.concatenate(one) - np.concatenate(other)).mean())


def test_int4_answers_as_bf16(models: dict[str, Path]) -> None:
    reference = expected(models["bf16"])
    answers, output = run(models["int4"])
    assert "Using HostLinearKernel" in output
    assert "Using HostExpertsMethod" in output
    assert "CPU kernel started isa=" in output
    assert difference(answers, reference) < 0.1
    assert difference(reference, [prompt[::-1] for prompt in reference]) > 1, "the comparison distinguishes nothing"


CHOICES = """
import os, sys
import torch
import vllm
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

CONFIG = MPLinearLayerConfig((256, 128), (256, 128), scalar_types.uint4b8, torch.bfloat16, 64, False)

def choice(name, value):
    os.environ["SHOEHORN_CPU_COMPUTE"] = value
    from shoehorn_vllm.hybrid.kernel import library
    if name == "no library":
        library.LIBRARY_PATH = library.LIBRARY_PATH.with_name("none.so")
    from shoehorn_vllm.plugin import register
    try:
        register()
    except ValueError as error:
        print(name, type(error).__name__, error)
        return
    kind = kernels.choose_mp_linear_kernel(CONFIG)
    print(name, kind.__name__)
    if name == "no library":
        kernel, layer = kind(CONFIG, "codes", "scales"), torch.nn.Module()
        codes = torch.randint(-2**31, 2**31, (128, 32), dtype=torch.int32)
        scales = torch.rand(128, 4).to(torch.bfloat16)
        layer.codes, layer.scales = (torch.nn.Parameter(t, requires_grad=False) for t in (codes, scales))
        pairs = codes.view(torch.uint8)
        numbers = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1).double() - 8
        values = numbers * scales.double().repeat_interleave(64, 1)
        kernel.process_weights_after_loading(layer)
        x = torch.randn(3, 256).to(torch.bfloat16)
        y = kernel.apply_weights(layer, x)
        print("error", bool((y.double() - x.double() @ values.T).norm() < 0.01 * y.double().norm()))

for name, value in (("auto", "auto"), ("off", "off"), ("invalid", "on"), ("no library", "auto")):
    child = os.fork()
    if child == 0:
        choice(name, value)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_the_setting_and_the_library_choose_the_kernel() -> None:
    done = subprocess.run([sys.executable, "-c", CHOICES], text=True, capture_output=True, timeout=200, check=False,
                          env={**os.environ, "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "1"})
    output = done.stdout + done.stderr
    assert "auto HostLinearKernel" in done.stdout, output
    assert "off CPUWNA16LinearKernel" in done.stdout, output
    assert "invalid SettingError SHOEHORN_CPU_COMPUTE=on: invalid. Set auto or off." in done.stdout, output
    assert "no library TorchInt4LinearKernel\nerror True" in done.stdout, output
    assert "CPU kernel unavailable" in output


EMBEDDING = """
import torch
from shoehorn_vllm.hybrid.embedding import gather

for bits in (4, 8):
    numbers = torch.randint(0, 1 << bits, (10, 64), generator=torch.Generator().manual_seed(bits))
    per_word = 32 // bits
    packed = sum(numbers[:, place::per_word] << bits * place for place in range(per_word)).to(torch.int32)
    scales = torch.rand(10, 2).to(torch.bfloat16)
    expected = (numbers.float() - (1 << (bits - 1))) * scales.float().repeat_interleave(32, -1)
    ids = torch.tensor([3, 3, 9])
    print("BITS", bits, torch.equal(gather(ids, packed, scales, 64, bits), expected[ids].to(torch.bfloat16)))
"""


def test_rows_of_a_quantized_embedding() -> None:
    done = subprocess.run([sys.executable, "-c", EMBEDDING], text=True, capture_output=True, timeout=200, check=False)
    assert "BITS 4 True" in done.stdout, done.stderr
    assert "BITS 8 True" in done.stdout, done.stderr
