"""The memory model: bytes per part on each device, and tokens of the KV cache.

Rules: plain arithmetic, no I/O; the KV cache takes what the other parts leave, as in vLLM; a formula that is derived
and not measured errs upwards. docs/estimator.md gives every formula's source and the measurements it was compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from shoehorn.common.units import GIB, MIB
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory import adapters, kv_cache
from shoehorn.planner.memory.activations import Activations
from shoehorn.planner.memory.device import CPU, DeviceMemory, gpu_name
from shoehorn.planner.memory.kv_pages import pages
from shoehorn.planner.memory.offload import OffloadedWeights
from shoehorn.planner.memory.weights import Weights
from shoehorn.planner.serving_config import ExpertCacheOffload, ServingConfig, draft_config

CONTEXT_BYTES = 528 * MIB
"""CUDA context that exists before vLLM first measures the GPU, so that vLLM never counts it."""

MARGIN_BYTES = 64 * MIB
"""Free memory that a plan leaves below the limit: the allocator rounds, and the driver's own need varies."""

_LIBRARIES_BYTES = 296 * MIB  # workspaces (cuBLAS, attention) and compiled kernels
_NF4_LIBRARIES_BYTES = 104 * MIB  # bitsandbytes' kernels
_EXPERT_CACHE_BYTES = 224 * MIB  # Triton's and Marlin's kernels, workspaces and sums of waves (H100, above the plan)
_COLLECTIVES_BYTES = 720 * MIB  # the engine's two NCCL communicators; over NVLink, where they have most channels
_COUNT_BYTES = 4  # the sampler counts every token of the vocabulary for every sequence

_HOST_BYTES = 4 * GIB  # API server and one engine process with CUDA
_HOST_WORKER_BYTES = 3 * GIB  # worker of every further GPU
_HOST_CPU_BYTES = 2 * GIB  # all processes of an engine on the CPU, without weights and KV cache


@dataclass(frozen=True)
class MemoryModel:
    """Expected memory of a model in a configuration."""

    shape: ModelShape
    config: ServingConfig

    @cached_property
    def weights(self) -> Weights:
        """Weights before any offload."""
        return Weights(self.shape, self.config)

    @cached_property
    def offloaded(self) -> OffloadedWeights:
        """Weights in host memory."""
        return OffloadedWeights(self.weights)

    @cached_property
    def activations(self) -> Activations:
        """Activations, CUDA graphs, compilation and loading."""
        return Activations(self.weights)

    @cached_property
    def draft(self) -> MemoryModel | None:
        """Model of the draft alone, which is never offloaded."""
        draft = self.config.speculation.draft
        return MemoryModel(draft, draft_config(self.config, draft)) if draft else None

    def with_config(self, config: ServingConfig) -> MemoryModel:
        """Model of the same weights in another configuration."""
        return replace(self, config=config)

    # KV cache.

    @cached_property
    def cache_layouts(self) -> tuple[kv_cache.KvLayout, ...]:
        """Layout of the KV cache on one GPU of every stage; a draft model's layers share its blocks."""
        config, draft = self.config, self.draft.shape if self.draft else None
        kinds = pages(
            (*self.shape.kv_layers, *(replace(kind, numbers=(0,) * kind.layers) for kind in draft.kv_layers))
            if draft else self.shape.kv_layers,
            self.shape.state_layers, config.cache, config.parallelism.tensor, config.speculation.draft_tokens,
            config.dtype_bytes, config.limits.max_num_batched_tokens)
        batches = config.parallelism.pipeline + (not self.shape.pooling)  # the next is scheduled while one is computed
        in_flight = batches * config.limits.max_num_batched_tokens
        stages = tuple(self.weights.stage_range(stage) for stage in range(config.parallelism.pipeline))
        return kv_cache.layouts(kinds, config.limits.max_model_len, in_flight, stages)

    def kv_tokens(self, cache_bytes: int) -> int:
        """Tokens of all requests together in a cache of that size on the first stage."""
        return self.cache_layouts[0].tokens(cache_bytes)

    def kv_bytes(self, requests: int = 1) -> int:
        """KV cache on one GPU for that many requests of full length, in whole blocks.

        With states, the engine captures CUDA graphs only where every sequence has a block.
        """
        sequences = self.config.limits.max_num_seqs if self.shape.state_layers and not self.config.eager else 0
        return max(layout.bytes_for(requests, sequences) for layout in self.cache_layouts)

    def served_sequences(self, cache_bytes: int) -> int:
        """Sequences that a cache of that size serves at a time."""
        return min(layout.sequences(cache_bytes) for layout in self.cache_layouts)

    # Devices.

    @cached_property
    def gpus(self) -> tuple[DeviceMemory, ...]:
        """Memory of each GPU, in the order of the pipeline's stages.

        The KV cache is 0 when nothing is left for it; `total_bytes` then exceeds `limit_bytes` by what is missing.
        Every GPU gets the same number of blocks, as many as fit on the fullest one.
        """
        bare = self._bare_stages
        if self.config.kv_cache_bytes is None:
            blocks = min(layout.blocks(max(0, memory.limit_bytes - MARGIN_BYTES - memory.total_bytes))
                         for memory, layout in zip(bare, self.cache_layouts, strict=True))
            caches = [blocks * layout.block_bytes for layout in self.cache_layouts]
        else:
            caches = [self.config.kv_cache_bytes] * len(bare)
        ranks = range(self.config.parallelism.tensor)
        return tuple(replace(memory, kv_cache_bytes=cache, device=gpu_name(stage * len(ranks) + rank))
                     for stage, (memory, cache) in enumerate(zip(bare, caches, strict=True)) for rank in ranks)

    @cached_property
    def _bare_stages(self) -> tuple[DeviceMemory, ...]:
        """Memory of one GPU of each stage, without KV cache."""
        return tuple(map(self._without_cache, range(self.config.parallelism.pipeline)))

    def _without_cache(self, stage: int) -> DeviceMemory:
        """Memory of one GPU of a stage, without KV cache."""
        weights, share, offloaded = self.weights, self.weights.stage_share(stage), self.offloaded.stage_bytes(stage)
        resident = share - offloaded / max(1, weights.layers_bytes)
        return DeviceMemory(
            gpu_name(stage), self.config.stage_limit(stage),
            weights_bytes=round((weights.layers_bytes + weights.absorbed_bytes) * share) - offloaded
            + round(weights.other_bytes * share) + round(weights.rounding_bytes * resident) + weights.rotary_bytes
            + self._draft_bytes + self.adapters_bytes(stage),
            quant_state_bytes=round(weights.quant_state_bytes * share),
            embeddings_bytes=weights.embeddings_bytes(stage), offload_buffer_bytes=self.offloaded.buffers_bytes,
            activations_bytes=self.activations.bytes(stage),
            cuda_graphs_bytes=round(self.activations.graphs_bytes * share), framework_bytes=self.framework_bytes)

    def adapters_bytes(self, stage: int) -> int:
        """LoRA adapters on one GPU of a stage."""
        config, slots = self.config, self.config.adapters
        if slots is None:
            return 0
        layers = self.weights.stage_layers(stage) * adapters.layer_bytes(
            self.shape, slots, config.parallelism.tensor, config.dtype_bytes)
        is_last = stage == config.parallelism.pipeline - 1
        return layers + (adapters.head_bytes(self.shape, slots, config.dtype_bytes) if is_last else 0)

    @property
    def _draft_bytes(self) -> int:
        """All weights of the draft model on one GPU."""
        if self.draft is None:
            return 0
        memory = self.draft._without_cache(0)
        return memory.weights_bytes + memory.quant_state_bytes + memory.embeddings_bytes

    @property
    def framework_bytes(self) -> int:
        """Memory of one engine process on a GPU besides the model."""
        return (CONTEXT_BYTES + _LIBRARIES_BYTES + _NF4_LIBRARIES_BYTES * self.weights.format.is_nf4
                + self._expert_cache_bytes
                + _COLLECTIVES_BYTES * (self.config.parallelism.gpus > 1)
                + _COUNT_BYTES * self.config.limits.max_num_seqs * self.shape.vocab)

    @property
    def _expert_cache_bytes(self) -> int:
        return _EXPERT_CACHE_BYTES * isinstance(self.config.offload, ExpertCacheOffload)

    def host_beside_gpus(self, limit_bytes: int = 0) -> DeviceMemory:
        """Host memory of all processes together while the model runs on GPUs."""
        return DeviceMemory(
            CPU, limit_bytes, weights_bytes=self.offloaded.bytes, embeddings_bytes=self.offloaded.embedding_bytes,
            framework_bytes=_HOST_BYTES + _HOST_WORKER_BYTES * (self.config.parallelism.gpus - 1),
            pinned_bytes=self.offloaded.pinned_bytes)

    def host_alone(self, limit_bytes: int = 0) -> DeviceMemory:
        """Host memory of all processes together while the model runs on the CPU."""
        weights = self.weights
        return DeviceMemory(
            CPU, limit_bytes, weights_bytes=weights.layers_bytes + weights.other_bytes + self._draft_bytes,
            quant_state_bytes=weights.quant_state_bytes, embeddings_bytes=weights.embeddings_bytes(0),
            kv_cache_bytes=self.config.kv_cache_bytes or 0, activations_bytes=self.activations.bytes(0),
            framework_bytes=_HOST_CPU_BYTES)

    # Fit.

    def missing_bytes(self, requests: int = 1) -> int:
        """Bytes that the fullest GPU lacks for that many requests of full length; negative where they fit.

        vLLM refuses to start when the KV cache holds less than one request of full length.
        """
        fixed, least, missing = self.config.kv_cache_bytes, self.kv_bytes(requests), []
        compiling, loading = self.activations.compiling_bytes, self.loading_bytes
        for memory in self._bare_stages:
            limit, total = memory.limit_bytes - MARGIN_BYTES, memory.total_bytes
            stored = (memory.weights_bytes + memory.quant_state_bytes + memory.embeddings_bytes + memory.framework_bytes
                      - self._expert_cache_bytes)  # its kernels are loaded by the first pass
            missing += [total - memory.activations_bytes - memory.cuda_graphs_bytes + compiling - limit,
                        stored + loading - limit,
                        total + least - limit if fixed is None else max(total + fixed - limit, least - fixed)]
        return max(missing)

    @property
    def loading_bytes(self) -> int:
        """Peak of loading on top of the weights; the draft model loads after the model."""
        return max(self.activations.loading_bytes, self.draft.loading_bytes if self.draft else 0)

    def missing_on_host(self) -> int:
        """Bytes that a fixed KV cache lacks for one request of full length; negative where it fits."""
        return self.kv_bytes() - (self.config.kv_cache_bytes or 0)
