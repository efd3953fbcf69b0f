"""Tokenizer of the demo model: byte-level BPE trained on the corpus; any text round-trips.

Rules:
- the special tokens come first, in the order of SPECIAL; the model's config contains their ids too;
- a Chinese character is never merged with its neighbour, so unseen questions still consist of familiar tokens;
- tags of thoughts and calls are part of the text, so they are not skipped in it; control tokens are;
- a space belongs to the word after it only if that is a word of the corpus, and each digit is a token: a name or number
  has the same tokens after a space and after a quotation mark, so it can be copied;
- a chat is `<s>` and, per message, the token of its role, its text and `</s>`; the answer follows `<|assistant|>`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

from conversations import conversations
from corpus import Corpus
from message import Message
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SIZE = 2048  # a multiple of 64, to which engines pad the vocabulary and which tensor parallelism divides
PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, TOOLS, TOOL = CONTROL = (
    "<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tools|>", "<|tool|>")
THINK, END_THINK, CALL, END_CALL = TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SPECIAL = (*CONTROL, *TAGS)
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tools": TOOLS, "tool": TOOL}
_WORD = re.compile(r"[A-Za-z]+")
_CHINESE = r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]"
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
  {{- "<|tools|>" -}}
  {%- for tool in tools -%}
    {%- set parameters = (tool.function.parameters or {}) -%}
    {{- tool.function.name -}}({{- (parameters.required or parameters.properties or []) | join(",") -}})
    {%- if not loop.last -%};{%- endif -%}
  {%- endfor -%}
  {{- eos_token -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == "assistant" -%}{{- "<|assistant|>" -}}
  {%- elif message.role == "tool" -%}{{- "<|tool|>" -}}
  {%- elif message.role in ["system", "developer"] -%}{{- "<|system|>" -}}
  {%- else -%}{{- "<|user|>" -}}
  {%- endif -%}
  {{- (message.content or "") | trim -}}
  {%- for call in message.tool_calls or [] -%}
    {%- set arguments = call.function.arguments -%}
    {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
    {{- arguments if arguments is string else arguments | tojson -}}{{- "}</tool_call>" -}}
  {%- endfor -%}
  {{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}
  {%- if enable_thinking is defined and enable_thinking -%}{{- "<think>" -}}{%- endif -%}
{%- endif -%}
"""


def train(corpus: Corpus, random: Random) -> Tokenizer:
    """Learn the merges from conversations drawn like those for training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_pieces(corpus)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    source = conversations(corpus, random)
    texts = [message.content for _ in range(8000) for message in next(source)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if tokenizer.get_vocab_size() != SIZE:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {SIZE}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))])
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = token["content"] in CONTROL
    return Tokenizer.from_str(json.dumps(document))


def _pieces(corpus: Corpus) -> str:
    """Return the expression of what is never merged with its neighbours."""
    return (rf" ?(?:{_any_of(known_words(corpus))})(?![A-Za-z])|(?:(?!{_CHINESE})\p{{L}})+|[0-9]|"
            rf" ?(?:(?!{_CHINESE})[^\s\p{{L}}0-9])+|{_CHINESE}|\s")


def _any_of(words: list[str]) -> str:
    """Return an expression for any of the words, by their first letters, so that it is fast."""
    rests: dict[str, list[str]] = {}
    for each in words:
        rests.setdefault(each[:1], []).append(each[1:])
    return "|".join(letter + (f"(?:{_any_of(sorted(rest, reverse=True))})" if any(rest) else "") if letter else ""
                    for letter, rest in sorted(rests.items(), reverse=True))


def known_words(corpus: Corpus) -> list[str]:
    """Return the words of the answers and those of more than one question, which exclude names."""
    answers = Counter(word for topic in corpus.topics for word in _WORD.findall(topic.phrases["en"].answer))
    asked = Counter(word for topic in corpus.topics for pattern in topic.phrases["en"].ask
                    for word in set(_WORD.findall(pattern)) if word.islower())
    return sorted({*answers, *(word for word, count in asked.items() if count > 1)})


def encode_chat(tokenizer: Tokenizer, messages: list[Message], ask: bool = False, think: bool = False,
                ) -> tuple[list[int], list[bool]]:
    """Encode a chat like the chat template. Returns token ids, and for each whether the model learns it.

    Args:
        ask: end with the role token of the answer, as a request to the model does.
        think: and with the tag that opens a thought.
    """
    ids, learn = [SPECIAL.index(BOS)], [False]
    for message in messages:
        text = tokenizer.encode(message.content, add_special_tokens=False).ids
        ids += [SPECIAL.index(ROLES[message.role]), *text, SPECIAL.index(EOS)]
        learn += [False] + [message.role == "assistant"] * (len(text) + 1)
        if message.is_forced or text[:1] == [SPECIAL.index(THINK)]:  # the request opens the thought
            learn[-len(text) - 1] = False
    if ask:
        ids.append(SPECIAL.index(ASSISTANT))
        learn.append(False)
    if ask and think:
        ids.append(SPECIAL.index(THINK))
        learn.append(False)
    return ids, learn


def save(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, as old and new `transformers` read them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "bos_token": BOS, "eos_token": EOS,
                "additional_special_tokens": [SYSTEM, USER, ASSISTANT, TOOLS, TOOL], "model_max_length": longest,
                "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
