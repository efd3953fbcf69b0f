"""vLLM options: the recording compared with vLLM's real parser; parsing of arguments and profiles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes import captured as captured_models
from fakes.checkpoint_files import dense
from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import HOME
from shoehorn.config import profiles, settings, vllm_options
from shoehorn.config.vllm_options import OWNED, REMOVED, check, parse_arguments, recorded
from shoehorn.deployment import inputs
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.model import checkpoint
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan

GIB = 1 << 30

# Runs in an environment with vLLM: records its parser, then parses each config file with it.
REAL_PARSER = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])  # of the modules next to it
spec = importlib.util.spec_from_file_location("recorder", sys.argv[1])
recorder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recorder)
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
result = {"options": recorder.record(parser), "parsers": recorder.record_parsers(), "parsed": {}}
for path in sys.argv[2:]:
    try:
        options = vars(parser.parse_args(["--config", path]))
        result["parsed"][path] = {name: value if isinstance(value, (int, float, str, dict, list)) else str(value)
                                  for name, value in options.items()}
    except SystemExit as error:
        result["parsed"][path] = f"refused: {error.code}"
print("RESULT" + json.dumps(result, default=str))
"""


@dataclass(frozen=True)
class Real:
    """Recorded options, names of parsers, and parsed config files of vLLM."""

    options: Mapping[str, Any]
    parsers: Mapping[str, list[str]]
    parsed: Mapping[str, Any]


def plans() -> dict[str, Mapping[str, object]]:
    """Return the vLLM options of several plans, by name."""
    gpu = Gpu(0, "", "RTX 5090", 32 * GIB, 32 * GIB, (12, 0), 5, 16, False)
    machine = Hardware((gpu,), "580", 64 * GIB, 64 * GIB, 8.0)
    tiny = checkpoint.read(dense(256, 768, 4, 4, 2, 2048, max_position=2048, tied=True))
    big = captured_models.shape("deepseek-r1-distill-llama-70b")
    cases = {"cpu": (tiny, {"VRAM_PROFILE": "cpu"}),
              "cpu-nf4": (tiny, {"VRAM_PROFILE": "cpu", "QUANTIZATION": "bitsandbytes"}),
              "ngram": (tiny, {"VRAM_PROFILE": "cpu", "SPECULATIVE": "ngram", "TRUST_REMOTE_CODE": "yes",
                               "VLLM_EXTRA_ARGS": "--no-enable-prefix-caching --cudagraph-capture-sizes 1 2 "
                                                  "--speculative-config.num_speculative_tokens 3"}),
              "limited": (big, {"VRAM_LIMIT": "24GiB", "MAX_MODEL_LEN": "4096"})}
    options: dict[str, Mapping[str, object]] = {}
    for name, (shape, environment) in cases.items():
        loaded = settings.load(environment)
        plan = make_plan(PlanInputs(PlanSettings.of(loaded), machine, inputs.select_profile(loaded, machine), shape))
        assert isinstance(plan, Plan), plan
        options[name] = plan.engine_args
    return options


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    """Run the real parser once: importing vLLM takes seconds."""
    folder = tmp_path_factory.mktemp("configs")
    configs = {**{f"profile-{name}": profiles.load(name).engine for name in profiles.names()},
               **{f"plan-{name}": options for name, options in plans().items()},
               **{f"removed-{name}": {name: 1} for name in REMOVED}}
    for name, options in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(dict(options)))
    paths = [str(folder / f"{name}.yaml") for name in configs]
    completed = subprocess.run([sys.executable, "-W", "ignore", "-c", REAL_PARSER,
                                str(HOME / "tools" / "record_engine_options.py"), *paths],
                               capture_output=True, text=True, check=True, timeout=300)
    result = json.loads(next(line for line in completed.stdout.splitlines() if line.startswith("RESULT"))[6:])
    return Real(result["options"], result["parsers"],
                {Path(path).stem: options for path, options in result["parsed"].items()})


@pytest.mark.contract
def test_recording_equals_the_real_parser(real: Real) -> None:
    document = json.loads((HOME / "src" / "shoehorn" / "config" / "vllm_options.json").read_text())
    assert document["engine"] == "vllm 0.32.0"
    assert document["options"] == real.options, "run tools/record_engine_options.py"


@pytest.mark.contract
def test_recorded_parsers_are_those_of_the_registries(real: Real) -> None:
    document = json.loads((HOME / "src" / "shoehorn" / "config" / "vllm_parsers.json").read_text())
    assert document == real.parsers, "run tools/record_engine_options.py"


@pytest.mark.contract
def test_every_profile_passes_the_real_parser(real: Real) -> None:
    for name in profiles.names():
        parsed = real.parsed[f"profile-{name}"]
        assert isinstance(parsed, dict), f"{name}: {parsed}"
        for option, value in profiles.load(name).engine.items():
            assert parsed[option.replace("-", "_")] == value, option


@pytest.mark.contract
def test_every_plan_passes_the_real_parser_unchanged(real: Real) -> None:
    for name, options in plans().items():
        parsed = real.parsed[f"plan-{name}"]
        assert isinstance(parsed, dict), f"{name}: {parsed}"
        for option, value in options.items():
            parsed_value = parsed[option.replace("-", "_")]
            assert parsed_value == value or json.loads(json.dumps(parsed_value)) == value, option


@pytest.mark.contract
def test_removed_options_are_rejected_by_the_real_parser(real: Real) -> None:
    for name in REMOVED:
        assert str(real.parsed[f"removed-{name}"]).startswith("refused"), name


def test_owned_options_exist_and_removed_ones_do_not() -> None:
    assert set(OWNED) <= set(recorded())
    assert not set(REMOVED) & set(recorded())


def test_arguments_are_parsed_as_vllm_parses_them() -> None:
    words = ("--max_model_len 8k --max-num-batched-tokens=2K -tp 2 --no-enforce-eager --enable-prefix-caching -O3 "
             "--seed -1 --cudagraph-capture-sizes 1 2 4 --gpu-memory-utilization .8 --kv-cache-dtype fp8 -q awq")
    assert parse_arguments(words.split()) == {
        "max-model-len": 8000, "max-num-batched-tokens": 2048, "tensor-parallel-size": 2, "enforce-eager": False,
        "enable-prefix-caching": True, "optimization-level": "3", "seed": -1, "cudagraph-capture-sizes": [1, 2, 4],
        "gpu-memory-utilization": 0.8, "kv-cache-dtype": "fp8", "quantization": "awq"}


def test_json_options_and_nested_keys_are_merged() -> None:
    words = ['--additional-config={"method": "ngram", "x": {"y": 1}}', "--additional-config.num_speculative_tokens",
             "5", "--additional-config.x.z", "word"]
    assert parse_arguments(words) == {"additional-config": {
        "method": "ngram", "num_speculative_tokens": 5, "x": {"y": 1, "z": "word"}}}


def test_last_value_of_an_option_wins() -> None:
    assert parse_arguments(["--max-num-seqs", "1", "--max-num-seqs", "2"]) == {"max-num-seqs": 2}


@pytest.mark.parametrize(("words", "expected"), [
    ("--max-modle-len 3", "did you mean --max-model-len?"),
    ("--swap-space 4", "--swap-space was removed"),
    ("--max-seq-len-to-capture 4", "max-cudagraph-capture-size"),
    ("--disable-log-requests", "--disable-log-requests was removed"),
    ("--port 1", "set PORT instead"),
    ("--api-key x", "set API_KEY instead"),
    ("--uds /x", "--uds is set by Shoehorn"),
    ("--no-trust-remote-code", "set TRUST_REMOTE_CODE instead"),
    ("--ssl-keyfile=/x", "--ssl-keyfile is set by Shoehorn"),
    ("--trust-request-chat-template", "is set by Shoehorn"),
    ("--model x", "set MODEL_ID instead"),
    ("--enforce-eager=true", "write --enforce-eager or --no-enforce-eager"),
    ("--dtype bf8", "auto, bfloat16"),
    ("--max-num-seqs many", "'many'"),
    ("--max-model-len auto", "write it like 8192 or 8k"),
    ("--max-model-len 1.5K", "write it like 8192 or 8k"),
    ("--cpu-offload-gb -1", "'-1'"),
    ("--cpu-offload-gb nan", "'nan'"),
    ("--cpu-offload-gb much", "'much'"),
    ("--max-num-seqs", "--max-num-seqs: value missing"),
    ("--max-num-seqs --enforce-eager", "--max-num-seqs: value missing"),
    ("--max-num-seqs.x 1", "--max-num-seqs.x"),
    ("--compilation-config {bad", "JSON"),
    ("--limit-mm-per-prompt image=2", "'image=2' is not a JSON object"),
    ("--compilation-config 3", "'3' is not a JSON object"),
    ("--speculative-config []", "is not a JSON object"),
    ("--compilation-config.modes 3", "unknown key 'modes'; did you mean mode?"),
    ("--speculative-config.num_speculative_token 3", "did you mean num_speculative_tokens"),
    ("--quantization awk", "'awk' is not one of"),
    ("--load-format bogus", "'bogus' is not one of"),
    ("-x", "unknown vLLM option -x"),
    ("meta-llama/x", "'meta-llama/x' is not an option"),
    ("--", "'--' is not an option"),
    ("--no-max-model-len", "unknown vLLM option --no-max-model-len"),
])
def test_invalid_argument_is_reported(words: str, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_arguments(words.split())
    assert expected in caught.value.cause
    assert caught.value.cause.startswith("VLLM_EXTRA_ARGS: ")
    assert len(caught.value.cause.splitlines()) == 1


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_arguments(["--swap-space", "4", "--port", "3", "--dtype", "bf8", "--max-num-seqs", "2"])
    assert len(caught.value.cause.splitlines()) == 3


@pytest.mark.parametrize(("name", "value", "result"), [
    ("max-model-len", 512, 512), ("max-model-len", "8k", 8000), ("enforce-eager", True, True),
    ("gpu-memory-utilization", 1, 1.0), ("cudagraph-capture-sizes", [1, 2], [1, 2]),
    ("compilation-config", {"mode": 0}, {"mode": 0}), ("cpu-offload-params", "experts", ["experts"]),
])
def test_value_of_a_profile_is_converted_like_an_argument(name: str, value: object, result: object) -> None:
    assert check(name, value) == result


@pytest.mark.parametrize(("name", "value"), [
    ("enforce-eager", "yes"), ("disable-log-stats", False), ("max-model-len", True), ("max-model-len", None),
    ("max-model-len", [1]), ("max-model-len", {"a": 1}), ("cudagraph-capture-sizes", []),
    ("cudagraph-capture-sizes", [True]), ("swap-space", 4), ("host", "0.0.0.0"), ("max-len", 3),
])
def test_invalid_value_of_a_profile_is_reported_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        check(name, value)


def test_planning_commands_do_not_import_the_engine() -> None:
    completed = subprocess.run(
        [sys.executable, "-c",
         "import sys, shoehorn.planner.build, shoehorn.commands.plan, shoehorn.commands.profiles; "
         "print(sorted({'vllm', 'torch', 'modelscope'} & set(sys.modules)))"],
        capture_output=True, text=True, check=True, cwd=HOME / "src")
    assert completed.stdout.strip() == "[]"
    assert vllm_options.__file__


@pytest.mark.parametrize(("words", "mistake"), [
    (["--compilation-config", '{"mode": "three"}'], "mode: 'three' is not one of 0, 1, 2, 3"),
    (["--compilation-config", '{"cudagraph_capture_sizes": "1,2"}'], "cudagraph_capture_sizes: '1,2' is not a list"),
    (["--compilation-config", '{"pass_config": {"fuse_nrm": true}}'], "did you mean fuse_norm_quant?"),
    (["--compilation-config", '{"pass_config": {"fuse_norm_quant": 5}}'], "fuse_norm_quant: 5 is not true or false"),
    (["--speculative-config", '{"method": "ngrm"}'], "did you mean ngram"),
    (["--speculative-config.num_speculative_tokens", "three"], "num_speculative_tokens: 'three' is not an integer"),
    (["--kv-transfer-config", '{"kv_role": "both"}'], "did you mean kv_both?"),
    (["--override-generation-config", '{"temperature": "warm"}'], "temperature: 'warm' is not a number"),
    (["--limit-mm-per-prompt", '{"image": "two"}'], "image: 'two' is not a JSON object or an integer"),
    (["--attention-config", '{"backend": "FLASH_ATTM"}'], "did you mean FLASH_ATTN"),
    (["--lora-modules", "german"], "'german' is not NAME=FOLDER"),
    (["--lora-modules", '{"name": "a", "pat": "b"}'], "needs the keys name and path"),
])
def test_values_inside_json_options_are_checked(words: list[str], mistake: str) -> None:
    with pytest.raises(SettingsError) as caught:
        vllm_options.parse_arguments(words)
    assert mistake in caught.value.cause


@pytest.mark.parametrize("words", [
    ["--compilation-config", '{"mode": 3, "cudagraph_mode": "PIECEWISE", "pass_config": {"fuse_norm_quant": "true"}}'],
    ["--compilation-config", '{"pass_config": {"fuse_act_quant": 1}, "cudagraph_capture_sizes": [1, 2]}'],
    ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": "3", "prompt_lookup_max": 4}'],
    ["--kv-transfer-config", '{"kv_connector": "X", "kv_role": "kv_both", "kv_connector_extra_config": {"a": 1}}'],
    ["--limit-mm-per-prompt", '{"image": 2, "video": {"count": 1, "num_frames": 32}}'],
    ["--override-generation-config", '{"temperature": 1, "top_k": 20, "eos_token_id": [1, 2]}'],
    ["--lora-modules", "a=/x/b=c", '{"name": "b", "path": "/y", "base_model_name": "z"}'],
])
def test_values_that_the_engine_converts_are_accepted(words: list[str]) -> None:
    assert vllm_options.parse_arguments(words)
