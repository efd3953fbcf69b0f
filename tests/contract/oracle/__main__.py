"""Write the oracle's records: `PYTHONPATH=tests python -m contract.oracle [NAME ...]`.

Every record is computed in a process of its own that is forked after the imports; one that fails leaves its last line
in the file's `missing`, and the rest of its words in the log folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from contract.oracle import cuda_platform, store

GPUS = (1, 2, 4)
_ERROR = re.compile(r"(?:[\w.]+(?:Error|Exception)|Value error)\b[:,]")
SECONDS = 240
"""After which a record is given up."""


def main() -> int:
    """Compute what is asked for; exit code 1 where a record failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="stored models; all of them by default")
    parser.add_argument("--missing", action="store_true", help="only what is not there yet")
    parser.add_argument("--gpus", type=int, nargs="*", default=GPUS)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "oracle-log")
    arguments = parser.parse_args()
    arguments.log.mkdir(parents=True, exist_ok=True)
    by_capability: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in arguments.names or store.names():
        by_capability[tuple(store.load(name).get("capability", cuda_platform.CAPABILITY))].append(name)
    failed = 0
    for capability, names in by_capability.items():  # vLLM reads it once a process
        child = os.fork()
        if not child:
            os._exit(_run(names, capability, arguments))
        failed += os.waitpid(child, 0)[1] != 0
    return 1 if failed else 0


def _run(names: list[str], capability: tuple[int, ...], arguments: argparse.Namespace) -> int:
    """Compute the models of one compute capability; return 1 where a record failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as cache:
        platform = cuda_platform.install(cache, (capability[0], capability[1]))
        _import_models({name: store.load(name) for name in names})
        for name in names:
            failed += _complete(name, platform, arguments, Path(cache))
    return 1 if failed else 0


def _import_models(documents: Mapping[str, Mapping[str, Any]]) -> None:
    """Import once what the records need: the engine and the models' classes."""
    import transformers
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader
    import vllm.v1.engine.core  # noqa: F401
    from vllm.model_executor.models.registry import ModelRegistry, _try_load_model_cls

    for document in documents.values():
        for architecture in document["config"].get("architectures", []):
            getattr(transformers, architecture, None)
            if architecture in ModelRegistry.models:
                _try_load_model_cls(architecture, ModelRegistry.models[architecture])


def _complete(name: str, platform: type, arguments: argparse.Namespace, scratch: Path) -> int:
    """Compute a model's parts and store them; return how many failed."""
    from contract.oracle import headers
    from contract.oracle.patterns import compact

    document = store.load(name)
    folder = store.write_folder(document, scratch / "models" / name)
    truth, missing = document.setdefault("truth", {}), document.setdefault("missing", {})
    jobs: dict[str, Callable[[], Any]] = {}
    if document.get("headers") not in ("published", "packed"):
        jobs["tensors"] = lambda: compact(headers.derive(document, scratch / "headers" / name).items())
    for gpus in arguments.gpus:
        jobs[f"truth.{gpus}"] = lambda gpus=gpus: _truth(document, folder, gpus, platform)
    failed = 0
    for part, job in jobs.items():
        section, _, key = part.partition(".")
        if arguments.missing and (key in truth if key else section in document):
            continue
        missing.pop(part, None)
        result = _apart(job, arguments.log / f"{name}.{part}.log", scratch)
        if isinstance(result, str):
            missing[part] = result
            failed += 1
        elif key:
            truth[key] = result
        else:
            document[section] = result
        print(name, part, result if isinstance(result, str) else "done", flush=True)
    document["truth"] = {key: truth[key] for key in sorted(truth, key=int)}
    _shorten(document["truth"])
    if not missing:
        document.pop("missing")
    order = [key for key in document if key not in ("tensors", "truth", "missing")]
    store.save(name, {key: document[key] for key in (*order, "tensors", "truth", "missing") if key in document})
    return failed


def _truth(document: Mapping[str, Any], folder: Path, gpus: int, platform: type) -> dict[str, Any]:
    from contract.oracle.build import build, use_configuration
    from contract.oracle.truth import record

    if "remote_code" in document:
        use_configuration(document["config"]["model_type"], document["remote_code"])
    return record(build(folder, gpus, platform, **document.get("options", {})))


def _shorten(truth: dict[str, Any]) -> None:
    """Keep of the tensors for several GPUs those that differ from one GPU's, in shape."""
    whole = truth.get("1", {}).get("tensors")
    for gpus, record in truth.items():
        if gpus != "1" and whole and "tensors" in record:
            record["sharded"] = {pattern: kind[1] for pattern, kind in record.pop("tensors").items()
                                if list(whole.get(pattern, [])) != list(kind)}


def _apart(job: Callable[[], Any], log: Path, scratch: Path) -> Any:
    """The job's result, computed in a forked process; the last line of its words where it fails."""
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.alarm(SECONDS)
        status = 1
        try:
            result.write_text(json.dumps(job()), encoding="utf-8")
            status = 0
        finally:  # the parent's clean-up is not this process's
            if status:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if status == 0:
        log.unlink()
        return json.loads(result.read_text(encoding="utf-8"))
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)] or lines
    return errors[-1].replace(str(scratch), "")[:300] if errors else f"ended with status {status}"


if __name__ == "__main__":
    sys.exit(main())
