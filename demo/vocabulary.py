"""Tokenizer of the demo model: byte-level BPE trained on the corpus; any text round-trips.

Rules:
- the special tokens come first, in the order of SPECIAL; the model's config contains their ids too;
- a Chinese character is never merged with its neighbour, so unseen questions still consist of familiar tokens;
- a chat is `<s>` and, per message, the token of its role, its text and `</s>`; the answer follows `<|assistant|>`.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from conversations import Message, conversations
from corpus import Corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SIZE = 2048  # a multiple of 64, to which engines pad the vocabulary and which tensor parallelism divides
PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
_CHINESE = Regex(r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]")
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == "assistant" -%}{{- "<|assistant|>" -}}
  {%- elif message.role in ["system", "developer"] -%}{{- "<|system|>" -}}
  {%- else -%}{{- "<|user|>" -}}
  {%- endif -%}
  {{- (message.content or "") | trim -}}{{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""


def train(corpus: Corpus, random: Random) -> Tokenizer:
    """Learn the merges from conversations drawn like those for training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(_CHINESE, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
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
    return tokenizer


def encode_chat(tokenizer: Tokenizer, messages: list[Message], ask: bool = False) -> tuple[list[int], list[bool]]:
    """Encode a chat like the chat template. Returns token ids, and for each whether the model learns it.

    Args:
        ask: end with the role token of the answer, as a request to the model does.
    """
    ids, learn = [SPECIAL.index(BOS)], [False]
    for message in messages:
        text = tokenizer.encode(message.content, add_special_tokens=False).ids
        ids += [SPECIAL.index(ROLES[message.role]), *text, SPECIAL.index(EOS)]
        learn += [False] + [message.role == "assistant"] * (len(text) + 1)
    if ask:
        ids.append(SPECIAL.index(ASSISTANT))
        learn.append(False)
    return ids, learn


def save(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, as old and new `transformers` read them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "bos_token": BOS, "eos_token": EOS,
                "additional_special_tokens": [SYSTEM, USER, ASSISTANT], "model_max_length": longest,
                "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
