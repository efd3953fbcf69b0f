"""A small checkpoint, a volume, and pulls to it as separate processes, as in production."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fakes.checkpoint_files import header
from fakes.hf_hub import HuggingFaceHub
from fakes.hub import Hub
from shoehorn.common.progress import Progress
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.model.reference import ModelRef
from shoehorn.store import pull as pull_module
from shoehorn.store.reference import model_reference

MODEL = "owner/tiny"
WEIGHTS = "model.safetensors"
WEIGHTS_BYTES = 4 << 20


def write_weights(path: Path, fill: int = 0) -> None:
    """Write a safetensors file of about WEIGHTS_BYTES; `fill` changes its content."""
    start, size = header({"model.norm.weight": ("F32", [WEIGHTS_BYTES // 4])})
    path.write_bytes(start + bytes([fill]) + bytes(range(256)) * (size // 256 - 1) + bytes(255))


def write_model(folder: Path) -> Path:
    """Write a checkpoint, with files that a pull does not download."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS)
    for name, text in {"config.json": '{"architectures": ["LlamaForCausalLM"]}', "tokenizer.json": "{}",
                       "README.md": "no", "pytorch_model.bin": "no", "modeling.py": "no"}.items():
        (folder / name).write_text(text)
    return folder


class Volume:
    """A models volume below `home`, and commands on it."""

    def __init__(self, home: Path, hub: Hub | None = None, **more: str) -> None:
        self.environment = {"MODEL_ID": MODEL, "MODELS_DIR": str(home / "models"), "RUN_DIR": str(home / "run"),
                            "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9", "HF_ENDPOINT": "http://127.0.0.1:9"}
        if isinstance(hub, HuggingFaceHub):
            self.environment |= {"MODEL_SOURCE": "huggingface", "HF_ENDPOINT": hub.url}
        elif hub:
            self.environment["MODELSCOPE_ENDPOINT"] = hub.url
        self.environment |= more
        self.models = home / "models"
        self.models.mkdir(exist_ok=True)
        self.folder = self.models / MODEL

    @property
    def settings(self) -> Settings:
        return settings_module.load(self.environment)

    @property
    def ref(self) -> ModelRef:
        return model_reference(self.settings)

    @property
    def hub_arguments(self) -> tuple[Settings, str, str]:
        """Arguments of a hub client for the model."""
        return self.settings, self.ref.id, self.ref.revision

    @property
    def manifest(self) -> Path:
        return self.models / ".shoehorn" / "manifests" / f"{MODEL.replace('/', '--')}.json"

    def complete(self) -> bool:
        """Return whether the model is complete."""
        return pull_module.locate(self.models, self.ref) == self.folder

    def start(self, *arguments: str, program: Sequence[str] = ("-m", "shoehorn.cli")) -> subprocess.Popen[str]:
        """Start `shoehorn pull`; `program` are the arguments of Python."""
        source = Path(pull_module.__file__).parents[2]
        environment = {**self.environment, "PATH": os.environ["PATH"], "HOME": str(self.models.parent),
                       "PYTHONPATH": str(source)}
        return subprocess.Popen([sys.executable, *program, "pull", *arguments], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def pull(self, *arguments: str) -> tuple[int, str, str]:
        """Run `shoehorn pull`; return exit code, standard output and standard error."""
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def pull_here(self) -> list[Progress]:
        """Pull in this process, without the hub's library; return the progress reports."""
        reports: list[Progress] = []
        assert pull_module.pull(self.settings, reports.append) == self.folder
        return reports


PAUSED_AT_VERIFICATION = ("-c", """
import hashlib, sys, time, types
from shoehorn import cli
from shoehorn.store import check
hanging = types.SimpleNamespace(update=lambda _: time.sleep(600))
check.hashlib = types.SimpleNamespace(sha256=lambda: hanging, sha1=hashlib.sha1)
sys.exit(cli.main(sys.argv[1:]))
""")
"""A program for `Volume.start` that hangs when it hashes downloaded files."""


def stop_when_arrived(process: subprocess.Popen[str], least_bytes: int, number: int = signal.SIGKILL) -> None:
    """Send a signal, by default SIGKILL, when a `pull --json` has received so many bytes."""
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["bytes_done"] >= least_bytes:
            break
    process.send_signal(number)
