"""Conversion to INT4: what comes out, what is refused, and that nothing is lost when it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from plans import HUGE, machine, planned
from safetensors.torch import load_file, save_file

from fakes import captured
from fakes.hub import Hub
from shoehorn import checkpoint, convert, converted, int4, int4_layout, settings, store
from shoehorn.convert import Wish
from shoehorn.errors import ModelUnavailableError, SettingsError, ShoehornError
from shoehorn.int4_layout import BOUND, KEPT, Bits, Outline
from shoehorn.plan import Plan
from shoehorn.settings import Settings

MODEL = "owner/little"
HIDDEN, INNER, VOCAB, LAYERS = 256, 512, 512, 6
INT4 = Bits(4, 4)


def write_model(folder: Path, layers: int = LAYERS, hidden: int = HIDDEN) -> Path:
    """A Llama with random weights, one shard a layer and one for the rest."""
    random = torch.Generator().manual_seed(3)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * 0.02).to(torch.bfloat16)

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{
        "model.embed_tokens.weight": matrix(VOCAB, hidden), "lm_head.weight": matrix(VOCAB, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}]
    for layer in range(layers):
        sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 2, hidden),
                 "self_attn.v_proj": (hidden // 2, hidden), "self_attn.o_proj": (hidden, hidden),
                 "mlp.gate_proj": (INNER, hidden), "mlp.up_proj": (INNER, hidden), "mlp.down_proj": (hidden, INNER)}
        shards.append({f"model.layers.{layer}.{name}.weight": matrix(*size) for name, size in sizes.items()}
                      | {f"model.layers.{layer}.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
                         f"model.layers.{layer}.self_attn.q_proj.bias": torch.zeros(hidden, dtype=torch.bfloat16)})
    places = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "torch_dtype": "bfloat16", "tie_word_embeddings": False}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "little")


def local(home: Path, model: Path, **more: str) -> dict[str, str]:
    (home / "models").mkdir(exist_ok=True)
    return {"MODEL_ID": str(model), "MODEL_SOURCE": "local", "MODELS_DIR": str(home / "models"),
            "RUN_DIR": str(home / "run"), "QUANTIZATION": "int4", **more}


def in_here(environment: dict[str, str], wish: Wish = Wish()) -> Path:  # noqa: B008  # it is frozen
    """A conversion by a thread of this process; those that `start` begins have their own processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "_workers", lambda: ThreadPoolExecutor(1))
        return convert.convert(settings.load(environment), wish, lambda _: None)


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    source = str(Path(store.__file__).parents[1])
    return subprocess.Popen([sys.executable, "-m", "shoehorn.cli", "convert", "--json", *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**environment, "PATH": os.environ["PATH"], "PYTHONPATH": source})


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_linears_embedding_and_head_are_quantized_and_the_rest_is_as_it_was(tmp_path: Path, model: Path,
                                                                           bits: int) -> None:
    folder = in_here(local(tmp_path, model), Wish(bits))
    before, after = all_tensors(model), all_tensors(folder)
    errors = json.loads((folder / "conversion.json").read_text())["shards"]
    errors = {name: error for shard in errors.values() for name, error in shard["errors"].items()}
    for name, tensor in before.items():
        outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        if tensor.dim() != 2 or (outer and bits == 16):
            assert torch.equal(after.pop(name), tensor)
            continue
        packed, scale, shape = (after.pop(f"{name}_{part}") for part in ("packed", "scale", "shape"))
        again = int4.dequantize(packed, scale, bits if outer else 4)
        assert shape.tolist() == list(tensor.shape)
        error = float((again - tensor.float()).norm() / tensor.float().norm())
        assert error == pytest.approx(errors[name], rel=1e-2)
        assert error < (0.01 if outer and bits == 8 else 0.11)
    assert not after
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: index[name] for path in folder.glob("*.safetensors") for name in load_file(path)} == index
    assert (folder / "tokenizer.json").exists()
    found = checkpoint.read(store.LocalFiles(folder))
    assert (found.quantization, found.packed_embedding) == ("compressed-tensors", bits != 16)


def test_what_is_planned_before_is_what_comes_out(tmp_path: Path, model: Path) -> None:
    wanted = settings.load(local(tmp_path, model))
    before = converted.shape(wanted, None)
    after = converted.shape(wanted, in_here(local(tmp_path, model), Wish(8)))
    assert before.tensor_bytes == after.tensor_bytes
    assert before.kv_layers == after.kv_layers


@pytest.mark.parametrize(("name", "bits", "gigabytes"), [
    ("deepseek-r1-distill-llama-70b", INT4, 36.4), ("deepseek-r1-distill-llama-70b", KEPT, 39.5),
    ("mixtral-8x7b-instruct-v0.1", BOUND, 24.5), ("qwen3-30b-a3b", BOUND, 16.4), ("deepseek-v2-lite-chat", BOUND, 8.4),
    ("gemma-3-12b-it", BOUND, 8.4)])
def test_true_models_keep_their_shape_and_shrink(name: str, bits: Bits, gigabytes: float) -> None:
    files = captured.files(name)
    made = int4_layout.layout(files, bits)
    found, whole = checkpoint.read(Outline(files, made)), checkpoint.read(files)
    assert found.weights_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)
    assert found.notes == whole.notes
    assert found.experts == whole.experts
    for shard in made.shards:
        ends = sorted((begin, item.source.name) for item in shard.items for begin in item.places.values())
        assert ends[0][0] == len(shard.header)
    ignored = made.config["quantization_config"]["ignore"]
    assert not any(name.endswith(("_proj", "experts")) and ".layers." in name and "vision" not in name
                   for name in ignored), ignored[:5]


def test_routers_are_left_alone() -> None:
    ignored = int4_layout.layout(captured.files("qwen3-30b-a3b"), KEPT).config["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.gate" in ignored
    assert "model.layers.47.mlp.gate" in ignored


def test_matrices_that_128_does_not_divide_get_smaller_groups(tmp_path: Path) -> None:
    folder = in_here(local(tmp_path, write_model(tmp_path / "odd", 1, 192)))
    assert json.loads((folder / "conversion.json").read_text())["group"] == 64


def test_a_tied_embedding_stays_as_it_is() -> None:
    made = int4_layout.layout(captured.files("gemma-3-12b-it"), BOUND)
    assert made.bits == KEPT


@pytest.mark.parametrize(("change", "words"), [
    ({"quantization_config": {"quant_method": "awq"}}, "quantized already, by awq"),
    ({"architectures": ["FalconForCausalLM"]}, "layers of FalconForCausalLM are not understood")])
def test_what_would_not_be_served_is_refused_by_name(tmp_path: Path, change: dict[str, object], words: str) -> None:
    model = write_model(tmp_path / "strange", 1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SettingsError, match=words):
        in_here(local(tmp_path, model))
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_a_weight_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    model = write_model(tmp_path / "broken", 1)
    shard = model / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(ModelUnavailableError, match=r"mlp\.up_proj\.weight holds a number that is not finite"):
        in_here(local(tmp_path, model))
    assert converted.locate(settings.load(local(tmp_path, model))) is None


def test_embedding_and_head_get_8_bits_where_4_lose_too_much(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tails", 1)
    shard = model / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    noise = torch.rand(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)).clamp_min(0.01)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].float() / noise).to(torch.bfloat16)
    save_file(tensors, shard)
    journal = converted.read_journal(in_here(local(tmp_path, model)))
    assert journal
    assert (journal.embedding, journal.head) == (4, 8)


def test_for_the_cpu_both_stay_as_they_are(tmp_path: Path, model: Path) -> None:
    journal = converted.read_journal(in_here(local(tmp_path, model, VRAM_PROFILE="cpu")))
    assert journal
    assert journal.bits == KEPT


def test_a_quantized_embedding_is_refused_on_the_cpu_with_what_to_type(tmp_path: Path, model: Path) -> None:
    in_here(local(tmp_path, model), Wish(4))
    wanted = settings.load(local(tmp_path, model, VRAM_PROFILE="cpu"))
    shape = converted.shape(wanted, converted.served(wanted))
    with pytest.raises(SettingsError, match="embedding is quantized") as error:
        planned(machine(), shape, VRAM_PROFILE="cpu", QUANTIZATION="int4")
    assert "shoehorn models rm" in error.value.remedy


def test_a_plan_takes_the_converted_model_for_what_it_is() -> None:
    files = captured.files("deepseek-r1-distill-llama-70b")
    shape = checkpoint.read(Outline(files, int4_layout.layout(files, BOUND)))
    plan = planned(machine(HUGE), shape, QUANTIZATION="int4")
    assert isinstance(plan, Plan)
    assert "quantization" not in plan.engine_args
    with pytest.raises(SettingsError, match="contradict"):
        planned(machine(HUGE), shape, QUANTIZATION="int4", VLLM_EXTRA_ARGS="--quantization bitsandbytes")


@pytest.fixture
def whole(tmp_path: Path, model: Path) -> dict[str, str]:
    (tmp_path / "whole").mkdir()
    return content(in_here(local(tmp_path / "whole", model), Wish(8)))


@pytest.mark.fault("`kill -9` of a conversion, wherever it is",
                   "Nothing is served; it goes on with the shard that it was at, and ends with the same bytes.")
def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path, model: Path, whole: dict[str, str]) -> None:
    environment = local(tmp_path, model)
    folder = converted.folder(settings.load(environment))
    done: dict[str, int] = {}
    for most in (0, 2, 5):
        with start(environment, "--embedding", "8") as process:
            wait(lambda: process.poll() is not None or len(journalled(folder)) > most)  # noqa: B023  # at once
            workers = psutil.Process(process.pid).children() if process.poll() is None else []
            process.kill()
            process.communicate()
        assert not psutil.wait_procs(workers, 10)[1], "workers outlive it"
        assert converted.locate(settings.load(environment)) is None
        times = {name: (folder / name).stat().st_mtime_ns for name in journalled(folder)}
        assert done.items() <= times.items(), "a finished shard was made again"
        done = times
    with start(environment, "--embedding", "8") as process:
        assert process.wait(100) == 0
    assert content(folder) == whole


def journalled(folder: Path) -> set[str]:
    journal = converted.read_journal(folder)
    return set(journal.shards) if journal else set()


def wait(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.fault("`kill -9` of a worker of the conversion, or memory that runs out",
                   "Exit code 4 in words, no worker is left; the next one ends with the same bytes.")
def test_a_killed_worker_ends_the_conversion_in_words(tmp_path: Path, model: Path, whole: dict[str, str]) -> None:
    environment = local(tmp_path, model)
    with start(environment, "--embedding", "8") as process:
        wait(lambda: process.poll() is not None or len(psutil.Process(process.pid).children()) > 1)
        workers = psutil.Process(process.pid).children()
        workers[-1].kill()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 4
        assert "A worker of the conversion was killed, most often because memory ran out." in err
        assert "Traceback" not in err
    assert not psutil.wait_procs(workers, 10)[1]
    assert converted.locate(settings.load(environment)) is None
    with start(environment, "--embedding", "8") as process:
        assert process.wait(100) == 0
    assert content(converted.folder(settings.load(environment))) == whole


@pytest.mark.fault("`docker stop` or Ctrl-C while converting", "It ends at once; no worker is left.")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_conversion_leaves_no_process(tmp_path: Path, model: Path, number: signal.Signals) -> None:
    with start(local(tmp_path, model)) as process:
        wait(lambda: process.poll() is not None or len(psutil.Process(process.pid).children()) > 1)
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == 128 + number
    assert not psutil.wait_procs(workers, 10)[1]


@pytest.mark.fault("The disk fills while a model is converted",
                   "Exit code 4 in words; goes on where it stopped once there is room.")
def test_a_disk_that_fills_is_told_and_gone_on_with(tmp_path: Path, model: Path, whole: dict[str, str]) -> None:
    environment = local(tmp_path, model)
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "models").rglob("*.safetensors"))
    script = textwrap.dedent(f"""
        set -e
        mount -t tmpfs -o size={2 * size} none {tmp_path}/models
        dd if=/dev/zero of={tmp_path}/models/others bs=4096 count=1 status=none
        {sys.executable} -m shoehorn.cli convert --json --embedding 8 > {tmp_path}/out 2> {tmp_path}/err &
        until [ -e {tmp_path}/models/local/little.int4/conversion.json ]; do sleep 0.005; done
        dd if=/dev/zero of={tmp_path}/models/others bs=4096 status=none || true
        code=0; wait $! || code=$?
        echo "full: $code"
        truncate --size 0 {tmp_path}/models/others
        {sys.executable} -m shoehorn.cli convert --json --embedding 8 > {tmp_path}/out
        cd {tmp_path}/models/local/little.int4 && sha256sum *
        """)
    done = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, timeout=100,
                          env={**environment, "PATH": os.environ["PATH"],
                               "PYTHONPATH": str(Path(store.__file__).parents[1])})
    first, *rest = done.stdout.splitlines()
    assert first == "full: 4", done.stdout + done.stderr + (tmp_path / "err").read_text()
    assert "is full" in (tmp_path / "err").read_text()
    assert {line.split()[1]: line.split()[0] for line in rest} == whole


def test_too_little_space_is_told_before_a_shard_is_made(tmp_path: Path, model: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9, 9, 9, 9, 9, 9, 0, 255)))
    with pytest.raises(ModelUnavailableError, match="too small"):
        in_here(local(tmp_path, model))
    assert not list((tmp_path / "models").rglob("*.safetensors"))


class Pulled:
    """A volume with the model of a hub in it."""

    def __init__(self, home: Path, hub: Hub, **more: str) -> None:
        (home / "models").mkdir()
        self.environment = {"MODEL_ID": MODEL, "MODELS_DIR": str(home / "models"), "RUN_DIR": str(home / "run"),
                            "MODELSCOPE_ENDPOINT": hub.url, "QUANTIZATION": "int4", **more}
        store.pull(self.settings, lambda _: None)

    @property
    def settings(self) -> Settings:
        return settings.load(self.environment)

    def originals(self) -> list[str]:
        return sorted(path.name for path in (self.settings.models_dir / MODEL).glob("*.safetensors"))


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub({MODEL: model}) as running:
        yield running


def test_the_converted_model_is_one_of_the_volume(tmp_path: Path, hub: Hub) -> None:
    volume = Pulled(tmp_path, hub)
    folder = in_here(volume.environment)
    assert converted.served(volume.settings) == folder == tmp_path / "models" / f"{MODEL}.int4"
    assert len(volume.originals()) == LAYERS + 1
    listed = subprocess.run([sys.executable, "-m", "shoehorn.cli", "models", "--json"], capture_output=True, text=True,
                            check=True, env={**os.environ, **volume.environment}).stdout
    assert {entry["model"]: entry["complete"] for entry in json.loads(listed)} == {MODEL: True, f"{MODEL}.int4": True}
    made = (folder / "config.json").stat().st_mtime_ns
    assert in_here(volume.environment) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made, "it was made once"


def test_a_flipped_byte_of_the_result_is_found(tmp_path: Path, hub: Hub) -> None:
    volume = Pulled(tmp_path, hub)
    folder = in_here(volume.environment)
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert converted.served(volume.settings) is None
    assert in_here(volume.environment) == folder
    assert content(folder)[shard.name] == json.loads((folder / "conversion.json").read_text())["shards"][shard.name][
        "sha256"]


@pytest.mark.fault("`kill -9` of a conversion with KEEP_ORIGINAL=no",
                   "It goes on with what is left of the original, without the hub.")
def test_originals_make_way_and_a_killed_conversion_goes_on_without_the_hub(tmp_path: Path, hub: Hub) -> None:
    volume = Pulled(tmp_path, hub, KEEP_ORIGINAL="no")
    folder, original = converted.folder(volume.settings), store.locate(volume.settings)
    assert original is not None
    copies = shutil.copytree(original, tmp_path / "copies")
    with start(volume.environment) as process:
        wait(lambda: len(journalled(folder)) > 2)
        process.kill()
        process.communicate()
    assert converted.served(volume.settings) is None
    left = volume.originals()
    assert left, "it was killed in the middle"
    assert len(set(left) & journalled(folder)) <= 1
    noted = sorted(journalled(folder))[0]
    shutil.copyfile(copies / noted, original / noted)  # as a kill between the note and the removal leaves it
    assert store.locate(volume.settings) is None, "what has holes is not served"
    asked = len(hub.requests)
    assert converted.source(volume.settings) is not None, "it need not be pulled again"
    assert in_here(volume.environment) == folder
    assert len(hub.requests) == asked
    assert volume.originals() == []
    assert converted.served(volume.settings) == folder


def test_originals_of_ones_own_folder_are_never_removed(tmp_path: Path, model: Path) -> None:
    with pytest.raises(SettingsError, match="KEEP_ORIGINAL"):
        settings.load(local(tmp_path, model, KEEP_ORIGINAL="no"))


def test_without_the_original_it_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(ShoehornError) as error:
        in_here({"MODEL_ID": MODEL, "MODELS_DIR": str(tmp_path / "models"), "QUANTIZATION": "int4"})
    assert f"shoehorn pull {MODEL}" in str(error.value)
