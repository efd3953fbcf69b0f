"""A small Llama with random weights, a volume with it, and its conversion to INT4, here or in a separate process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from fakes.hub import Hub
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.int4 import convert, shard_writer
from shoehorn.int4 import journal as journal_module
from shoehorn.int4.convert import ConversionOptions
from shoehorn.model.reference import ModelRef
from shoehorn.store import pull
from shoehorn.store.reference import model_reference

MODEL = "owner/little"
HIDDEN, INNER, VOCAB, LAYERS = 256, 512, 512, 6
WORDS = [f"w{number}" for number in range(500)]


def write_model(folder: Path, layers: int = LAYERS, hidden: int = HIDDEN, inner: int = INNER) -> Path:
    """Write a Llama with random weights, one shard per layer and one for the rest."""
    random = torch.Generator().manual_seed(3)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * 0.02).to(torch.bfloat16)

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{
        "model.embed_tokens.weight": matrix(VOCAB, hidden), "lm_head.weight": matrix(VOCAB, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}]
    for layer in range(layers):
        sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 2, hidden),
                 "self_attn.v_proj": (hidden // 2, hidden), "self_attn.o_proj": (hidden, hidden),
                 "mlp.gate_proj": (INNER, hidden), "mlp.up_proj": (INNER, hidden), "mlp.down_proj": (hidden, INNER)}
        shards.append({f"model.layers.{layer}.{name}.weight": matrix(*size) for name, size in sizes.items()}
                      | {f"model.layers.{layer}.{norm}_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16)
                         for norm in ("input", "post_attention")}
                      | {f"model.layers.{layer}.self_attn.q_proj.bias": torch.zeros(hidden, dtype=torch.bfloat16)})
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "torch_dtype": "bfloat16", "tie_word_embeddings": False}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def readable(folder: Path) -> Path:
    """Give a model a tokenizer of words and a text of them."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    order = torch.randint(0, len(WORDS), (4_000,), generator=torch.Generator().manual_seed(2))
    (folder.parent / "text.txt").write_text(" ".join(WORDS[int(number)] for number in order))
    return folder


def local(home: Path, model: Path, **more: str) -> dict[str, str]:
    (home / "models").mkdir(exist_ok=True)
    return {"MODEL_ID": str(model), "MODEL_SOURCE": "local", "MODELS_DIR": str(home / "models"),
            "RUN_DIR": str(home / "run"), "QUANTIZATION": "int4", "CALIBRATION": "off", **more}


def convert_here(environment: dict[str, str], options: ConversionOptions | None = None) -> Path:
    """Convert in a thread of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "workers", lambda _: ThreadPoolExecutor(1))
        return convert.convert(settings_module.load(environment), options or ConversionOptions(), 1, lambda _: None)


def start(environment: dict[str, str], *arguments: str,
          program: Sequence[str] = ("-m", "shoehorn.cli")) -> subprocess.Popen[str]:
    """Start `shoehorn convert`; `program` are the arguments of Python."""
    source = str(Path(pull.__file__).parents[2])
    return subprocess.Popen([sys.executable, *program, "convert", "--json", *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**environment, "PATH": os.environ["PATH"], "PYTHONPATH": source})


def start_paused(environment: dict[str, str], shards: int, *arguments: str) -> subprocess.Popen[str]:
    """Start a conversion that pauses after more than `shards` shards, until it is killed."""
    code = textwrap.dedent(f"""
        import sys, time
        from shoehorn import cli
        from shoehorn.int4 import convert
        record = convert._record
        def paused(*arguments):
            journal = record(*arguments)
            if len(journal.shards) > {shards}:
                time.sleep(600)
            return journal
        convert._record = paused
        sys.exit(cli.main(sys.argv[1:]))
        """)
    return start(environment, *arguments, program=("-c", code))


def start_paused_calibration(environment: dict[str, str], layers: int) -> subprocess.Popen[str]:
    """Start a conversion that pauses before it records layer number `layers` of its calibration, until it is killed."""
    code = textwrap.dedent(f"""
        import sys, time
        from shoehorn import cli
        from shoehorn.int4.calibration.run import Calibration
        record = Calibration._record
        def paused(calibration, index, results):
            if index == {layers}:
                time.sleep(600)
            record(calibration, index, results)
        Calibration._record = paused
        sys.exit(cli.main(sys.argv[1:]))
        """)
    return start(environment, program=("-c", code))


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def recorded_shards(folder: Path) -> set[str]:
    journal = journal_module.read_journal(folder)
    return set(journal.shards) if journal else set()


class Pulled:
    """A volume with the model of a hub."""

    def __init__(self, home: Path, hub: Hub, **more: str) -> None:
        (home / "models").mkdir()
        self.environment = {"MODEL_ID": MODEL, "MODELS_DIR": str(home / "models"), "RUN_DIR": str(home / "run"),
                            "MODELSCOPE_ENDPOINT": hub.url, "QUANTIZATION": "int4", "CALIBRATION": "off",
                            **more}
        pull.pull(self.settings, lambda _: None)

    @property
    def settings(self) -> Settings:
        return settings_module.load(self.environment)

    @property
    def ref(self) -> ModelRef:
        return model_reference(self.settings)

    def originals(self) -> list[str]:
        return sorted(path.name for path in (self.settings.models_dir / MODEL).glob("*.safetensors"))
