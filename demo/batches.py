"""Batches for the training of the demo model, made by several processes.

Rules:
- a pool of conversations is drawn from a seed of its own, so the number of processes changes nothing;
- only the assistant's text is learned (and a few bare answers, for clients of `/v1/completions`);
- choosing the answer takes many questions, its words take few repetitions: most conversations are therefore truncated
  soon after the last answer begins, and some words of the questions are replaced at random;
- copying a place, a number or a result takes many different ones; its beginning is learned from random tokens that are
  repeated, most of them in the first pools.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from random import Random

import numpy as np
import torch
import vocabulary
from conversations import conversations
from corpus import Corpus
from message import Message
from tokenizers import Tokenizer

POOL = 4096  # conversations
LONGEST = 768  # tokens of a conversation
STEP = 16  # lengths of batches are multiples of this
CUT, CUT_SHARE = 12, 0.75
SWAPPED = 0.08
REPEATED, REPEATED_TOKENS = (0.4, 0.06), 30_000_000  # share of repeated texts at the start, and after so many tokens
IGNORED = -100
Encoded = tuple[list[int], list[bool]]
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """Corpus, tokenizer and seed of the batches."""

    corpus: Corpus
    tokenizer: Tokenizer
    seed: int
    tokens: int  # per batch, padding included


def batches(source: Source, workers: int) -> Iterator[Batch]:
    """Yield padded batches of inputs and labels, shape [conversations, tokens], without end."""
    if not workers:
        for index in count():
            yield from map(_tensors, _pool(source, index))
    with multiprocessing.get_context("fork").Pool(workers, _start, (source,)) as pool:
        running = [pool.apply_async(_work, (index,)) for index in range(workers * 3)]
        for index in count(len(running)):
            ready = running.pop(0).get()
            running.append(pool.apply_async(_work, (index,)))
            yield from map(_tensors, ready)


_source: Source


def _start(source: Source) -> None:
    global _source
    _source = source
    torch.set_num_threads(1)


def _work(index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return _pool(_source, index)


def _tensors(arrays: tuple[np.ndarray, np.ndarray]) -> Batch:
    inputs, learned = (torch.from_numpy(array) for array in arrays)
    return inputs.long(), torch.where(learned, inputs.long(), IGNORED)


def _pool(source: Source, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw one pool; conversations of like length go together."""
    random = Random(source.seed * 1_000_003 + index)  # noqa: S311 - drawing text, not secrets
    start = min(1.0, index * POOL * 140 / REPEATED_TOKENS)
    share = REPEATED[0] + (REPEATED[1] - REPEATED[0]) * start
    pool = [_repeated(random) for _ in range(round(POOL * share))]
    pool += [_encoded(source.tokenizer, messages, random)
             for messages in islice(conversations(source.corpus, random), POOL - len(pool))]
    pool.sort(key=lambda pair: len(pair[0]))
    groups = []
    while pool:
        longest = -(-len(pool[-1][0]) // STEP) * STEP
        rows = max(1, source.tokens // longest)
        groups.append(_padded(pool[-rows:], longest))
        del pool[-rows:]
    random.shuffle(groups)
    return groups


def _encoded(tokenizer: Tokenizer, messages: list[Message], random: Random) -> Encoded:
    is_copied = (messages[-1].role == "assistant" and messages[-1].content.lstrip().startswith(
        (*vocabulary.TAGS, "{"))) or any(each.role == "tool" for each in messages)
    ids, learn = vocabulary.encode_chat(tokenizer, messages)
    if not is_copied:
        ids = _swapped(ids, learn, random)
        if random.random() < CUT_SHARE:
            answer = len(learn) - learn[::-1].index(False)
            ids, learn = ids[:answer + CUT], learn[:answer + CUT]
        if random.random() < 0.03:  # a bare answer, without a chat around it
            ids = [*tokenizer.encode(messages[-1].content).ids, vocabulary.SPECIAL.index(vocabulary.EOS)]
            learn = [False] + [True] * (len(ids) - 1)
    return ids[:LONGEST], learn[:LONGEST]


def _repeated(random: Random) -> Encoded:
    """Draw random tokens and a repetition of some of them, from which the model learns to copy.

    The repetition begins with a token that occurs once, since nothing else says where to copy from.
    """
    first_id = len(vocabulary.CONTROL)
    among = range(first_id, random.choice((first_id + 60, first_id + 200, vocabulary.SIZE)))
    ids = random.sample(among, random.randrange(6, 50))
    for _ in range(len(ids) // 4):  # repeated tokens, whose successor is ambiguous
        at = random.randrange(len(ids) // 2 + 1, len(ids))
        ids[at] = random.choice(ids)
    first = random.randrange(max(1, len(ids) // 2))
    again = ids[first:first + random.randrange(4, 40)]
    gap = random.choices(among, k=random.choice((0, 0, 3, 10)))
    before = [vocabulary.SPECIAL.index(vocabulary.BOS), *ids, *gap]
    return [*before, *again], [False] * (len(before) + 1) + [True] * (len(again) - 1)


def _swapped(ids: list[int], learn: list[bool], random: Random) -> list[int]:
    if random.random() < 0.5:
        return ids
    return [random.randrange(len(vocabulary.SPECIAL), vocabulary.SIZE)
            if not is_learned and one >= len(vocabulary.SPECIAL) and random.random() < SWAPPED else one
            for one, is_learned in zip(ids, learn, strict=True)]


def _padded(group: list[Encoded], longest: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.full((len(group), longest), vocabulary.SPECIAL.index(vocabulary.PAD), dtype=np.int16)
    learned = np.zeros((len(group), longest), dtype=bool)
    for row, (ids, learn) in enumerate(group):
        inputs[row, :len(ids)] = ids
        learned[row, :len(ids)] = learn
    return inputs, learned
