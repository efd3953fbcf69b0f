"""Score of the demo model on questions that it was not trained on.

Rules:
- greedy, in batches, with the weights as served;
- an answer is right if it equals the topic's answer exactly;
- each held-out question is asked alone, as a second turn, under a system message that was not used for training, and
  for a thought, whose text does not count;
- questions for tools have places that were not used for training, and are right if every call is, with its values;
- an answer with results is right if it contains them to the letter.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import corpus as corpus_module
import torch
import vocabulary
from conversations import tool_talk
from corpus import LANGUAGES, Corpus, held_out_questions
from message import Message
from tokenizers import Tokenizer
from tool_talk import held_out
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
    for way in ("alone", "second turn", "system message", "after a thought"):
        chats, expected = [], []
        for topic in corpus.topics:
            for language in LANGUAGES:
                for question in held_out_questions(topic.phrases[language]):
                    chats.append([*_before(way, corpus, random), Message("user", question)])
                    expected.append(topic.phrases[language].answer)
        answers = answer(model, tokenizer, chats, think=way == "after a thought")
        results[way] = _compared(chats, expected, [text.split(vocabulary.END_THINK)[-1] for text in answers])
    for kind, pairs in held_out(tool_talk(corpus)).items():
        chats, expected = map(list, zip(*pairs, strict=True))
        results[f"tools, {kind}"] = _compared(chats, expected, answer(model, tokenizer, chats))
        texts = answer(model, tokenizer, chats, think=True)
        results[f"tools, {kind} after a thought"] = _compared(
            chats, expected, [text.split(vocabulary.END_THINK)[-1] for text in texts])
    return results


def _compared(chats: list[list[Message]], expected: list[str], answers: list[str]) -> Result:
    result = Result(asked=len(chats))
    for chat, right, text in zip(chats, expected, answers, strict=True):
        if text == right:
            result.right += 1
        else:
            result.wrong.append(f"{chat[-1].content} -> {text[:100]}")
    return result


def report(results: dict[str, Result]) -> None:
    """Print a score, with a line for each wrong answer."""
    for name, result in results.items():
        print(f"held-out, {name}: {result.right} of {result.asked} right ({result.right / result.asked:.1%})")
        for wrong in result.wrong:
            print(f"  {wrong}")


def answer(model: LlamaForCausalLM, tokenizer: Tokenizer, chats: list[list[Message]], batch: int = 512, *,
           think: bool = False) -> list[str]:
    """Generate greedy answers to many chats.

    Args:
        think: ask for a thought before each answer.
    """
    prompts = [vocabulary.encode_chat(tokenizer, chat, ask=True, think=think)[0] for chat in chats]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    pad = vocabulary.SPECIAL.index(vocabulary.PAD)
    for start in range(0, len(order), batch):
        group = order[start:start + batch]
        longest = max(len(prompts[index]) for index in group)
        inputs = torch.tensor([[pad] * (longest - len(prompts[index])) + prompts[index] for index in group],
                              device=model.device)
        output = model.generate(inputs, attention_mask=inputs.ne(pad).long(), do_sample=False, temperature=None,
                                top_p=None, max_new_tokens=240)
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
