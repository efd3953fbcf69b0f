"""Tables of the formats in which models write thoughts and tool calls, and vLLM's parser of each.

Rules:
- the first row that matches counts: rows with marks of one family come before those of formats that several share;
- a mark is a text of the chat template; a name of a model decides nothing, and the architecture only where two families
  write the same marks;
- a family whose format no parser of vLLM reads has a row without a parser, so that no similar format is taken for it.

Sources: vLLM 0.32.0, vllm/reasoning, vllm/tool_parsers and vllm/parser (tokens and grammars); the published chat
templates of the families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoehorn.model.chat_format import ChatFormat, Thinking


@dataclass(frozen=True)
class Format:
    """One row: a format, how it is recognized, and its parser.

    Attributes:
        parser: name in vLLM's registry; "" where vLLM has none.
        marks: texts that the chat template contains, all of them.
        without: texts that it does not contain.
        architectures: beginnings of the architecture's name, one of which matches; none: any architecture.
        thinking: when the template makes the model think; none: any.
        own_template: the engine writes the prompt itself, so no chat template is needed.
    """

    family: str
    parser: str
    marks: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    thinking: tuple[Thinking, ...] = ()
    own_template: bool = False

    def matches(self, architecture: str, chat: ChatFormat) -> bool:
        """Return whether a model writes this format."""
        return (all(mark in chat.text for mark in self.marks)
                and not any(mark in chat.text for mark in self.without)
                and (not self.architectures or architecture.startswith(self.architectures))
                and (not self.thinking or chat.thinking in self.thinking)
                and (bool(chat.text) or self.own_template))

    @property
    def evidence(self) -> str:
        """Mark that identifies the format, as a phrase."""
        return f"the chat template contains {self.marks[0]}" if self.marks else \
            f"the architecture is {self.architectures[0]}" if self.architectures else "the chat template opens thoughts"


_HUNYUAN, _ERNIE, _GRANITE = ("HunYuan",), ("Ernie4_5",), ("Granite",)
_MISTRAL = ("Mistral", "Mixtral", "Ministral", "Pixtral", "Voxtral")
_THINKS = (Thinking.ALWAYS, Thinking.ON, Thinking.OFF)
_BY_DEFAULT = (Thinking.ALWAYS, Thinking.ON)

REASONING = (
    Format("gpt-oss (harmony)", "openai_gptoss", architectures=("GptOss",), own_template=True),
    Format("gpt-oss (harmony)", "openai_gptoss", ("<|channel|>analysis",)),
    Format("DeepSeek V4.1", "deepseek_v41", architectures=("DeepseekV41",), own_template=True),
    Format("DeepSeek V4", "deepseek_v4", architectures=("DeepseekV4",), own_template=True),
    Format("DeepSeek V3.2", "deepseek_v3", architectures=("DeepseekV32",), own_template=True),
    Format("Mistral and Magistral", "mistral", ("[THINK]",)),
    Format("Magistral (tokens of version 11)", "mistral", ("<think>", "[INST]"), architectures=_MISTRAL),
    Format("Seed-OSS", "seed_oss", ("<seed:think>",)),
    Format("MiniMax M3", "minimax_m3", ("<mm:think>",)),
    Format("Command 4", "cohere_command4", ("<|START_THINKING|>", "<|START_TEXT|>")),
    Format("Command A Reasoning and Command R7B", "cohere_command3", ("<|START_THINKING|>",)),
    Format("Gemma 4", "gemma4", ("<|channel>",)),
    Format("K2 Horizon", "k2_horizon", ("<ifm|think>",)),
    Format("Kimi K3", "kimi_k3", ("<|open|>", "<|sep|>")),
    Format("Inkling", "inkling", ("<|content_thinking|>",)),
    Format("PLaMo 3", "plamo3", ("<|plamo:begin_think:plamo|>",)),
    Format("Muse Glimmer", "muse_glimmer", ("<atem:function_calls>",)),
    Format("Kimi-VL Thinking", "", ("◁think▷",)),
    Format("Granite 3.2", "granite", ("Here is my thought process:",)),
    Format("Granite 4.2", "granite_thinking_parser", ("<think>",), architectures=_GRANITE, thinking=_BY_DEFAULT),
    Format("MiniMax M2", "minimax_m2", ("<minimax:tool_call>", "<think>")),
    Format("Laguna", "poolside_v1", ("<think>", "<assistant>")),
    Format("Ling 3", "ling3", ("<think>", "<arg_key>"), architectures=("BailingMoe",)),
    Format("HY 3", "hy_v3", ("<think",), architectures=("HYV3",)),
    Format("HY 4", "hy_v4", ("<think",), architectures=("HYV4",)),
    Format("Hunyuan A13B and dense", "hunyuan_a13b", ("<think>",), architectures=_HUNYUAN),
    Format("ERNIE 4.5 Thinking", "ernie45", ("<think>",), architectures=_ERNIE, thinking=_THINKS),
    Format("GLM 4.5 to 5", "glm45", ("<think>", "<arg_key>")),
    Format("Kimi K2 Thinking", "kimi_k2", ("<think>", "<|tool_calls_section_begin|>")),
    Format("Step 3.5", "step3p5", ("<think>",), architectures=("Step3p5",)),
    Format("Step 3", "step3", ("<think>",), architectures=("Step3",)),
    Format("MiMo V2", "mimo", ("<think>",), architectures=("MiMoV2",)),
    Format("Nemotron 3", "nemotron_v3", ("<think>", "<function="), architectures=("NemotronH",)),
    Format("OLMo 3 Think", "olmo3", ("<think>",), architectures=("Olmo",), thinking=_THINKS),
    Format("MiniCPM-V", "minicpmv", ("<think>",), architectures=("MiniCPMV", "MiniCPMO"), thinking=_THINKS),
    Format("DeepSeek R1 and its distills", "deepseek_r1", ("<｜Assistant｜>", "</think>"),
           thinking=(Thinking.ALWAYS, Thinking.NEVER)),
    Format("thoughts unless switched off (Qwen3, Qwen3.5, SmolLM3)", "qwen3", ("<think>",), thinking=(Thinking.ON,)),
    Format("thoughts when asked for (DeepSeek V3.1, Hermes 4, EXAONE 4)", "deepseek_v3", ("<think>",),
           thinking=(Thinking.OFF,)),
    Format("always thoughts (QwQ, Qwen3 Thinking, Phi-4 Reasoning)", "deepseek_r1", ("<think>",),
           thinking=(Thinking.ALWAYS,)),
)
"""Formats of thoughts."""

TOOLS = (
    Format("gpt-oss (harmony)", "openai", architectures=("GptOss",), own_template=True),
    Format("DeepSeek V4.1", "deepseek_v41", architectures=("DeepseekV41",), own_template=True),
    Format("DeepSeek V4", "deepseek_v4", architectures=("DeepseekV4",), own_template=True),
    Format("DeepSeek V3.2", "deepseek_v32", architectures=("DeepseekV32",), own_template=True),
    Format("DeepSeek V3.2", "deepseek_v32", ("<｜DSML｜",)),
    Format("DeepSeek V3 and R1", "deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    Format("DeepSeek V3.1", "deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    Format("Step 3", "step3", ("<｜tool_calls_begin｜>",)),
    Format("Kimi K2", "kimi_k2", ("<|tool_calls_section_begin|>",)),
    Format("Kimi K3", "kimi_k3", ("<|open|>", "<|sep|>")),
    Format("MiniMax M2", "minimax_m2", ("<minimax:tool_call>",)),
    Format("MiniMax M3", "minimax_m3", ("<mm:think>",)),
    Format("Seed-OSS", "seed_oss", ("<seed:tool_call>",)),
    Format("K2 Horizon", "k2_horizon", ("<ifm|tool_calls>",)),
    Format("Gemma 4", "gemma4", ("<|tool_call>",)),
    Format("FunctionGemma", "functiongemma", ("<start_function_call>",)),
    Format("LFM2", "lfm2", ("<|tool_call_start|>",)),
    Format("Apertus", "apertus", ("<|tools_prefix|>",)),
    Format("LongCat", "longcat", ("<longcat_tool_call>",)),
    Format("dots", "dots", ("<dots_function_call>",)),
    Format("GigaChat 3", "gigachat3", ("function call<|role_sep|>",)),
    Format("GigaChat 3.5", "gigachat3", ("<|function_call|>",)),
    Format("Inkling", "inkling", ("<|content_tool",)),
    Format("PLaMo 3", "plamo3", ("<|plamo:",)),
    Format("Muse Glimmer", "muse_glimmer", ("<atem:function_calls>",)),
    Format("Command 4", "cohere_command4", ("<|START_ACTION|>", "<|START_TEXT|>")),
    Format("Command A and Command R7B", "cohere_command3", ("<|START_ACTION|>",)),
    Format("InternLM", "internlm", ("<|action_start|>", "<|plugin|>")),
    Format("Mistral", "mistral", ("[TOOL_CALLS]",)),
    Format("OLMo 3", "olmo3", ("<function_calls>",)),
    Format("MiniCPM 5", "minicpm5", ("<function name=", "<param name=")),
    Format("Phi-4-mini", "phi4_mini_json", ("functools",)),
    Format("xLAM", "xlam", ("tool_call_name",)),
    Format("Nemotron Nano 2 and Llama-Nemotron", "", ("<TOOLCALL>",)),
    Format("Laguna", "poolside_v1", ("<arg_key>", "<assistant>")),
    Format("Ling 3", "ling3", ("<arg_key>",), architectures=("BailingMoe",)),
    Format("HY 3", "hy_v3", ("<tool_call",), architectures=("HYV3",)),
    Format("HY 4", "hy_v4", ("<tool_call",), architectures=("HYV4",)),
    Format("GLM 4.7 and 5", "glm47", ("<arg_key>", "{function-name}<arg_key>")),
    Format("GLM 4.5 and 4.6", "glm45", ("<arg_key>", "<arg_value>")),
    Format("Step 3.5", "step3p5", ("<function=",), architectures=("Step3p5",)),
    Format("MiMo V2", "mimo", ("<function=",), architectures=("MiMoV2",)),
    Format("Qwen3-Coder, Qwen3.5 and Nemotron 3", "qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    Format("Hunyuan", "hunyuan_a13b", ("<tool_calls>",), architectures=_HUNYUAN),
    Format("Jamba", "jamba", ("<tool_calls>",)),
    Format("ERNIE 4.5", "ernie45", ("<tool_call>",), architectures=_ERNIE),
    Format("Granite 4", "granite4", ("<tool_call>", "<|start_of_role|>"), without=("<|tool_call|>",)),
    Format("Granite 3", "granite", ("<|tool_call|>", "<|start_of_role|>")),
    Format("Granite 20B", "granite-20b-fc", ("<function_call>",)),
    Format("Hermes (Hermes 2 to 4, Qwen2.5, Qwen3, SmolLM3)", "hermes", ("<tool_call>", "</tool_call>")),
    Format("Llama 4 (calls in Python's form)", "llama4_pythonic", ("<|header_start|>", "[func_name1(")),
    Format("Llama 4 (calls in JSON)", "llama4_json", ("<|header_start|>", "dictionary of argument name")),
    Format("calls in Python's form (Llama 3.2, ToolACE, Gemma 3)", "pythonic", ("[func_name1(",)),
    Format("Llama 3.1 to 3.3", "llama3_json", ("<|start_header_id|>", "dictionary of argument name")),
)
"""Formats of tool calls."""

MISTRAL_TOKENIZER = Format("Mistral (its own tokenizer)", "mistral", architectures=_MISTRAL, own_template=True)
"""Row of models whose tokenizer, not a chat template, writes the prompt."""

OFF_BY_DEFAULT = frozenset({"deepseek_v3", "poolside_v1"})
"""Parsers that separate thoughts of <think> tags only where a request switches them on."""

REASONING_TOKENS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("deepseek_r1", "deepseek_v3", "ernie45", "holo2"), ("<think>", "</think>")),
    "step3": ("</think>",), "minimax_m3": ("<mm:think>", "</mm:think>"), "mistral": ("[TOOL_CALLS]",),
    "k2_horizon": ("<ifm|think>", "</ifm|think>"), "poolside_v1": ("<assistant>", "<think>", "</think>")}
"""Tokens that must be in the vocabulary, by parser of thoughts; without them the engine does not start, or fails each
request that thinks (`OFF_BY_DEFAULT`). The tokens of HY end in a suffix of their own, and are not checked."""

TOOL_TOKENS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v31"), ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")),
    "jamba": ("<tool_calls>", "</tool_calls>"), "lfm2": ("<|tool_call_start|>", "<|tool_call_end|>"),
    **dict.fromkeys(("llama3_json", "llama4_json"), ("<|python_tag|>",)), "mistral": ("[TOOL_CALLS]",)}
"""The same by parser of tool calls."""
