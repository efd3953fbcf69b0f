"""Diagnosis of an engine exit: its log lines -> cause and remedy.

Rules:
- the first matching line counts, because the engine repeats and wraps its first failure;
- the cause carries the engine's own message (`root_cause`), never a traceback or the last lines of the log;
- a start that ended by an exception which only the configuration or the model can have caused is `final`: the same
  start would fail the same way. A row is `memory` if a start that needs less GPU memory could succeed.
Source of the texts: vLLM 0.32.0 (vllm/v1/core/kv_cache_utils.py, vllm/v1/worker/utils.py, vllm/v1/engine/core.py)
and torch 2.13.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoehorn.common.units import GIB, MIB
from shoehorn.engine.root_cause import RootCause, find_root_cause


@dataclass(frozen=True)
class Diagnosis:
    """A failure of the engine.

    Attributes:
        name: stable code, for metrics.
        final: the same start would fail the same way, so it is not retried.
        memory: a start that needs less GPU memory could succeed.
        missing_bytes: GPU memory that was missing, as the engine reports it; 0 if unknown.
        cache_made: the KV cache was allocated already.
        limits: values of vLLM options, as the engine's message gives them, with which the start can succeed.
    """

    name: str
    cause: str
    remedy: str
    final: bool
    memory: bool = False
    missing_bytes: int = 0
    cache_made: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    """A failure by its message.

    Attributes:
        limited: option whose value the message gives, which replaces `{limit}` in the remedy; such rows are tried
            first, since the engine wraps their messages in more general ones.
    """

    name: str
    pattern: re.Pattern[str]
    cause: str
    remedy: str
    final: bool = True
    memory: bool = False
    limited: str = ""


_BAD_ARGUMENT = _Row(
    "bad_engine_argument", re.compile(r"error: (unrecognized arguments|argument )|validation errors? for \w+Config"),
    "vLLM option: invalid or unknown.",
    "Correct the option that the message names: in VLLM_EXTRA_ARGS, a setting or the profile.")
"""The last row: a more specific one may match the same failure."""

_ROWS = (
    _Row("context_exceeds_kv_cache", re.compile(r"To serve at least one request with the model's max seq len"),
         "KV cache: too small for one request of MAX_MODEL_LEN tokens.",
         "Set MAX_MODEL_LEN to {limit} or less.", memory=True, limited="max-model-len"),
    _Row("sequences_exceed_kv_cache", re.compile(r"max_num_seqs \(\d+\) exceeds available Mamba cache blocks"),
         "KV cache: fewer blocks than sequences, each of which needs a block for its states.",
         "Set MAX_NUM_SEQS to {limit} or less, or raise VRAM_LIMIT.", limited="max-num-seqs"),
    _Row("context_exceeds_model", re.compile(r"User-specified max_model_len \(\d+\) is greater than the derived"),
         "MAX_MODEL_LEN: exceeds the model's limit.", "Set MAX_MODEL_LEN to {limit} or less.",
         limited="max-model-len"),
    _Row("batch_too_small", re.compile(r"max_tokens_per_mm_item \(\d+\) is larger than max_num_batched_tokens|"
                                       r"max_num_batched_tokens \(\d+\) must be greater than or equal to"),
         "Batch: fewer tokens than one image or one token per sequence.",
         "Set VLLM_EXTRA_ARGS='--max-num-batched-tokens {limit}' or more.", limited="max-num-batched-tokens"),
    _Row("no_kv_cache_memory", re.compile(r"No available memory for the cache blocks"),
         "KV cache: no GPU memory left after the weights.",
         "Choose a smaller model, raise VRAM_LIMIT, or offload more: VLLM_EXTRA_ARGS='--cpu-offload-gb N'.",
         memory=True),
    _Row("gpu_in_use", re.compile(r"Free memory on device .* is less than desired GPU memory utilization"),
         "GPU memory: another process uses part of what the plan needs.",
         "Terminate the other process (`nvidia-smi` names it), or set VRAM_LIMIT to the free memory.", memory=True),
    _Row("gpu_out_of_memory", re.compile(r"CUDA out of memory|torch\.OutOfMemoryError|not enough GPU memory|"
                                           r"\"aten::empty\".*API call failed"),  # message of vLLM's own kernels
         "GPU: out of memory while the engine started.",
         "Lower MAX_MODEL_LEN or MAX_NUM_SEQS, or offload more: VLLM_EXTRA_ARGS='--cpu-offload-gb N'.", memory=True),
    _Row("offload_undone", re.compile(r"Offloaded weights: .*(are there: the engine's kernels|had no effect)"),
         "Offloaded weights: on the GPU although they were planned in host memory.",
         "Remove your own --moe-backend, --offload-backend, --cpu-offload-params and --additional-config from "
         "VLLM_EXTRA_ARGS and the profile."),
    _Row("host_out_of_memory", re.compile(r"DefaultCPUAllocator: can.t allocate memory|MemoryError\b"),
         "Host: out of memory while the engine started.",
         "Raise the container's memory limit, or offload less: VLLM_EXTRA_ARGS='--cpu-offload-gb N'."),
    _Row("unsupported_model", re.compile(r"Model architectures \[.*\] are not supported|"
                                         r"does not recognize this architecture"),
         "Model: unsupported architecture.",
         "Choose another MODEL_ID; the engine's message above names the architecture."),
    _Row("bad_parser", re.compile(r"invalid (tool call|reasoning) parser|(Reasoning|Tool) parser '.*' not found"),
         "Parser: unknown to the engine.",
         "Set REASONING_PARSER or TOOL_CALL_PARSER to auto, off or a name of docs/parsers.md."),
    _Row("remote_code_required", re.compile(r"trust_remote_code=True|contains custom code which must be executed"),
         "Model: requires code from its repository.",
         "Set TRUST_REMOTE_CODE=yes if you trust its author, or choose another MODEL_ID."),
    _Row("missing_tokenizer", re.compile(r"Can't load tokenizer|Couldn't instantiate the backend tokenizer|"
                                         r"Unable to load vocabulary|tokenizer.json.*(not found|No such file)"),
         "Tokenizer: missing or damaged.",
         "Add tokenizer.json and tokenizer_config.json to the model's folder, or choose another MODEL_ID."),
    _Row("unsupported_dtype", re.compile(r"Bfloat16 is only supported on GPUs|compute capability of at least"),
         "GPU: unsupported dtype or kernel in the plan.",
         "Set VLLM_EXTRA_ARGS='--dtype float16'; if that fails too, use a newer GPU."),
    _Row("shared_memory_too_small", re.compile(r"Insufficient space in /dev/shm"),
         "Shared memory (/dev/shm): too small for the engine.",
         "Start the container with --shm-size 8g (docker run) or shm_size: 8gb (compose)."),
    _Row("no_compiler", re.compile(r"Failed to find C compiler|CalledProcessError: Command '\['[^']*(gcc|clang|cc)'"),
         "C compiler: not found or not working; the engine compiles parts of itself at start.",
         "Install gcc, binutils and Python's headers on this machine; the image has them."),
    _Row("bad_weights", re.compile(r"SafetensorError|Error while deserializing header"),
         "Weights: damaged file.", "Run `shoehorn pull --verify`, then `shoehorn pull` to fetch damaged files; copy "
         "a local folder again."),
    _Row("weights_mismatch", re.compile(r"weights were not initialized from checkpoint|Attempted to load weight|"
                                        r"no module or parameter named|Cannot find any model weights"),
         "Weights: do not belong to config.json.",
         "Fetch all files of one revision of the model, or choose another MODEL_ID."),
    _Row("cluster_without_gpus", re.compile(r"current platform cpu does not support ray"),
         "Cluster: vLLM's CPU build does not serve over several machines.",
         "Start nodes with GPUs, or one machine with ROLE=single."),
    _BAD_ARGUMENT,
)


HUNG = Diagnosis("hung", "The engine hangs: its counters stand still and a probe for one token timed out.",
                 "If it recurs, look for GPU errors (`dmesg`, Xid) on the host.",
                 False)
"""Diagnosis of the watchdog; the log does not show it."""


NODE_LOST = "node_lost"
"""Name of the loss of a node; not a failure of the engine."""


def node_lost(text: str) -> Diagnosis:
    """Return the diagnosis of a lost node: `text` names it and says why."""
    return Diagnosis(NODE_LOST, f"Cluster: node lost: {text}.",
                     "Start the node again, or repair its network; the engine then starts automatically.", False)


def diagnose(lines: Iterable[str], status: int, memory_kill: bool = False, *, is_start: bool = True) -> Diagnosis:
    """Return the cause of an exit.

    Args:
        lines: the engine's last lines, oldest first.
        status: its exit status; negative for a signal.
        memory_kill: the kernel killed a process out of memory meanwhile; an engine whose core was killed exits with 0.
        is_start: the engine had not become ready.
    """
    tail = list(lines)
    root = find_root_cause(tail, is_start=is_start)
    if row := _matching_row(tail, root):
        limits = _limits(tail)
        remedy = row.remedy.format(limit=limits.get(row.limited, "the number in the message above"))
        return Diagnosis(row.name, f"{row.cause} {_sentence(root.message)}" if root else row.cause, remedy, row.final,
                         row.memory, _missing_bytes(row.name, tail), any("KV cache size:" in each for each in tail),
                         {row.limited: limits[row.limited]} if row.limited in limits else {})
    if status == -9 or memory_kill or any(_KILLED.search(line) for line in tail):
        return Diagnosis("killed", "Engine: killed (SIGKILL), most likely out of memory.",
                         "Look for an out-of-memory kill in `dmesg` on the host; raise the container's memory limit.",
                         False)
    return _of_exception(root, is_start) if root else Diagnosis(
        "unknown", f"Engine: exited with status {status}: {' | '.join(tail[-3:]) or 'no output'}",
        "Search the engine's log above for the first error.", False)


def _matching_row(lines: list[str], root: RootCause | None) -> _Row | None:
    limited = [row for row in _ROWS if row.limited]
    row = next((row for rows in (limited, _ROWS) for line in lines for row in rows if row.pattern.search(line)), None)
    if root and row in (None, _BAD_ARGUMENT):
        return next((row for row in _ROWS if row.pattern.search(root.text)), row)
    return row


_IMPORTS = ("ImportError", "ModuleNotFoundError", "PackageNotFoundError")
_DETERMINISTIC = (*_IMPORTS, "AssertionError", "AttributeError", "FileNotFoundError", "IndexError", "JSONDecodeError",
                  "KeyError", "NameError", "NotADirectoryError", "NotImplementedError", "OSError", "PydanticUserError",
                  "StrictDataclassClassValidationError", "StrictDataclassFieldValidationError", "SyntaxError",
                  "TypeError", "UnicodeDecodeError", "VLLMValidationError", "ValidationError", "ValueError", "argument")
"""Exceptions that a start raises again: of configuration, model files and installation, not of hardware or memory."""


def _of_exception(root: RootCause, is_start: bool) -> Diagnosis:
    """Return the diagnosis of an exception without a row."""
    is_import = not {root.type, *root.chain}.isdisjoint(_IMPORTS)
    of_system = root.type == "OSError" and root.message.startswith("[Errno")
    final = is_start and (is_import or (root.type in _DETERMINISTIC and not of_system))
    if final and is_import:
        return Diagnosis("import_error", f"Engine: Python module missing. {_sentence(root.message)}",
                         "Remove the option that names the module from VLLM_EXTRA_ARGS or the profile, or choose a "
                         "model that needs no further packages.", True)
    if final:
        return Diagnosis("refused_configuration", f"Engine: refused this model or configuration. "
                         f"{_sentence(root.message)}", "Change the option or the file that the message names: "
                         "VLLM_EXTRA_ARGS, a setting, the profile or the model.", True)
    return Diagnosis("unknown", f"Engine: ended by {root.type}. {_sentence(root.message)}",
                     "If it recurs, search the engine's log for the first error.", False)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "...")) else f"{text}."


_KILLED = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -9\)")
_NEEDED = re.compile(r"\(([\d.]+) GiB KV cache is needed.*?available KV cache memory \(([\d.]+) GiB\)", re.DOTALL)
_AVAILABLE = re.compile(r"Available KV cache memory: (-?[\d.]+) GiB")
_FREE = re.compile(r"Free memory on device \S+ \(([\d.]+)/[\d.]+ GiB\).*utilization \([\d.]+, ([\d.]+) GiB\)")
_TRIED = re.compile(r"Tried to allocate ([\d.]+) (MiB|GiB)\..*?of which ([\d.]+) (MiB|GiB) is free")


_LIMITS = (
    ("max-num-seqs", re.compile(r"lower max_num_seqs to at most (\d+)")),
    ("max-model-len", re.compile(r"estimated maximum model length is (\d+)")),
    ("max-model-len", re.compile(r"greater than the derived max_model_len \(\w+=(\d+)")),
    ("max-num-batched-tokens", re.compile(r"max_tokens_per_mm_item \((\d+)\) is larger")),
    ("max-num-batched-tokens", re.compile(r"must be greater than or equal to max_num_seqs \((\d+)\)")))
"""Option and the message that gives its value. Source: vllm/config/compilation.py, model.py and scheduler.py,
vllm/v1/core/kv_cache_utils.py and encoder_cache_manager.py."""


def _limits(lines: list[str]) -> Mapping[str, int]:
    """Return values of options that the engine names in its messages; the first of each."""
    text = " ".join(lines)
    values = [(option, int(match[1])) for option, pattern in _LIMITS if (match := pattern.search(text))]
    return dict(reversed(values))


def _missing_bytes(name: str, lines: list[str]) -> int:
    """Return the GPU memory that was missing according to the engine."""
    text = "\n".join(lines)
    if name == "context_exceeds_kv_cache" and (match := _NEEDED.search(text)):
        return _bytes(match[1], "GiB") - _bytes(match[2], "GiB")
    if name == "no_kv_cache_memory" and (match := _AVAILABLE.search(text)):
        return max(0, -_bytes(match[1], "GiB"))
    if name == "gpu_in_use" and (match := _FREE.search(text)):
        return _bytes(match[2], "GiB") - _bytes(match[1], "GiB")
    if name == "gpu_out_of_memory" and (match := _TRIED.search(text)):
        return max(0, _bytes(match[1], match[2]) - _bytes(match[3], match[4]))
    return 0


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * (GIB if unit == "GiB" else MIB))
