"""Recording of the configuration classes' defaults and key names into src/shoehorn/model; run after an upgrade.

usage: python tools/record_model_defaults.py [--print]
The reader of config.json uses this recording instead of importing transformers. A test records again and compares.
Classes whose module needs a library that is not installed are left out.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from shoehorn.model.config_names import ATTRIBUTES  # noqa: E402 - the package is not installed where this runs

TARGET = ROOT / "src" / "shoehorn" / "model" / "model_defaults.json"


def classes() -> Iterator[tuple[str, Any]]:
    """Yield each model type and its class: vLLM's own where it has one, as vLLM prefers it."""
    from transformers import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for model_type in sorted({*CONFIG_MAPPING, *_CONFIG_REGISTRY}):
        try:
            yield model_type, (_CONFIG_REGISTRY if model_type in _CONFIG_REGISTRY else CONFIG_MAPPING)[model_type]
        except ImportError:
            continue


def entry(config_class: Any) -> dict[str, Any]:
    """Return the defaults of one class, its other names of attributes, and the model types of its sections."""
    defaults = {name: parameter.default for name, parameter in
                inspect.signature(config_class.__init__).parameters.items()}
    defaults |= {name: getattr(config_class, name) for name in ATTRIBUTES if hasattr(config_class, name)}
    names = {name: own for name, own in getattr(config_class, "attribute_map", {}).items() if name in ATTRIBUTES}
    relevant = {*ATTRIBUTES, *names.values()}
    values = {name: value for name, value in defaults.items()
              if name in relevant and type(value) in (int, float, bool, str)}
    sections = {name: section.model_type for name, section in getattr(config_class, "sub_configs", {}).items()
                if getattr(section, "model_type", "")}
    content = {"defaults": dict(sorted(values.items())), "names": dict(sorted(names.items())),
             "sections": dict(sorted(sections.items()))}
    return {key: value for key, value in content.items() if value}


def record() -> dict[str, Any]:
    """Return the entry of every model type."""
    return {model_type: content for model_type, config_class in classes() if (content := entry(config_class))}


def lines(entries: Mapping[str, Any]) -> str:
    """Write one model type per line."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in entries.items()) + "\n}\n"


def main() -> int:
    """Write the recording, or print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    text = lines(record())
    if parser.parse_args().print:
        print(text, end="")
    else:
        TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
