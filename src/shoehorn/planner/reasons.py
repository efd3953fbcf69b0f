"""Reasons of a plan: why each option has its value, as a stable code with parameters, and one table of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SETTING, PROFILE, MODEL, MACHINE, STEP_DOWN = "setting", "profile", "model", "machine", "step-down"
"""Sources of a decision."""

TEXTS: Mapping[str, str] = {
    # What was given.
    "set": "{setting}",
    "profile": "{profile}",
    "draft-model": "SPECULATIVE={model}; expected speeds assume {accepted:g} tokens per forward pass",
    "step-down": "needed to start on this machine before",
    "step-down-dropped": "prevented a start on this machine before",
    # What a check changed.
    "not-quantized": "QUANTIZATION=none",
    "converted-to-int4": "the checkpoint is converted to INT4 once, on the volume",
    "already-quantized": "the checkpoint is already quantized: {method}",
    "model-limit": "the model's own limit",
    "overrides-completed": "completed for this model: vLLM replaces all rotary parameters, and does not lengthen the "
                           "context",
    "no-bfloat16": "{gpu} does not support bfloat16",
    "one-token-per-sequence": "at least one token per sequence",
    # Parallelism.
    "unequal-gpus": "the {gpus} GPUs are not equal; using more of them is not expected to be faster",
    "mixed-gpus": "different GPUs: those of one stage run at the speed of its slowest",
    "equal-gpus": "{gpus} equal GPUs, {heads} attention heads",
    "fastest-division": "the fastest expected division over the available GPUs, {gpus} of them in use",
    "layer-partition": "layers of each stage, by the memory of its GPUs",
    "layers-only-nf4": "{gpus} equal GPUs; a bitsandbytes checkpoint can only be divided by layers",
    "layers-only": "{gpus} equal GPUs; the model's matrices cannot be divided over them, only its layers",
    "over-nodes": "layers over {nodes} machines: little crosses the network between them",
    "sequences-wait": "the KV cache holds the states of {sequences} sequences; of max-num-seqs {most} the others wait",
    "adapters-memory": "{bytes} on the first GPU for {count} LoRA adapters of rank {rank} (max-loras, max-lora-rank)",
    "over-every-gpu": "layers over {stages} stages of {nodes} machines, whose numbers of GPUs differ",
    "within-nodes": "matrices over {gpus} GPUs of each machine",
    "no-peer-access": "works without peer access between GPUs",
    # GPU memory.
    "free-memory": "{limit} of the GPU are free; {context} of it go to the CUDA context, which vLLM does not count",
    "vram-limit": "VRAM_LIMIT is {limit}; {context} of it go to the CUDA context, which vLLM does not count",
    "keeps-weights-on-gpu": "with a smaller share, weights would be offloaded to host memory",
    "cache-fixed": "what the other parts leave; vLLM's own measurement would also reserve the peak of compilation",
    "cache-default": "default for the CPU",
    "block-size-fixed": "fixed, because vLLM's default depends on the GPU",
    # The search.
    "smallest": "nothing fits; this is the smallest configuration tried",
    "default": "default for the CPU",
    "nf4-fits": "the layers take {stored}; in NF4 everything fits on the GPU",
    "nf4-less-offload": "the layers take {stored}; in NF4 less crosses PCIe",
    "eager-saves-memory": "compilation and CUDA graphs would need memory that only offload could free",
    "eager-offload": "CUDA graphs need memory, and most of a forward pass waits for PCIe",
    "graphs": "CUDA graphs save time between kernels, and their memory is available",
    "context-longest": "longest common length with memory for {requests} at a time",
    "context-useful": "a useful length; a longer one would need more offload",
    "context-fits": "longest length that fits for {requests}",
    "sequences": "suits the KV cache",
    "sequences-states": "suits the KV cache, which holds the states of that many sequences",
    "batch": "suits the number of sequences; a larger batch would take memory from the KV cache",
    "capture-speculative": "same as without draft tokens, which would need memory for more graphs",
    "capture-fewer": "CUDA graphs for larger batches would need memory that only offload could free",
    "ngram": "draft tokens from the text so far are verified while the GPU waits for PCIe; requests with min_p or "
             "logit_bias are refused (SPECULATIVE=off disables this)",
    # Offload.
    "no-offload": "everything fits on the GPU, which is many times faster",
    "offload-least": "{offloaded} of weights in host memory: the least that leaves memory for {requests} of {context} "
                     "tokens",
    "prefetch": "layers are copied to the GPU ahead of their turn, while others execute",
    "prefetch-last": "the last layers of each group",
    "prefetch-steps": "one layer executes while the next one is copied",
    "expert-cache": "all experts ({offloaded}) in host memory, {slots} of {experts} in each layer on the GPU too: "
                    "only missing ones that a token needs cross PCIe",
    "expert-sharing": "all experts ({offloaded}) in host memory, {slots} of {experts} in each layer on the GPU too: "
                      "the CPU computes the others for forward passes of up to {computed} tokens, since it reads "
                      "host memory faster than PCIe copies it; larger passes copy them",
    "expert-sharing-capture": "forward passes that the CPU takes part in, up to twice the requests",
    "expert-kernel": "the kernel of the cached experts",
    "expert-graphs": "CUDA graphs of whole forward passes, without torch.compile",
    "expert-capture": "largest forward pass that copies only the missing experts that it needs",
    "hybrid": "{offloaded} of weights in host memory, where the CPU multiplies them for small forward passes; those of "
              "more than {shared} tokens are streamed to the GPU",
    "hybrid-capture": "largest number of tokens whose host layers the CPU multiplies alone",
    "embedding-on-host": "the embedding is in host memory: a token needs one row of it",
    # Remarks that are not about an option.
    "gpu-remark": "{remark}",
    "idle-gpus": "idle: {idle}",
    "profile-note": "{note}",
    "model-note": "{note}",
    "host-memory-unknown": "not checked: the size of host memory is unknown",
    "host-memory-used": "only {available} are free at this moment",
    "cpu-kernel": "Shoehorn's CPU kernel multiplies INT4 weights, in the checkpoint's layout",
    "cpu-kernel-torch": "the CPU kernel is not installed, so torch's slower kernel multiplies INT4 layers; install "
                        "a C compiler, then reinstall Shoehorn",
    "cpu-kernel-engine": "vLLM's own kernel multiplies INT4 weights",
    "speed-unknown-cpu": "no expectation: the speed of this processor is unknown",
    "speed-unknown-gpu": "no expectation: the memory bandwidth of {gpu} is unknown",
    "pcie": "pinned memory over PCIe {generation} with {lanes} lanes",
    "pcie-unknown": "pinned memory over an unknown connection; PCIe 4 with 16 lanes is assumed",
    # Thoughts and tool calls.
    "parser-format": "{family}: {evidence}",
    "parser-missing": "off: vLLM has no parser for {family} ({evidence})",
    "parser-no-token": "off: {family} ({evidence}), but the tokenizer has no token {token}, which {parser} requires",
    "parser-unknown": "off: the chat template has no known format of {what}; set {setting} to the name of a parser",
    "parser-off": "{setting}=off",
    "parser-switched-off": "off: enable-auto-tool-choice is switched off",
    "parser-not-combined": "off: the parser hf cannot be combined with others",
    "no-thoughts": "off: the chat template opens no thoughts",
    "tools-not-shown": "off: the chat template does not show tools to the model",
    "no-chat-template": "off: the model has no chat template",
    "tools-hidden": "requests with tool_choice none get no calls",
    "parser-needs-auto": "required by tool-call-parser",
    "thought-tags": "the tags of the thoughts, so that requests can limit their length",
    "pooling": "the model returns embeddings or scores: vLLM supports this for some kinds of pooling only",
    # A draft model that is left out.
    "draft-pipeline": "SPECULATIVE={model} is not used: vLLM supports no draft model with pipeline parallelism",
    "draft-not-divisible": "SPECULATIVE={model} is not used: it cannot be divided over {gpus} GPUs",
    "draft-disk-full": "SPECULATIVE={model} is not used: {lacking} of disk space are missing for it",
    "draft-does-not-fit": "SPECULATIVE={model} is not used: {lacking} of memory are missing for it",
    "draft-short-context": "SPECULATIVE={model} is not used: only {context} tokens of context would fit",
    "draft-needs-quantization": "SPECULATIVE={model} is not used: the model itself would have to be quantized",
    "draft-slower": "SPECULATIVE={model} is not used: {with_draft:g} tokens/s expected with it, {without:g} without",
}
"""Text by code; `str.format` fills in the parameters."""

NOTES: Mapping[str, str] = {"not-estimated": "its memory is not estimated",
                            "exceeds-free-memory": "although only {limit} of the GPU are free",
                            "exceeds-vram-limit": "although VRAM_LIMIT is {limit}"}
"""Text by code of what is added to a reason."""


@dataclass(frozen=True)
class Reason:
    """The reason of an option's value, or a remark about another subject named in `option`.

    Attributes:
        value: of the option; None where it is left out.
        source: one of the five above.
        code: key of `TEXTS`; params: its parameters.
        replaces: the reason of the value that this one overrides.
        notes: keys of `NOTES`, with parameters from `params`.
    """

    option: str
    value: object
    source: str
    code: str
    params: Mapping[str, object] = field(default_factory=dict)
    replaces: Reason | None = None
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The reason as a phrase."""
        text = TEXTS[self.code].format(**self.params)
        if self.replaces:
            text += f" (instead of {self.replaces.value} from {self.replaces.source} {self.replaces.text})"
        return "; ".join([text, *(NOTES[note].format(**self.params) for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """An entry of `reasons` in `plan --json`."""
        return {"option": self.option, "value": self.value, "source": self.source, "code": self.code,
                "text": self.text}
