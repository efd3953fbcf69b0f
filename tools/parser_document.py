"""Generator of docs/parsers.md: formats of thoughts and tool calls, from the planner's tables."""

from __future__ import annotations

from shoehorn.planner.parser_table import MISTRAL_TOKENIZER, REASONING, TOOLS, Format

_INTRODUCTION = """# Thoughts and tool calls

vLLM separates a model's thoughts from its answer, and reads its tool calls, with a parser for each format. The plan
chooses both parsers: `shoehorn plan` prints `reasoning-parser` and `tool-call-parser` with the reason. The text of the
chat template decides, and what it renders for a short conversation with a tool; the architecture decides only between
families that write the same marks, the model's name never. Folders and renamed fine-tunes are treated alike.

| setting | value |
|---|---|
| `REASONING_PARSER`, `TOOL_CALL_PARSER` | `auto`, `off`, or a name of vLLM 0.32.0; checked before the download |
| `--reasoning-parser`, `--tool-call-parser` in `VLLM_EXTRA_ARGS` | override the settings; plugins may add names |
| `--chat-template FILE` in `VLLM_EXTRA_ARGS` | replaces the model's template, for the choice too |

Some models are published with a template that shows the model no tools (DeepSeek V3 and R1, Phi-4-mini); the source of
vLLM contains templates for them.

Without a parser nothing is dropped in silence: a request with tools is refused with status 400 on
`/v1/chat/completions`, `/v1/responses` and `/v1/messages`, and so is one that asks for thoughts (`reasoning_effort`,
`reasoning.effort`, `thinking`). The message contains the reason and the setting. `/v1/completions` takes neither. Tools
that the server would have to run (`web_search`) are refused, unless vLLM has a tool server.

Thoughts arrive in `reasoning` (chat), as an item of type `reasoning` (responses) or as a block of type `thinking`
(messages). `reasoning_effort`, `reasoning.effort` and `thinking` also set the variable of the chat template that
switches thoughts (`enable_thinking` or `thinking`). Structured output (`response_format`) applies to the answer only,
after the thoughts.

## Thoughts

The first row that matches counts.

"""
_HEADER = "| family | recognized by | parser |\n|---|---|---|\n"


def document() -> str:
    """Return the text of docs/parsers.md."""
    return (_INTRODUCTION + _HEADER + "".join(map(_row, REASONING)) + "\n## Tool calls\n\n" + _HEADER
            + "".join(map(_row, (MISTRAL_TOKENIZER, *TOOLS))))


def _row(row: Format) -> str:
    marks = [f"`{mark}`".replace("|", "\\|") for mark in row.marks]
    marks += [f"no `{mark}`".replace("|", "\\|") for mark in row.without]
    if row.architectures:
        marks.append(f"architecture {' or '.join(f'`{name}*`' for name in row.architectures)}")
    if row.thinking:
        marks.append(f"thoughts: {' or '.join(each.value for each in row.thinking)}")
    return f"| {row.family} | {', '.join(marks)} | {f'`{row.parser}`' if row.parser else 'none in vLLM'} |\n"
