"""Writes a random-weight Llama 8B (the shapes of DeepSeek-R1-Distill-Llama-8B) with a tokenizer of its vocabulary size.

Speed and memory are those of the real model; the text is noise. Needs torch with CUDA, safetensors and tokenizers.
usage: make_model.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE, VOCABULARY = 4096, 14336, 32, 32, 1024, 128256
TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def config() -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE // 128, "head_dim": 128, "vocab_size": VOCABULARY,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 500000.0,
        "bos_token_id": 256, "eos_token_id": 257, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer: 256 bytes, then role and filler tokens up to the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    result = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(text, special=True) for text in
                             ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")])
    result.add_tokens([f" w{number}" for number in range(result.get_vocab_size(), VOCABULARY)])
    return result


def weights(directory: Path) -> None:
    """The safetensors shards, one a layer, and their index."""
    torch.manual_seed(0)
    index: dict[str, str] = {}
    total = 0

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02).cpu()

    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shard = {
            f"{name}.self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            f"{name}.self_attn.k_proj.weight": random(KEY_VALUE, HIDDEN),
            f"{name}.self_attn.v_proj.weight": random(KEY_VALUE, HIDDEN),
            f"{name}.self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
            f"{name}.mlp.gate_proj.weight": random(INTERMEDIATE, HIDDEN),
            f"{name}.mlp.up_proj.weight": random(INTERMEDIATE, HIDDEN),
            f"{name}.mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE),
            f"{name}.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            f"{name}.post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
        if layer == 0:
            shard |= {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
                      "lm_head.weight": random(VOCABULARY, HIDDEN),
                      "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
        file = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        save_file(shard, directory / file)
        index |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}))


def main(directory: Path) -> None:
    """Write everything to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(), indent=1))
    tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>",
        "chat_template": TEMPLATE, "model_max_length": 131072}))
    weights(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
