"""Training of the demo model: `python demo/train.py --out demo/model`.

Rules:
- one seed determines everything; the same machine and libraries produce the same files, unless `--seconds` ends it;
- weights are float32 during training (products in bfloat16), and saved and measured in bfloat16, as served;
- the held-out score is the share of questions, not used for training, whose greedy answer is exactly right.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from itertools import chain
from pathlib import Path
from random import Random

import corpus as corpus_module
import torch
import vocabulary
from batches import IGNORED, Source, batches
from score import report, score
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

SEED = 6333
POSITIONS = 2048
SAVE_SECONDS = 60


def main() -> None:
    """Train, save, and print the score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the model into")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="train for this long, if the steps take longer")
    parser.add_argument("--tokens", type=int, default=32768, help="per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2),
                        help="processes that make text")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)  # moments of rare tokens become denormal, which CPUs multiply slowly
    started = time.monotonic()
    corpus = corpus_module.load()
    tokenizer = vocabulary.train(corpus, Random(SEED))  # noqa: S311 - drawing text, not secrets
    source = batches(Source(corpus, tokenizer, SEED + 1, arguments.tokens), arguments.workers)
    first = next(source)  # starts the processes before the device
    model = LlamaForCausalLM(configuration()).to(arguments.device)
    print(f"{model.num_parameters():,} parameters, {len(corpus.topics)} topics, {tokenizer.get_vocab_size()} tokens, "
          f"{time.monotonic() - started:.0f} s", flush=True)
    training = Training(model, arguments.steps, arguments.seconds, arguments.rate)
    for inputs, labels in chain([first], source):
        if not training.step(inputs, labels):
            break
        if training.seconds > SAVE_SECONDS * (training.saved + 1):
            training.saved += 1
            save(model, tokenizer, arguments.out)
    save(model, tokenizer, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"loss {training.loss:.4f}, {training.tokens:,} tokens, {training.seconds:.0f} s, {size / 1e6:.2f} MB in "
          f"{arguments.out}", flush=True)
    report(score(model.to(torch.bfloat16).eval(), tokenizer, corpus))
    source.close()


def configuration() -> LlamaConfig:
    """Return the configuration of the model: small, with all features of a large Llama.

    Widths are multiples of 128, for INT4 in groups of 128 and NF4 in blocks of 64; two KV heads of four, so that
    grouped queries and two GPUs can be tested. Embedding and head are two tensors, as in the 70B model that this one
    represents in tests, and still fit into 8 MB because the vocabulary is small.
    """
    return LlamaConfig(
        vocab_size=vocabulary.SIZE, hidden_size=256, intermediate_size=640, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=POSITIONS,
        rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
        pad_token_id=vocabulary.SPECIAL.index(vocabulary.PAD),
        bos_token_id=vocabulary.SPECIAL.index(vocabulary.BOS), eos_token_id=vocabulary.SPECIAL.index(vocabulary.EOS))


class Training:
    """AdamW with warm-up and cosine decay to zero, over steps or seconds, whichever ends first."""

    def __init__(self, model: LlamaForCausalLM, steps: int, seconds: float, rate: float) -> None:
        matrices = [weight for weight in model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in model.parameters() if weight.ndim == 1]
        self._model, self._steps, self._limit, self._rate = model.train(), steps, seconds, rate
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=rate,
            betas=(0.9, 0.98), fused=True)
        self._losses: list[torch.Tensor] = []
        self._started = time.monotonic()
        self.tokens, self.saved = 0, 0

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def loss(self) -> float:
        """Mean loss of the last 100 steps."""
        return float(torch.stack(self._losses[-100:]).mean())

    def step(self, inputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """Train on one batch. Returns False, without training, at the end."""
        done = len(self._losses)
        progress = max(done / self._steps, self.seconds / self._limit)
        if progress >= 1:
            return False
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * min(1.0, (done + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        targets = labels[rows, columns + 1]
        device = self._model.device
        inputs, rows, columns, targets = (each.to(device) for each in (inputs, rows, columns, targets))
        with torch.autocast(device.type, torch.bfloat16):
            # No attention mask: padding follows the text, where causal attention does not see it.
            hidden = self._model.model(inputs, use_cache=False).last_hidden_state
            logits = self._model.lm_head(hidden[rows, columns])
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._losses.append(loss.detach())
        self.tokens += inputs.numel()
        if done % 100 == 99:
            print(f"step {done + 1}: loss {self.loss:.4f}, {self.tokens:,} tokens, {self.seconds:.0f} s", flush=True)
        return True


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model in the layout of a hub repository, in bfloat16."""
    model = copy.deepcopy(model).to("cpu", torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_p=0.9, bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id)
    model.save_pretrained(folder)
    vocabulary.save(tokenizer, folder, POSITIONS)
    (folder / "model.safetensors").chmod(0o644)  # the library writes 0600; other users have to read it too
    for path in folder.glob("*.json"):
        if not path.read_text(encoding="utf-8").endswith("\n"):
            path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
