"""The serving configuration: everything that is decided about a start and takes memory or time.

Rules: it is the one truth; vLLM's options are derived from it once, at the end (`vllm_args`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from shoehorn.model.shape import ModelShape

BITSANDBYTES = "bitsandbytes"
"""Name of the NF4 quantization, as vLLM's option and as a checkpoint's `quant_method`."""


class WeightFormat(Enum):
    """Format in which the engine holds the layers' weights."""

    UNQUANTIZED = "none"
    NF4 = "nf4"
    """Quantized by bitsandbytes while loading."""
    NF4_CHECKPOINT = "nf4-checkpoint"
    """Quantized by bitsandbytes in the checkpoint."""
    PACKED = "packed"
    """As the checkpoint holds them: AWQ, GPTQ, FP8, compressed-tensors (INT4), MXFP4."""

    @property
    def is_nf4(self) -> bool:
        """Return whether bitsandbytes' kernels multiply them."""
        return self in (WeightFormat.NF4, WeightFormat.NF4_CHECKPOINT)


@dataclass(frozen=True)
class Limits:
    """Upper bounds of a request, of requests at a time, and of tokens in a batch."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class Parallelism:
    """Division of the model over GPUs: by matrices (tensor) within each of the stages by layers (pipeline).

    Attributes:
        layers: of each stage; empty for vLLM's own division.
        spare: bytes of each GPU of a stage beyond `limit_bytes`; empty for equal GPUs.
    """

    tensor: int = 1
    pipeline: int = 1
    layers: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class NoOffload:
    """All layers are stored on the GPUs."""


@dataclass(frozen=True)
class UvaOffload:
    """Layers in host memory that the GPU reads in place, up to `bytes` on each GPU (cpu-offload-gb)."""

    bytes: int


@dataclass(frozen=True)
class PrefetchOffload:
    """The last `last` of every `group` layers in host memory, copied to the GPU `steps` layers ahead."""

    group: int
    last: int
    steps: int

    def offloads(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, is offloaded."""
        return layer % self.group >= self.group - self.last


@dataclass(frozen=True)
class ExpertCacheOffload:
    """All experts in host memory, and copies of `slots` of every layer on the GPU.

    Attributes:
        scratch: experts in each of the three buffers of large forward passes.
        divided: tokens of the largest forward pass that is divided into parts whose choices fit into the slots; larger
            ones copy every expert that has no slot.
        computed: tokens of the largest forward pass whose experts without a slot the CPU computes; 0 where all of them
            are copied.
    """

    slots: int
    scratch: int
    divided: int
    computed: int = 0


@dataclass(frozen=True)
class ComputeLevel:
    """Forward passes of up to `tokens` tokens stream this share of the bytes (0 to 1); the CPU multiplies the rest."""

    tokens: int
    streamed: float


def streamed_share(levels: tuple[ComputeLevel, ...], tokens: int) -> float:
    """Share of the bytes that a forward pass of that many tokens streams: everything beyond the last level."""
    return next((level.streamed for level in levels if tokens <= level.tokens), 1.0)


@dataclass(frozen=True)
class HybridOffload:
    """The linear layers of the last `last` of every `group` layers in host memory, where the CPU multiplies them.

    Attributes:
        levels: by ascending tokens; a forward pass of more tokens streams all of them to the GPU.
        buffers: matrices that are on the GPU at a time while they are streamed.
    """

    group: int
    last: int
    levels: tuple[ComputeLevel, ...]
    buffers: int = 2

    def offloads(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, is offloaded."""
        return layer % self.group >= self.group - self.last

    def streamed(self, tokens: int) -> float:
        """Share of the bytes that a forward pass of that many tokens streams."""
        return streamed_share(self.levels, tokens)

    @property
    def captured(self) -> int:
        """Tokens of the largest forward pass that streams nothing, and so has a CUDA graph; 0 without one."""
        return max((level.tokens for level in self.levels if not level.streamed), default=0)


Offload = NoOffload | UvaOffload | PrefetchOffload | ExpertCacheOffload | HybridOffload


@dataclass(frozen=True)
class CacheOptions:
    """Form of the KV cache and of states.

    Attributes:
        block_size: tokens of a block; a model with states may need more.
        kv_dtype_bytes: of one entry of a key or value.
        head_bytes: of the scales of one head and token.
        caches_prefixes: prefix caching; a sequence keeps a second state for it.
        frees_windows: tokens outside a window are freed; False caches all tokens of every attention layer.
        convolution_bytes, recurrent_bytes: of one entry of a state; 0 leaves it to the model.
    """

    block_size: int = 16
    kv_dtype_bytes: float = 2
    head_bytes: int = 0
    caches_prefixes: bool = True
    frees_windows: bool = True
    convolution_bytes: int = 0
    recurrent_bytes: int = 0


@dataclass(frozen=True)
class ItemOptions:
    """Images, videos and sound in requests.

    Attributes:
        limits: largest number per request by modality, where it is limited.
        text_only: no items at all.
        max_pixels: of an image; 0 leaves it to the model.
        whole_towers: every GPU holds the whole encoders and divides the items (`mm-encoder-tp-mode: data`).
    """

    limits: tuple[tuple[str, int], ...] = ()
    text_only: bool = False
    max_pixels: int = 0
    whole_towers: bool = False

    def limit(self, modality: str) -> int:
        """Return the largest number of items per request; vLLM's default is 999."""
        return 0 if self.text_only else dict(self.limits).get(modality, 999)


@dataclass(frozen=True)
class Speculation:
    """Speculative decoding: draft tokens per forward pass, and the draft model where one makes them."""

    draft_tokens: int = 0
    draft: ModelShape | None = None


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters on the GPU at a time, and their greatest rank.

    Attributes:
        targets: names of the modules that have adapters, as vLLM compares them; empty for every linear layer.
        fully_sharded: both matrices are divided over GPUs.
    """

    count: int = 1
    rank: int = 16
    targets: tuple[str, ...] = ()
    fully_sharded: bool = False

    def targets_any(self, *names: str) -> bool:
        """Return whether one of these modules has adapters."""
        return not self.targets or any(target.rsplit(".", 1)[-1] in names for target in self.targets)


@dataclass(frozen=True)
class ServingConfig:
    """All decisions about a start.

    Attributes:
        limit_bytes: of one device, everything counted: the smallest GPU as NVML shows it, or the host.
        nf4: layers are in NF4, quantized while loading or in the checkpoint.
        online_bytes: of one weight of the layers that vLLM quantizes while loading (FP8 and others); 0 without.
        embedding_on_host: the embedding is in host memory, and the GPU reads the rows it needs.
        dtype_bytes: of one unquantized weight or activation.
        eager: without CUDA graphs and torch.compile.
        capture_limit: tokens of the largest batch that has a CUDA graph; None leaves it to the engine.
        adapters: LoRA adapters; None without.
        kv_cache_bytes: fixed size of the KV cache on each device; None gives it what the other parts leave.
    """

    limit_bytes: int
    limits: Limits
    nf4: bool = False
    online_bytes: float = 0.0
    parallelism: Parallelism = Parallelism()
    offload: Offload = NoOffload()
    embedding_on_host: bool = False
    speculation: Speculation = Speculation()
    dtype_bytes: int = 2
    cache: CacheOptions = CacheOptions()
    items: ItemOptions = ItemOptions()
    eager: bool = False
    capture_limit: int | None = None
    adapters: Adapters | None = None
    kv_cache_bytes: int | None = None

    def stage_limit(self, stage: int) -> int:
        """Bytes of each GPU of a stage, everything counted."""
        return self.limit_bytes + (self.parallelism.spare[stage] if self.parallelism.spare else 0)

    def with_limits(self, **changes: int) -> ServingConfig:
        """Copy with other limits."""
        return replace(self, limits=replace(self.limits, **changes))


def weight_format(shape: ModelShape, config: ServingConfig) -> WeightFormat:
    """Format of the layers' weights of a model in a configuration."""
    if shape.quantization == BITSANDBYTES:
        return WeightFormat.NF4_CHECKPOINT
    if shape.quantization:
        return WeightFormat.PACKED
    return WeightFormat.NF4 if config.nf4 else WeightFormat.UNQUANTIZED


def draft_config(config: ServingConfig, draft: ModelShape) -> ServingConfig:
    """Configuration of the draft model alone: on the GPU, without CUDA graphs, in NF4 where the model is.

    Source: vllm/v1/worker/gpu/spec_decode/standalone_ar/speculator.py; the loader of NF4 loads both.
    """
    return replace(config, speculation=Speculation(), offload=NoOffload(), eager=True, embedding_on_host=False,
                   adapters=None, parallelism=Parallelism(config.parallelism.tensor),
                   nf4=config.nf4 and not draft.quantization)
