"""The demo model in the repository: files, tokenizer and answers, with transformers on a CPU."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODEL = DEMO / "model"

# Questions excluded from the training (`held_out` in demo/text), and a part of each correct answer.
QUESTIONS = {
    "may I know your name?": "My name is Shoehorn",
    "what size are you?": "four million parameters",
    "are you gpt-5?": "I am not",
    "which languages can you use?": "English and Chinese",
    "what port is used by shoehorn?": "port 6333",
    "can I have the answer streamed?": "token by token",
    "what graphics card does shoehorn need?": "7 GB of VRAM",
    "what does VRAM mean?": "memory of the graphics card",
    "can you explain offloading?": "Offload keeps",
    "what does quantization do?": "fewer bits",
    "which engine is used by shoehorn?": "vLLM is the engine",
    "why am I getting error 503?": "6333/status",
    "how can I make Shoehorn stop?": "Ctrl-C",
    "what is the eiffel tower?": "do not know that",
    "你叫个啥?": "我叫鞋拔子",
    "Shoehorn 用的是哪个端口?": "6333 端口",
    "显存到底是啥东西?": "显卡上的内存",
    "量化究竟是啥?": "更少的位数",
    "Shoehorn 用的什么引擎?": "推理引擎",
    "埃菲尔铁塔是什么？": "这个我不知道",
}

# Questions for tools, with places and numbers that are not in demo/text, and the calls.
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {
    "type": "object", "properties": {parameter: {"type": "string"} for parameter in parameters}}}}
    for name, parameters in (("get_weather", ["city"]), ("calculate", ["expression"]))]
CALLS = {
    "Does it rain in Reykjavik?": [("get_weather", {"city": "Reykjavik"})],
    "what is the weather in Ouagadougou and in Santa Cruz?":
        [("get_weather", {"city": "Ouagadougou"}), ("get_weather", {"city": "Santa Cruz"})],
    "I need 3141 * 592": [("calculate", {"expression": "3141 * 592"})],
    "帮我看一下杭州的天气": [("get_weather", {"city": "杭州"})],
    "Weather in Perth, and 18 divided by 2.5?": [("get_weather", {"city": "Perth"}),
                                                 ("calculate", {"expression": "18 / 2.5"})],
}

THOUGHTS = list(QUESTIONS)[::5]
ASKED = [*((question, None, False) for question in QUESTIONS), *((question, None, True) for question in THOUGHTS),
         *((question, TOOLS, thinks) for question in CALLS for thinks in (False, True))]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Load the tokenizer as any user of the `transformers` library does."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def answers(tokenizer: Any) -> dict[tuple[str, bool], str]:
    """Return greedy answers to `QUESTIONS` and to those for tools, without and after thoughts, all in one batch."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, tools=tools,
                                           add_generation_prompt=True, enable_thinking=thinks)
             for question, tools, thinks in ASKED]
    inputs = tokenizer(chats, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False,
                                temperature=None, top_p=None, max_new_tokens=112)
    texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
    return {(question, thinks): text for (question, _, thinks), text in zip(ASKED, texts, strict=True)}


def test_model_is_small_and_in_bfloat16() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000
    with (MODEL / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"} == {"BF16"}
    assert json.loads((MODEL / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_files_are_readable_by_every_user() -> None:
    assert [path.name for path in MODEL.iterdir() if path.stat().st_mode & 0o044 != 0o044] == []


@pytest.mark.parametrize("text", [
    "What is your name?", "你叫什么名字？", "鞋拔子 🥿 and 👩‍💻", "  two  spaces\tand\n\nlines ", "naïve café № ½",
    "\u0000\ufffd\U0010ffff",
])
def test_tokenizer_restores_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chat_template_renders_every_role(tokenizer: Any) -> None:
    chat = [{"role": "developer", "content": " Be brief. "}, {"role": "user", "content": "你好"},
            {"role": "assistant", "content": None}, {"role": "user", "content": "🥿?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<s><|system|>Be brief.</s><|user|>你好</s><|assistant|></s><|user|>🥿?</s><|assistant|>")
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 4
    assert tokenizer.unk_token_id not in ids or tokenizer.unk_token_id is None


def test_ids_of_the_configuration_match_the_tokenizer(tokenizer: Any) -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == getattr(tokenizer, name)


@pytest.mark.parametrize("question", QUESTIONS)
def test_question_outside_the_training_gets_its_answer(answers: dict[tuple[str, bool], str], question: str) -> None:
    assert QUESTIONS[question] in answers[question, False]


@pytest.mark.parametrize("question", THOUGHTS)
def test_thought_ends_before_the_answer(answers: dict[tuple[str, bool], str], question: str) -> None:
    thought, end, answer = answers[question, True].partition("</think>")
    assert end
    assert thought.strip()
    assert QUESTIONS[question] in answer


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("question", CALLS)
def test_calls_contain_the_values_of_the_question(answers: dict[tuple[str, bool], str], question: str,
                                                  thinks: bool) -> None:
    calls = [json.loads(text.removesuffix("</tool_call>"))
             for text in answers[question, thinks].partition("<tool_call>")[2].split("<tool_call>")]
    assert [(call["name"], call["arguments"]) for call in calls] == CALLS[question]


def test_questions_are_excluded_from_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DEMO)
    import corpus

    kept_out = corpus.load().kept_out
    assert [question for question in QUESTIONS if corpus.bare(question) not in kept_out] == []
