"""The serving configuration that a plan decides on, and the load tiers that the search tries."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoehorn.model.shape import ModelShape


@dataclass(frozen=True)
class Level:
    """How much is offered: the longest request, requests at a time, and tokens in a batch."""

    context: int
    sequences: int
    tokens: int


LEVELS = (Level(131_072, 256, 8192), Level(65_536, 256, 8192), Level(32_768, 256, 8192), Level(32_768, 64, 4096),
          Level(16_384, 64, 2048), Level(8192, 32, 2048), Level(4096, 16, 1024), Level(2048, 8, 512),
          Level(1024, 4, 256), Level(512, 2, 128))
"""The largest first."""


@dataclass(frozen=True)
class Choices:
    """What is decided about a start, as far as it takes memory.

    Attributes:
        limit_bytes: of one GPU, everything counted, as NVML shows it.
        quantization: `bitsandbytes` (NF4 made while loading, or as the checkpoint is), `int4` (W4A16 in groups of 128),
            or None: as the checkpoint is.
        dtype_bytes: of one unquantized weight or activation; kv_dtype_bytes: of one entry of the KV cache.
        offload_bytes: UVA offload, at most this per GPU (vLLM's cpu-offload-gb).
        prefetch: (group size, layers offloaded in a group, steps ahead); all 0 without prefetch offload.
        embedding_on_host: the embedding lies in host memory, and the card reads the rows it needs.
        kv_cache_bytes: the KV cache per GPU where it is fixed; else None, and it takes what is left.
        draft: the draft model of speculative decoding, none of it in host memory.
        speculative_tokens: that are guessed, by a draft or otherwise, and then checked in one pass.
        capture_limit: tokens of the largest batch that has a CUDA graph; None leaves it to the engine.
    """

    limit_bytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    quantization: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    offload_bytes: int = 0
    prefetch: tuple[int, int, int] = (0, 0, 0)
    embedding_on_host: bool = False
    dtype_bytes: int = 2
    kv_dtype_bytes: float = 2
    block_size: int = 16
    eager: bool = False
    kv_cache_bytes: int | None = None
    draft: ModelShape | None = None
    speculative_tokens: int = 0
    capture_limit: int | None = None

    @property
    def gpus(self) -> int:
        """How many GPUs the model is divided over."""
        return self.tensor_parallel * self.pipeline_parallel


def drafting(choices: Choices) -> Choices:
    """The choices as they are for the draft alone: on the card, without CUDA graphs, in NF4 if the model is.

    Source: vllm/v1/worker/gpu/spec_decode/standalone_ar/speculator.py; the loader of NF4 loads both.
    """
    nf4 = choices.draft and not choices.draft.quantization and choices.quantization == "bitsandbytes"
    return replace(choices, draft=None, speculative_tokens=0, offload_bytes=0, prefetch=(0, 0, 0), eager=True,
                   pipeline_parallel=1, embedding_on_host=False, quantization="bitsandbytes" if nf4 else None)
