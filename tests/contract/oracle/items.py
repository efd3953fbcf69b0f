"""Tokens of the largest items by vLLM's own processing information, without a processor.

`PYTHONPATH=tests python -m contract.oracle.items` prints {model: {modality: tokens}} as JSON. The processors of
transformers, which need torchvision and files of the checkpoint, are replaced by their settings.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from contract.oracle import stand_ins, store

CONTEXT = 131_072

_QWEN2 = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "max_pixels": 12_845_056, "min_pixels": 3136,
          "size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}
_QWEN3 = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2,
          "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-vl-7b-instruct": ("qwen2_vl.Qwen2VLProcessingInfo", _QWEN2),
    "qwen2.5-vl-7b-instruct": ("qwen2_5_vl.Qwen2_5_VLProcessingInfo", _QWEN2),
    "qwen3-vl-8b-instruct": ("qwen3_vl.Qwen3VLProcessingInfo", _QWEN3),
    "llava-1.5-7b-hf": ("llava.LlavaProcessingInfo", {"crop_size": {"height": 336, "width": 336}}),
    "llava-v1.6-mistral-7b-hf": ("llava_next.LlavaNextProcessingInfo", {}),
    "llava-onevision-qwen2-7b-ov-hf": ("llava_onevision.LlavaOnevisionProcessingInfo", {}),
    "mistral-small-3.1-24b-instruct": ("", {}), "pixtral-12b": ("", {})}
"""Model -> class of its processing information (of its tower where empty), settings of its processor."""


def figures(name: str, folder: Path) -> dict[str, int]:
    """Return the tokens of the largest items of a stored model."""
    from vllm.transformers_utils.config import get_config

    path, settings = MODELS[name]
    config = get_config(store.write_folder(store.load(name), folder), trust_remote_code=False)
    if not path:
        from vllm.model_executor.models.vision import get_vision_encoder_info

        tower = get_vision_encoder_info(config)
        size = tower.get_image_size()
        return {"image": tower.get_num_image_tokens(image_width=size, image_height=size)}
    module, _, class_name = path.partition(".")
    info_class = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), class_name)
    info = object.__new__(info_class)
    processor = SimpleNamespace(**settings)
    info.get_hf_config = lambda *_: config
    info.get_image_processor = info.get_video_processor = lambda **_: processor
    info.get_hf_processor = lambda **_: SimpleNamespace(
        image_processor=processor, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default")
    info._merge_and_resolve_mm_processor_kwargs = lambda _: {}
    info.ctx = SimpleNamespace(get_merged_mm_kwargs=dict, get_hf_config=lambda *_: config)
    tokens = {"image": info.get_max_image_tokens()}
    if settings is _QWEN2:
        tokens["video"] = info.get_max_video_tokens(CONTEXT, {"video": 1})
    return tokens


def main() -> int:
    """Print the figures of all models."""
    stand_ins.install()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps({name: figures(name, Path(scratch) / name) for name in MODELS}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
