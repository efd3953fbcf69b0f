"""Stand-in for the files of a checkpoint: configs and safetensors headers without data.

`reads` records all reads, so that a test can count the bytes that a plan reads. Reading data fails the test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from shoehorn.model.safetensors import DTYPE_BITS


def header(tensors: Mapping[str, tuple[str, list[int]]]) -> tuple[bytes, int]:
    """Return a safetensors header with its length, and the size of the data that it describes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, end


class CheckpointFiles:
    """Files in memory: `heads` by name, each followed by the number of unreadable bytes in `tails`."""

    def __init__(self, heads: Mapping[str, bytes], tails: Mapping[str, int] | None = None) -> None:
        self._heads = dict(heads)
        self._tails = dict(tails or {})
        self.reads: list[tuple[str, int]] = []

    def names(self) -> Mapping[str, int]:
        """Return the size in bytes by name."""
        return {name: len(head) + self._tails.get(name, 0) for name, head in self._heads.items()}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read bytes; weights within the first read are zeros."""
        head, size = self._heads[name], self.names()[name]
        end = size if length is None else min(size, start + length)
        assert end - start <= 1 << 20, f"{end - start} bytes of {name} were asked for"
        self.reads.append((name, end - start))
        return (head[start:end] + bytes(max(0, end - max(start, len(head)))))


def checkpoint(config: Mapping[str, object], tensors: Mapping[str, tuple[str, list[int]]],
               shards: int = 1) -> CheckpointFiles:
    """Return a checkpoint of a config and tensors (name -> dtype and shape) in `shards` files."""
    heads, tails = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"}, {}
    names = list(tensors)
    place: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        mine = names[number::shards]
        heads[file], tails[file] = header({name: tensors[name] for name in mine})
        place |= dict.fromkeys(mine, file)
    if shards > 1:
        heads["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": place}).encode()
    return CheckpointFiles(heads, tails)


def dense(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, *, head_dim: int = 0,
          max_position: int = 131072, tied: bool = False, **config: object) -> CheckpointFiles:
    """Return a Llama of these sizes in bfloat16, in one file."""
    head_dim = head_dim or hidden // heads
    query, key_value = heads * head_dim, kv_heads * head_dim
    layer = {"self_attn.q_proj": [query, hidden], "self_attn.k_proj": [key_value, hidden],
             "self_attn.v_proj": [key_value, hidden], "self_attn.o_proj": [hidden, query],
             "mlp.gate_proj": [intermediate, hidden], "mlp.up_proj": [intermediate, hidden],
             "mlp.down_proj": [hidden, intermediate], "input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
    tensors = {f"model.layers.{number}.{name}.weight": ("BF16", shape)
               for number in range(layers) for name, shape in layer.items()}
    tensors |= {"model.embed_tokens.weight": ("BF16", [vocab, hidden]), "model.norm.weight": ("BF16", [hidden])}
    if not tied:
        tensors["lm_head.weight"] = ("BF16", [vocab, hidden])
    return checkpoint({"architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
                       "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
                       "head_dim": head_dim, "vocab_size": vocab, "max_position_embeddings": max_position,
                       "tie_word_embeddings": tied, "torch_dtype": "bfloat16", **config}, tensors)
