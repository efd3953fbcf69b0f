"""Collection of everything that a plan depends on: settings, machine, profile, model and disk.

Rules: only headers and configuration of the model are read, never its weights; no secret of the settings reaches a
`Deployment`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shoehorn.common import disk
from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import PROFILES
from shoehorn.config import vllm_options
from shoehorn.config.models_dir import ModelsDir
from shoehorn.config.profiles import AUTO, Profile, automatic, load
from shoehorn.config.settings import Settings
from shoehorn.deployment import auto_quantization, known_good, served_model
from shoehorn.deployment.served_model import ShapeReader
from shoehorn.hardware import bandwidth_probe, detect, kernel_probe, requirements
from shoehorn.hardware.requirements import require_gpus
from shoehorn.hardware.types import Hardware
from shoehorn.hardware.visible_gpus import ORDER, VISIBLE
from shoehorn.model import chat_format, task
from shoehorn.model.chat_format import ChatFormat
from shoehorn.model.files import Files
from shoehorn.model.reference import ModelRef
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Refusal
from shoehorn.store.model_check import check_model

log = logging.getLogger("plan")


@dataclass(frozen=True)
class Deployment:
    """A model to serve on a machine, ready to be planned.

    Attributes:
        inputs: of the planner, without a draft; known-good options that no longer fit are left out.
        ref: of the model that is served.
        directory: its complete folder; None until it is fetched.
        draft_disk_bytes: free disk space for a draft model; None if it does not count.
        known_good: file of the known-good options of this deployment.
    """

    inputs: PlanInputs
    ref: ModelRef
    directory: Path | None
    draft_disk_bytes: int | None
    known_good: Path


def detect_machine(settings: Settings, environment: Mapping[str, str], *, measure: bool) -> Hardware:
    """Return this machine with the GPUs that the engine can use, and measured bandwidths.

    Args:
        environment: has the variables with which CUDA hides GPUs.
        measure: measure bandwidths that are not cached; False only reads the cache.
    """
    machine = requirements.usable(detect.detect(environment=gpu_environment(settings, environment)))
    cache = ModelsDir(settings.models_dir).bandwidths
    machine = bandwidth_probe.with_measured_bandwidths(machine, cache, measure=measure)
    return kernel_probe.with_measured_kernel(machine, cache, measure=measure and settings.cpu_compute == "auto")


def gpu_environment(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the variables of a profile that hide or order GPUs.

    Raises:
        SettingsError: an unknown or invalid profile.
    """
    profile = automatic() if settings.vram_profile == AUTO else load(settings.vram_profile)
    own = {name: profile.environment[name] for name in (VISIBLE, ORDER) if name in profile.environment}
    return {**environment, **own}


def gather(settings: Settings, machine: Hardware, *, here: bool = True, shapes: ShapeReader | None = None,
           ) -> Deployment:
    """Collect the inputs of a plan, with QUANTIZATION resolved.

    Args:
        machine: this machine, or a described one.
        here: the machine is this one, so the models volume and its known-good options count.
        shapes: shared by several calls for the same model.

    Raises:
        SettingsError: the settings contradict each other, the model or the machine.
        ModelUnavailableError: config and headers cannot be read.
    """
    shapes = shapes or ShapeReader(settings)
    profile = select_profile(settings, machine)
    volume = here and settings.models_dir.is_dir()
    resolved = auto_quantization.resolve_quantization(settings, machine, profile, shapes, volume=volume)
    ref = served_model.served_reference(resolved)
    directory = served_model.served_folder(settings.models_dir, ref)
    shape = shapes.read(ref, directory, on_cpu=settings.vram_profile == "cpu",
                        overrides=served_model.config_overrides(settings, profile))
    disk_free_bytes = draft_disk_bytes = None
    if volume and directory is None and not ref.is_local:
        disk_free_bytes = served_model.available_bytes(settings.models_dir, ref)
        draft_disk_bytes = disk_free_bytes - shape.disk_bytes
    elif volume:
        draft_disk_bytes = disk.disk_free(settings.models_dir)
    known_good_path = known_good.location(resolved, machine, profile, shape)
    files = served_model.model_files(resolved, ref)
    check_model(files, resolved)
    inputs = PlanInputs(PlanSettings.of(resolved), machine, profile, shape, disk_free_bytes,
                        chat=_chat_format(resolved, profile, files), task=task.read(files, shape.architecture))
    if volume and (options := known_good.read(known_good_path)):
        candidate = replace(inputs, known_good=options)
        if isinstance(make_plan(candidate), Refusal):
            log.warning("Ignoring known-good options that no longer fit path=%s", known_good_path)
        else:
            inputs = candidate
    return Deployment(inputs, ref, directory, draft_disk_bytes, known_good_path)


def _chat_format(settings: Settings, profile: Profile, files: Files) -> ChatFormat:
    """Read the format of the model's conversations; a chat template of the user replaces the model's."""
    options = {**profile.engine, **vllm_options.parse_arguments(settings.vllm_extra_args)}
    template = str(options.get("chat-template", ""))
    if template and not set(template) & set("{}\n"):  # vLLM takes a path, or the template itself
        try:
            template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"VLLM_EXTRA_ARGS: --chat-template {template}: cannot be read: {error}.",
                                "Mount the file, and write its path inside the container.",
                                code="unreadable_chat_template") from error
    return chat_format.read(files, template)


def select_profile(settings: Settings, hardware: Hardware, directory: Path = PROFILES) -> Profile:
    """Return the profile that VRAM_PROFILE names; `auto` fixes no option.

    Raises:
        SettingsError: `auto` without a GPU, or an unknown or invalid profile.
    """
    if settings.vram_profile != AUTO:
        return load(settings.vram_profile, directory)
    require_gpus(hardware, AUTO)
    return automatic()
