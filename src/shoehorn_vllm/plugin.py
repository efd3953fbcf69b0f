"""vLLM's general plugin (entry point `vllm.general_plugins`): what is mended in the engine.

vLLM calls `register` in each of its processes before it reads a model. Each mend is a module of its own that names the
defect it answers, and has a test that says when the engine no longer has it. They reach into the engine's insides, so
they are made for the versions below and for no other.
"""

from __future__ import annotations

from importlib.metadata import version

import vllm

TESTED = {"vllm": "0.32.0", "vllm-bnb-plugin": "0.0.3"}


class EngineVersionError(RuntimeError):
    """The engine is not one that the mends were tested with."""


def register() -> None:
    """Mend this process.

    Raises:
        EngineVersionError: a package has another version than the one that was tested.
    """
    for package, tested in TESTED.items():
        present: str = vllm.__version__ if package == "vllm" else version(package)  # its CPU build has another name
        if present.split("+")[0] != tested:
            raise EngineVersionError(f"Shoehorn's engine plugin was tested with {package} {tested}; this is {present}. "
                                     f"Install {package}=={tested}.")
    from shoehorn_vllm.patches import (  # not before: another engine may lack what they import
        bnb_experts,
        cpu_sleep,
        offload,
    )

    bnb_experts.apply()
    offload.apply()
    cpu_sleep.apply()
