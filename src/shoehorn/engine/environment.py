"""Environment of the engine: secrets and unsafe switches removed, the plan's and fixed variables added.

Rules:
- a variable that is named like a secret is removed;
- a switch is removed if it opens a route, loads code or models from elsewhere, replaces the API server (and with it the
  appliance's limits), or writes clients' data to logs and disks;
- the number of answers of one request is bounded;
- the engine searches an empty folder for `model.py`: it runs that file at its start, whatever `trust_remote_code` says,
  and its default /opt/ml/model may be a volume with other content.
Names as vLLM 0.32.0 has them in `vllm/envs.py`; a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shoehorn.config.secrets import without_secrets
from shoehorn.planner.gpu_share import ALLOCATOR
from shoehorn.runtime.run_dir import RunDir

SWITCHES = frozenset({
    # routes without a key
    "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ENABLE_COHERE_API",
    # stored answers that any client can request by id
    "VLLM_ENABLE_RESPONSES_API_STORE", "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
    # code and models from elsewhere
    "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_LORA_RESOLVER_HF_REPO_LIST",
    "VLLM_MEDIA_CONNECTOR", "VLLM_MODEL_REDIRECT_PATH", "VLLM_TEST_FORCE_LOAD_FORMAT", "VLLM_USE_MODELSCOPE",
    "VLLM_GPT_OSS_SYSTEM_TOOL_MCP_LABELS",
    # another API server, without the appliance's limits
    "VLLM_USE_RUST_FRONTEND", "VLLM_RUST_FRONTEND_PATH",
    # clients' data in logs and files
    "VLLM_DEBUG_DUMP_PATH", "VLLM_DEBUG_LOG_API_SERVER_RESPONSE", "VLLM_LOGGING_CONFIG_PATH", "VLLM_TRACE_FUNCTION",
    "VLLM_USAGE_STATS_SERVER",
    # a server that looks alive without its engine
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
})
_OTHERS = frozenset({
    "PYTHONOPTIMIZE",  # checks that are `assert`s in vLLM and its libraries
    "STANDARD_PIP_ARGS",  # installs what a model's requirements.txt names
})
BOUNDS = {
    "VLLM_MAX_N_SEQUENCES": "128",  # answers to one request, each a sequence in the engine; default 16384
    "VLLM_MAX_COMPLETION_PROMPTS": "128",  # prompts in one request; default 1024
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed host could redirect the engine to an internal address
}
"""Bounds of one request; the operator's own values override them."""

_PREFIXES = ("SAGEMAKER_", "CUSTOM_")  # functions and files that are loaded at the start

_CLUSTER_NAMES = frozenset({
    "PATH", "HOME", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "PYTHONUNBUFFERED", "LD_LIBRARY_PATH", "LD_PRELOAD", "CC",
    "DO_NOT_TRACK", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "SAGEMAKER_MODEL_PATH"})
_CLUSTER_PREFIXES = ("VLLM_", "SHOEHORN_", "RAY_", "NCCL_", "GLOO_", "UCX_", "CUDA_", "NVIDIA_", "TORCH", "PYTORCH_",
                     "TRITON_", "OMP_", "KMP_", "MKL_", "LC_", "XDG_", "FLASHINFER_")


def for_cluster(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what may reach the other nodes of a cluster: vLLM copies its whole environment to its workers there."""
    return {name: value for name, value in environment.items()
            if name in _CLUSTER_NAMES or name.startswith(_CLUSTER_PREFIXES)}


def for_engine(environment: Mapping[str, str], run_dir: Path) -> dict[str, str]:
    """Return the environment without secrets and unsafe switches."""
    clean = {name: value for name, value in without_secrets(environment).items()
             if name not in SWITCHES | _OTHERS and not name.startswith(_PREFIXES)}
    return {**BOUNDS, **clean, "SAGEMAKER_MODEL_PATH": str(RunDir(run_dir).empty)}


def engine_environment(environment: Mapping[str, str], plan_environment: Mapping[str, str],
                       run_dir: Path) -> dict[str, str]:
    """Return the engine's environment: the sanitized one of the container, the plan's, and fixed variables.

    A user's own configuration of PyTorch's allocator overrides the plan's.
    """
    return {
        **for_engine(environment, run_dir),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # its kernels are compiled at run time and need nvcc
        "VLLM_ENGINE_READY_TIMEOUT_S": "7200",
        "GLOO_SOCKET_IFNAME": "lo",  # default: the address of the host name, in a container on its network
        **{name: value for name, value in plan_environment.items()
           if name != ALLOCATOR or not {ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"} & set(environment)},
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
