"""Invented chat templates: each has the marks of one published family, and thinks and shows tools as it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from shoehorn.model import chat_format
from shoehorn.model.chat_format import STRUCTURAL_TOKENS, ChatFormat


class MemoryFiles:
    """Files of a checkpoint in memory."""

    def __init__(self, **texts: str) -> None:
        self._texts = {name.replace("__", "."): text.encode() for name, text in texts.items()}

    def names(self) -> Mapping[str, int]:
        """Return the size in bytes by file name."""
        return {name: len(text) for name, text in self._texts.items()}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read up to `length` bytes from `start`; all if None."""
        return self._texts[name][start:None if length is None else start + length]


NEVER = "<|assistant|>"
ALWAYS = "<|assistant|><think>\n"
ON = "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
OFF = "<|assistant|>{% if thinking is defined and thinking %}<think>\n{% else %}</think>{% endif %}"


def template(call: str = "", prompt: str = NEVER, history: str = "") -> str:
    """Return a template.

    Args:
        call: instruction how to call a tool; "" shows no tools.
        prompt: end of the prompt.
        history: text in a branch that no conversation without tool calls takes.
    """
    def literal(text: str) -> str:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"

    tools = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + literal(call) + "{% endif %}"
    return ((tools if call else "") + "{% for message in messages %}{% if message.tool_calls %}" + literal(history)
            + "{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}"
            + prompt + "{% endif %}")


def read(text: str, tokens: tuple[str, ...] = STRUCTURAL_TOKENS, **files: str) -> ChatFormat:
    """Read the format of a checkpoint with this template and these tokens."""
    added = {str(number): {"content": token} for number, token in enumerate(tokens)}
    own = {"chat_template__jinja": text} if text else {}
    return chat_format.read(MemoryFiles(
        **own, tokenizer_config__json=json.dumps({"added_tokens_decoder": added, "bos_token": "<s>"}), **files))


@dataclass(frozen=True)
class Case:
    """One family: its architecture and template, and the parsers to expect, "" for none."""

    architecture: str
    template: str
    reasoning: str
    tools: str


HERMES = '<tool_call>\n{"name": <function-name>, "arguments": <args>}\n</tool_call>'
CODER = "<tool_call>\n<function=f>\n<parameter=p>\nv\n</parameter>\n</function>\n</tool_call>"
XML = "<tool_call>{function-name}\n<arg_key>k</arg_key>\n<arg_value>v</arg_value>\n</tool_call>"
R1 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```"
V31 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}"
LLAMA = '<|start_header_id|>{"name": function name, "parameters": dictionary of argument name and its value}'

CASES = {
    "Qwen2.5": Case("Qwen2ForCausalLM", template(HERMES), "", "hermes"),
    "QwQ": Case("Qwen2ForCausalLM", template(HERMES, ALWAYS), "deepseek_r1", "hermes"),
    "R1 distill of Qwen2": Case("Qwen2ForCausalLM", template("", "<｜Assistant｜><think>\n", R1 + "</think>"),
                                "deepseek_r1", ""),
    "R1 distill of Llama": Case("LlamaForCausalLM", template("", "<｜Assistant｜><think>\n", R1 + "</think>"),
                                "deepseek_r1", ""),
    "R1 distill, first revision": Case("LlamaForCausalLM", template("", "<｜Assistant｜>", R1 + "</think>"),
                                       "deepseek_r1", ""),
    "DeepSeek V3 with tools": Case("DeepseekV3ForCausalLM", template(R1, "<｜Assistant｜>"), "", "deepseek_v3"),
    "DeepSeek R1 with tools": Case("DeepseekV3ForCausalLM", template(R1, "<｜Assistant｜><think>\n", "</think>"),
                                   "deepseek_r1", "deepseek_v3"),
    "DeepSeek V3.1": Case("DeepseekV3ForCausalLM", template(V31, OFF.replace("<|assistant|>", "<｜Assistant｜>")),
                          "deepseek_v3", "deepseek_v31"),
    "DeepSeek V3.2": Case("DeepseekV32ForCausalLM", "", "deepseek_v3", "deepseek_v32"),
    "DeepSeek V4": Case("DeepseekV4ForCausalLM", "", "deepseek_v4", "deepseek_v4"),
    "Qwen3": Case("Qwen3ForCausalLM", template(HERMES, ON, "</think>"), "qwen3", "hermes"),
    "Qwen3 Instruct 2507": Case("Qwen3MoeForCausalLM", template(HERMES, NEVER, "</think>"), "", "hermes"),
    "Qwen3 Thinking 2507": Case("Qwen3MoeForCausalLM", template(HERMES, ALWAYS, "</think>"), "deepseek_r1", "hermes"),
    "Qwen3-Coder": Case("Qwen3MoeForCausalLM", template(CODER), "", "qwen3_coder"),
    "Qwen3.5": Case("Qwen3_5ForConditionalGeneration", template(CODER, ON), "qwen3", "qwen3_coder"),
    "Llama 3.1": Case("LlamaForCausalLM", template(LLAMA + "<|python_tag|>"), "", "llama3_json"),
    "Llama 3.2 in Python's form": Case("LlamaForCausalLM", template("[func_name1(params_name1=params_value1)]"), "",
                                       "pythonic"),
    "Llama 4 in Python's form": Case("Llama4ForConditionalGeneration", template(
        "<|header_start|>[func_name1(param1=value1)]"), "", "llama4_pythonic"),
    "Llama 4 in JSON": Case("Llama4ForConditionalGeneration", template(
        LLAMA.replace("start_header_id", "header_start")), "", "llama4_json"),
    "Hermes 3 of Llama": Case("LlamaForCausalLM", template(HERMES), "", "hermes"),
    "Hermes 4 of Llama": Case("LlamaForCausalLM", template(HERMES, OFF), "deepseek_v3", "hermes"),
    "Mistral 7B v0.3": Case("MistralForCausalLM", template("[AVAILABLE_TOOLS]", NEVER, "[TOOL_CALLS]"), "", "mistral"),
    "Mistral 7B v0.1": Case("MistralForCausalLM", template(), "", ""),
    "Magistral": Case("MistralForCausalLM", template("[TOOL_CALLS]", "[THINK]{#[/THINK]#}"), "mistral", "mistral"),
    "gpt-oss": Case("GptOssForCausalLM", template("", "<|start|>assistant"), "openai_gptoss", "openai"),
    "Granite 3.2": Case("GraniteForCausalLM", template(
        "<|start_of_role|><|tool_call|>", "{% if thinking %}Here is my thought process:{% endif %}"), "granite",
        "granite"),
    "Granite 3.3": Case("GraniteForCausalLM", template("<|start_of_role|><|tool_call|>", OFF), "deepseek_v3",
                        "granite"),
    "Granite 4": Case("GraniteMoeHybridForCausalLM", template("<|start_of_role|>" + HERMES), "", "granite4"),
    "Granite 20B": Case("GPTBigCodeForCausalLM", template("<function_call> {}"), "", "granite-20b-fc"),
    "GLM 4.5": Case("Glm4MoeForCausalLM", template(XML, ON), "glm45", "glm45"),
    "GLM 4.7": Case("Glm4MoeForCausalLM", template(XML.replace("name}\n", "name}"), ON), "glm45", "glm47"),
    "Laguna": Case("LagunaForCausalLM", template(XML, "<assistant>" + ON), "poolside_v1", "poolside_v1"),
    "Ling 3": Case("BailingMoeV3ForCausalLM", template(XML, ON), "ling3", "ling3"),
    "Kimi K2": Case("DeepseekV3ForCausalLM", template("<|tool_calls_section_begin|>"), "", "kimi_k2"),
    "Kimi K2 Thinking": Case("DeepseekV3ForCausalLM", template("<|tool_calls_section_begin|>", NEVER, "<think>"),
                             "kimi_k2", "kimi_k2"),
    "MiniMax M2": Case("MiniMaxM2ForCausalLM", template("<minimax:tool_call>", ALWAYS), "minimax_m2", "minimax_m2"),
    "MiniMax M3": Case("MiniMaxM3SparseForCausalLM", template("<mm:think>", NEVER), "minimax_m3", "minimax_m3"),
    "Phi-4": Case("Phi3ForCausalLM", template(), "", ""),
    "Phi-4-mini with vLLM's template": Case("Phi3ForCausalLM", template("functools[]"), "", "phi4_mini_json"),
    "Phi-4-mini as published": Case("Phi3ForCausalLM", template().replace(
        "{{ message.role }}", "{% if message.tools %}<|tool|>{% endif %}{{ message.role }}"), "", ""),
    "Phi-4 Reasoning": Case("Phi3ForCausalLM", "Answer as <think> thought </think> solution." + template(),
                            "deepseek_r1", ""),
    "ERNIE 4.5 Thinking": Case("Ernie4_5_MoeForCausalLM", template(HERMES, ALWAYS), "ernie45", "ernie45"),
    "Hunyuan A13B": Case("HunYuanMoEV1ForCausalLM", template("<tool_calls>[]</tool_calls>", ON), "hunyuan_a13b",
                         "hunyuan_a13b"),
    "Seed-OSS": Case("SeedOssForCausalLM", template("<seed:tool_call><function=", "<seed:think>"), "seed_oss",
                     "seed_oss"),
    "InternLM 2.5": Case("InternLM2ForCausalLM", template("<|action_start|><|plugin|>"), "", "internlm"),
    "Jamba": Case("JambaForCausalLM", template("<tool_calls>[]</tool_calls>"), "", "jamba"),
    "Nemotron 3 Nano": Case("NemotronHForCausalLM", template(CODER, ON), "nemotron_v3", "qwen3_coder"),
    "Nemotron Nano 2": Case("NemotronHForCausalLM", template("<TOOLCALL>[]</TOOLCALL>", ALWAYS), "deepseek_r1", ""),
    "MiMo V2": Case("MiMoV2FlashForCausalLM", template(CODER, ON), "mimo", "mimo"),
    "MiMo 7B": Case("MiMoForCausalLM", template(HERMES, ON), "qwen3", "hermes"),
    "Step 3": Case("Step3VLForConditionalGeneration", template("<｜tool_calls_begin｜>", ALWAYS), "step3", "step3"),
    "Step 3.5": Case("Step3p5ForCausalLM", template(CODER, ALWAYS), "step3p5", "step3p5"),
    "Command R7B": Case("Cohere2ForCausalLM", template("<|START_THINKING|><|START_ACTION|>"), "cohere_command3",
                        "cohere_command3"),
    "Command 4": Case("Cohere2MoeForCausalLM", template("<|START_THINKING|><|START_ACTION|><|START_TEXT|>"),
                      "cohere_command4", "cohere_command4"),
    "OLMo 3 Think": Case("Olmo3ForCausalLM", template("<function_calls>", ALWAYS), "olmo3", "olmo3"),
    "OLMo 3 Instruct": Case("Olmo3ForCausalLM", template("<function_calls>"), "", "olmo3"),
    "xLAM 2 of Llama": Case("LlamaForCausalLM", template('[{"name": "tool_call_name", "arguments": {}}]'), "", "xlam"),
    "FunctionGemma": Case("Gemma3ForCausalLM", template("<start_function_call>"), "", "functiongemma"),
    "Gemma 3": Case("Gemma3ForConditionalGeneration", template(), "", ""),
    "Gemma 4": Case("Gemma4ForConditionalGeneration", template("<|tool_call>", "<|channel>"), "gemma4", "gemma4"),
    "LFM2": Case("Lfm2ForCausalLM", template("<|tool_call_start|>"), "", "lfm2"),
    "Apertus": Case("ApertusForCausalLM", template("<|tools_prefix|>"), "", "apertus"),
    "LongCat": Case("LongcatFlashForCausalLM", template("<longcat_tool_call>"), "", "longcat"),
    "GigaChat 3": Case("DeepseekV3ForCausalLM", template("function call<|role_sep|>"), "", "gigachat3"),
    "SmolLM3": Case("SmolLM3ForCausalLM", template(HERMES, ON), "qwen3", "hermes"),
    "SmolLM2": Case("LlamaForCausalLM", template(), "", ""),
    "EXAONE 4": Case("Exaone4ForCausalLM", template(HERMES, OFF.replace("thinking", "enable_thinking")), "deepseek_v3",
                     "hermes"),
    "Kimi-VL Thinking": Case("KimiVLForConditionalGeneration", template("", "◁think▷"), "", ""),
    "no template": Case("LlamaForCausalLM", "", "", ""),
    "unknown format of tools": Case("LlamaForCausalLM", template("Say CALL name(arguments)."), "", ""),
}
"""Families by name."""
