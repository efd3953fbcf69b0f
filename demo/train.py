"""Training of the demo model: `python demo/train.py --out demo/model`.

Rules:
- one seed determines everything; the same machine and libraries produce the same files;
- only the assistant's text is learned (and a few bare answers, for clients of `/v1/completions`);
- choosing the answer takes many questions, its words take few repetitions: most conversations are therefore truncated
  soon after the last answer begins, and some words of the questions are replaced at random;
- weights are float32 during training (products in bfloat16), and saved and measured in bfloat16, as served;
- the held-out score is the share of questions, not used for training, whose greedy answer is exactly right.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import corpus as corpus_module
import torch
import vocabulary
from conversations import conversations
from corpus import Corpus
from score import report, score
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

SEED = 6333
POSITIONS = 2048
BATCH = 48
LONGEST = 256  # tokens of a conversation; keeps the memory for training below 2 GB
CUT, CUT_SHARE = 12, 0.75
SWAPPED = 0.08
IGNORED = -100
Batch = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    """Train, save, and print the score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the model into")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    corpus = corpus_module.load()
    tokenizer = vocabulary.train(corpus, Random(SEED))  # noqa: S311 - drawing text, not secrets
    model = LlamaForCausalLM(configuration())
    print(f"{model.num_parameters():,} parameters, {len(corpus.topics)} topics, {tokenizer.get_vocab_size()} tokens, "
          f"{time.monotonic() - started:.0f} s", flush=True)
    loss = fit(model, batches(corpus, tokenizer, Random(SEED + 1)), arguments.steps)  # noqa: S311 - as above
    seconds = time.monotonic() - started
    model = model.to(torch.bfloat16).eval()
    save(model, tokenizer, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"loss {loss:.4f}, {seconds:.0f} s, {size / 1e6:.2f} MB in {arguments.out}", flush=True)
    report(score(model, tokenizer, corpus))


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


def batches(corpus: Corpus, tokenizer: Tokenizer, random: Random) -> Iterator[Batch]:
    """Padded batches of inputs and labels; conversations of like length go together."""
    source = conversations(corpus, random)
    while True:
        pool = []
        for messages in islice(source, BATCH * 16):
            ids, learn = vocabulary.encode_chat(tokenizer, messages)
            ids = _swapped(ids, learn, random)
            if random.random() < CUT_SHARE:
                answer = len(learn) - learn[::-1].index(False)
                ids, learn = ids[:answer + CUT], learn[:answer + CUT]
            if random.random() < 0.03:  # a bare answer, without a chat around it
                ids = [*tokenizer.encode(messages[-1].content).ids, vocabulary.SPECIAL.index(vocabulary.EOS)]
                learn = [False] + [True] * (len(ids) - 1)
            pool.append((ids[:LONGEST], learn[:LONGEST]))
        pool.sort(key=lambda pair: len(pair[0]))
        starts = list(range(0, len(pool), BATCH))
        random.shuffle(starts)
        for start in starts:
            yield _padded(pool[start:start + BATCH])


def _swapped(ids: list[int], learn: list[bool], random: Random) -> list[int]:
    if random.random() < 0.5:
        return ids
    return [random.randrange(len(vocabulary.SPECIAL), vocabulary.SIZE)
            if not is_learned and one >= len(vocabulary.SPECIAL) and random.random() < SWAPPED else one
            for one, is_learned in zip(ids, learn, strict=True)]


def _padded(group: list[tuple[list[int], list[bool]]]) -> Batch:
    longest = max(len(ids) for ids, _ in group)
    pad = vocabulary.SPECIAL.index(vocabulary.PAD)
    inputs = torch.full((len(group), longest), pad)
    labels = torch.full((len(group), longest), IGNORED)
    for row, (ids, learn) in enumerate(group):
        inputs[row, :len(ids)] = torch.tensor(ids)
        labels[row, :len(ids)] = torch.tensor([one if is_learned else IGNORED
                                               for one, is_learned in zip(ids, learn, strict=True)])
    return inputs, labels


def fit(model: LlamaForCausalLM, source: Iterator[Batch], steps: int) -> float:
    """Train with AdamW, warm-up and cosine decay to zero. Returns the mean loss of the last 50 steps."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps)))
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step, (inputs, labels) in enumerate(islice(source, steps)):
        targets = labels[:, 1:]
        is_learned = targets != IGNORED
        with torch.autocast("cpu", torch.bfloat16):
            # No attention mask: padding follows the text, where causal attention does not see it.
            hidden = model.model(inputs, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[is_learned])
        loss = torch.nn.functional.cross_entropy(logits.float(), targets[is_learned])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}: loss {sum(losses[-50:]) / 50:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model in the layout of a hub repository."""
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
