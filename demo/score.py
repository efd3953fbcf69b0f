"""Score of the demo model on questions that it was not trained on.

Rules:
- greedy, in batches, with the weights as served;
- an answer is right if it equals the topic's answer exactly;
- each held-out question is asked alone, as a second turn, and under a system message that was not used for training.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import corpus as corpus_module
import torch
import vocabulary
from conversations import Message
from corpus import LANGUAGES, Corpus, held_out_questions
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM


@dataclass
class Result:
    """Result of one way of asking: number of questions, right answers, and a line per wrong answer."""

    asked: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)


def score(model: LlamaForCausalLM, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, Result]:
    """Ask every held-out question in each of the three ways."""
    random = Random(0)  # noqa: S311 - drawing text, not secrets
    results = {}
    for way in ("alone", "second turn", "system message"):
        chats, expected = [], []
        for topic in corpus.topics:
            for language in LANGUAGES:
                for question in held_out_questions(topic.phrases[language]):
                    chats.append([*_before(way, corpus, random), Message("user", question)])
                    expected.append(topic.phrases[language].answer)
        answers = answer(model, tokenizer, chats)
        result = results[way] = Result(asked=len(chats))
        for chat, right, text in zip(chats, expected, answers, strict=True):
            if text == right:
                result.right += 1
            else:
                result.wrong.append(f"{chat[-1].content} -> {text[:100]}")
    return results


def report(results: dict[str, Result]) -> None:
    """Print a score, with a line for each wrong answer."""
    for name, result in results.items():
        print(f"held-out, {name}: {result.right} of {result.asked} right ({result.right / result.asked:.1%})")
        for wrong in result.wrong:
            print(f"  {wrong}")


def answer(model: LlamaForCausalLM, tokenizer: Tokenizer, chats: list[list[Message]], batch: int = 64) -> list[str]:
    """Generate greedy answers to many chats."""
    prompts = [vocabulary.encode_chat(tokenizer, chat, ask=True)[0] for chat in chats]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    pad = vocabulary.SPECIAL.index(vocabulary.PAD)
    for start in range(0, len(order), batch):
        group = order[start:start + batch]
        longest = max(len(prompts[index]) for index in group)
        inputs = torch.tensor([[pad] * (longest - len(prompts[index])) + prompts[index] for index in group])
        output = model.generate(inputs, attention_mask=inputs.ne(pad).long(), do_sample=False, temperature=None,
                                top_p=None, max_new_tokens=200)
        for index, row in zip(group, output, strict=True):
            answers[index] = tokenizer.decode(row[longest:].tolist(), skip_special_tokens=True)
    return answers


def _before(way: str, corpus: Corpus, random: Random) -> list[Message]:
    language = random.choice(LANGUAGES)
    if way == "second turn":
        phrases = random.choice(corpus.topics).phrases[language]
        return [Message("user", random.choice(held_out_questions(phrases))), Message("assistant", phrases.answer)]
    if way == "system message":
        return [Message("system", random.choice(corpus.around[language].held_out_systems))]
    return []


def main() -> None:
    """Print the score of a saved model: `python demo/score.py demo/model`."""
    parser = argparse.ArgumentParser(description=(main.__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder that train.py wrote")
    folder = parser.parse_args().model
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    report(score(model, tokenizer, corpus_module.load()))


if __name__ == "__main__":
    main()
