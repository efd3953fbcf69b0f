"""Every option of every plan is one that vLLM's parser accepts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import yaml

from fakes import captured
from shoehorn.common.errors import SettingsError
from shoehorn.config.vllm_options import check, recorded
from shoehorn.planner.plan import Plan
from support.plans import GIB, machine, plan_for, tiny

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
UNEQUAL = machine(("NVIDIA GeForce RTX 4090", 23.6), ("NVIDIA GeForce RTX 3060", 11.6))
MODELS = (*captured.names(), *(f"{name}@int4" for name in (
              "deepseek-r1-distill-llama-70b", "qwen3-8b", "qwen3-30b-a3b", "mixtral-8x7b-instruct-v0.1",
              "deepseek-v2-lite-chat")),
          *(f"{name}@unordered" for name in ("llama-3.1-8b-instruct-gptq", "llama-3.3-70b-instruct-w4a16")))
WITH_SETTINGS = ("deepseek-r1-distill-llama-70b", "qwen2.5-32b-instruct-awq")
ENVIRONMENTS: tuple[Mapping[str, str], ...] = (
    {}, {"SPECULATIVE": "ngram"}, {"VRAM_LIMIT": "10GiB", "MAX_MODEL_LEN": "4096"},
    {"QUANTIZATION": "none", "SPECULATIVE": "off", "TRUST_REMOTE_CODE": "yes"})
SWITCHED_BY_SETTING = {"trust-remote-code"}
"""Options that VLLM_EXTRA_ARGS may not hold, but a plan may."""

# Runs where vLLM can be imported: one line of JSON a file, the values by option or the reason of the refusal.
REAL_PARSER = """
import dataclasses, enum, json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
def plain(value):
    if isinstance(value, enum.Enum):
        return value.name
    return vars(value) if dataclasses.is_dataclass(value) else str(value)
for path in sys.argv[1:]:
    try:
        parsed_options = vars(parser.parse_args(["--config", path]))
    except SystemExit as error:
        parsed_options = {"refused": str(error.code)}
    print("RESULT" + json.dumps(parsed_options, default=plain))
"""


@cache
def options_of_all_plans() -> tuple[Mapping[str, object], ...]:
    """The different sets of options of all plans, models on machines with settings."""
    machines = {name: captured.machine(name) for name in captured.machines()} | {"unequal": UNEQUAL}
    distinct: dict[str, Mapping[str, object]] = {}
    for model in MODELS:
        shape = captured.shape(model)
        for hardware in machines.values():
            for environment in ENVIRONMENTS if model in WITH_SETTINGS else ({},):
                try:
                    plan = plan_for(hardware, shape, **environment)
                except SettingsError:
                    continue
                if isinstance(plan, Plan):
                    distinct.setdefault(json.dumps(plan.engine_args, sort_keys=True), plan.engine_args)
    for path in sorted(GOLDEN.glob("*.json")):
        options = json.loads(path.read_text()).get("engine_args")
        if options:
            distinct.setdefault(json.dumps(options, sort_keys=True), options)
    cpu = plan_for(machine(ram=4), tiny(), VRAM_PROFILE="cpu", SPECULATIVE="ngram")
    assert isinstance(cpu, Plan)
    return (*distinct.values(), cpu.engine_args)


def test_every_option_of_every_plan_is_recorded() -> None:
    plans = options_of_all_plans()
    assert len(plans) > 200
    for options in plans:
        assert options.keys() <= recorded().keys(), options.keys() - recorded().keys()
        for option, value in options.items():
            if option not in SWITCHED_BY_SETTING:
                assert check(option, value) == value, option


def test_unequal_gpus_add_no_option() -> None:
    plan = plan_for(UNEQUAL, captured.shape("llama-3.1-8b-instruct"))
    assert isinstance(plan, Plan)
    assert plan.vram[0].limit_bytes > 20 * GIB, "the larger GPU alone"
    assert [each.value for each in plan.reasons if each.option == "gpus"] == [1]
    assert "gpus" not in plan.engine_args


@pytest.mark.contract
def test_every_option_of_every_plan_passes_the_real_parser(tmp_path: Path) -> None:
    plans = options_of_all_plans()
    for number, options in enumerate(plans):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(dict(options)))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", REAL_PARSER,
                           *(str(tmp_path / f"{number}.yaml") for number in range(len(plans)))],
                          capture_output=True, text=True, check=True, timeout=600)
    parsed = [json.loads(line.removeprefix("RESULT")) for line in done.stdout.splitlines()
              if line.startswith("RESULT")]
    assert len(parsed) == len(plans)
    for options, parsed_options in zip(plans, parsed, strict=True):
        assert "refused" not in parsed_options, options
        for option, value in options.items():
            parsed_value = parsed_options[option.replace("-", "_")]
            if option == "compilation-config" and isinstance(value, dict):  # the parser adds all other fields
                parsed_value = {field: parsed_value[field] for field in value}
            assert parsed_value == value, option
