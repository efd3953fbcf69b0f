"""vLLM's general plugin (entry point `vllm.general_plugins`): applies Shoehorn's patches to vLLM.

vLLM calls `register` in each of its processes before it loads a model. Each patch is a module that names the defect it
answers, with a test that fails when the engine no longer has the defect. Patches replace internals of the engine, so
they are limited to the versions below.
"""

from __future__ import annotations

from importlib.metadata import version

import vllm
from vllm.platforms import current_platform

TESTED = {"vllm": "0.32.0", "vllm-bnb-plugin": "0.0.3"}


class EngineVersionError(RuntimeError):
    """The engine has a version that the patches were not tested with."""


def register() -> None:
    """Patch this process.

    Raises:
        EngineVersionError: a package has another version than the tested one.
    """
    for package, tested in TESTED.items():
        present: str = vllm.__version__ if package == "vllm" else version(package)  # the CPU build has another name
        if present.split("+")[0] != tested:
            raise EngineVersionError(f"Engine plugin: {package} {present} is unsupported (tested: {tested}). "
                                     f"Install {package}=={tested}.")
    from shoehorn_vllm.hybrid import patch as hybrid  # after the check: another version may lack what they import
    from shoehorn_vllm.patches import (
        bnb_experts,
        cpu_sleep,
        fair_scheduling,
        model_info,
        offload,
        request_usage,
    )

    bnb_experts.apply()
    offload.apply()
    cpu_sleep.apply()
    request_usage.apply()
    fair_scheduling.apply()
    model_info.apply()
    hybrid.apply()
    if current_platform.is_cuda():  # Triton is not in the CPU environment
        from shoehorn_vllm.hybrid import cached_experts, cached_mxfp4, host_weights
        from shoehorn_vllm.hybrid.offload import method
        from shoehorn_vllm.int4 import linear as int4_linear

        int4_linear.apply()
        host_weights.apply()
        cached_experts.apply()
        cached_mxfp4.apply()
        method.apply()
