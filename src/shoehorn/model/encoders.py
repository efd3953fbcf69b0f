"""Encoders for images, videos and sound: the largest item that the engine accepts, and the width of their layers.

Rules: sizes follow from config.json, preprocessor_config.json and the tensors, never from the model's name; an encoder
whose largest item they do not give has `item_tokens` 0 and counts with one batch; a video counts with its frames only
where the engine gives each the size of an image (Qwen2-VL, Qwen2.5-VL).

Source: the processing information of the models of vLLM 0.32.0 (get_mm_max_tokens_per_item).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from shoehorn.common.units import ceil_div
from shoehorn.model.division import TOWER, Division
from shoehorn.model.safetensors import Tensor
from shoehorn.model.shape import Encoder, TensorGroup
from shoehorn.model.tensor_names import PACKED

PROCESSOR = "preprocessor_config.json"

_TOKENS = 16_384
"""Of the largest image of models that take any size, where preprocessor_config.json does not say."""

_TILES = {"internvl": 13, "internvl_chat": 13, "cohere2_vision": 13, "llama4": 17, "idefics3": 17, "smolvlm": 17,
          "lfm2_vl": 11}
"""Model types that cut an image into tiles, the whole one included -> at most so many by default."""

_SOFT_TOKENS = {"gemma4_vision": (280, 9), "gemma3n_vision": (256, 1)}
"""Model types of towers with a fixed number of tokens that config.json does not state -> tokens, patches of each."""

_FRAME_PAIRS = 7
_INNER = re.compile(r".*\.\d+\..*(?:fc1|gate_proj|up_proj|ffw_layer_1|intermediate\.dense|w1)(?:\.linear)?\.weight")
"""Matrices of a tower's layers into the inner width of their MLP."""

_SCALED_DOWN = re.compile(r"anyres_max_(\d+)")
_NUMBERED = re.compile(r"\.\d+\.")


def read_encoders(config: Mapping[str, Any], hidden: int, processor: Mapping[str, Any]) -> Iterator[Encoder]:
    """Yield the encoders of a multimodal model, without their tensors.

    Args:
        hidden: width of the text model.
        processor: content of preprocessor_config.json; empty if missing.
    """
    inner = config.get("thinker_config")
    if isinstance(inner, Mapping):
        config = inner
    vision, audio = config.get("vision_config"), config.get("audio_config")
    if isinstance(vision, Mapping):
        yield _vision(config, vision, hidden, processor)
    if isinstance(audio, Mapping) or config.get("is_encoder_decoder"):
        section = audio if isinstance(audio, Mapping) else config
        width = _number(section, "d_model", "hidden_size", default=1280)
        yield Encoder(("audio",), _number(section, "max_source_positions", default=1500), 1, width,
                      _number(section, "encoder_ffn_dim", "intermediate_size", default=4 * width), hidden)


def with_tensors(encoders: Iterable[Encoder], tensors: Iterable[Tensor], division: Division) -> tuple[Encoder, ...]:
    """Return the encoders with the sizes of their towers' tensors."""
    encoders = tuple(encoders)
    groups: defaultdict[tuple[bool, bool], list[Tensor]] = defaultdict(list)
    for tensor in tensors if encoders else ():
        if TOWER.search(tensor.name) and not division.unused.fullmatch(tensor.name):
            numbered, packed = bool(_NUMBERED.search(tensor.name)), bool(PACKED.fullmatch(tensor.name))
            groups[division.is_sound(tensor.name), division.divides_outside(tensor, numbered, packed)].append(tensor)

    def group(is_sound: bool, is_divided: bool) -> TensorGroup:
        members = groups[is_sound, is_divided]
        return TensorGroup(sum(tensor.bytes for tensor in members), sum(tensor.elements for tensor in members))

    def inner(is_sound: bool) -> int:
        return max((max(tensor.shape) for members in (groups[is_sound, True], groups[is_sound, False])
                    for tensor in members if tensor.shape and _INNER.fullmatch(tensor.name)), default=0)

    return tuple(replace(encoder, divided=group(is_sound, True), whole=group(is_sound, False),
                         inner=inner(is_sound) or encoder.inner)
                 for encoder in encoders for is_sound in ["audio" in encoder.modalities])


def _vision(config: Mapping[str, Any], vision: Mapping[str, Any], hidden: int, processor: Mapping[str, Any]) -> Encoder:
    width = _number(vision, "embed_dim", "hidden_size", default=hidden)
    inner = _number(vision, "intermediate_size", default=round(width * float(vision.get("mlp_ratio") or 4)))
    deep = vision.get("deepstack_visual_indexes")
    has_video = any(str(key).startswith("video_token") and value is not None for key, value in config.items()) or \
        config.get("model_type") in ("qwen2_vl", "qwen2_5_vl")
    tokens, patches, pixels = _item(config, vision, processor)
    longest = _FRAME_PAIRS if config.get("model_type") in ("qwen2_vl", "qwen2_5_vl") else 1
    return Encoder(("image", "video") if has_video else ("image",), tokens, patches, width, inner,
                   hidden * (1 + (len(deep) if isinstance(deep, list) else 0)), pixels, longest)


def _item(config: Mapping[str, Any], vision: Mapping[str, Any], processor: Mapping[str, Any]
          ) -> tuple[int, float, int]:
    """Return tokens of the largest image, patches of each, and the pixels of one where images have any size."""
    patch = _number(vision, "patch_size", "spatial_patch_size")
    merge = _merge(config, vision)
    if patch and _number(vision, "spatial_merge_size"):
        pixels = round(merge) * patch ** 2
        size = processor.get("size")
        limit = _number(processor, "max_pixels") or (_number(size, "longest_edge") if isinstance(size, Mapping) else 0)
        return limit // pixels or _TOKENS, merge, pixels
    size = _number(vision, "image_size")
    if patch and size and vision.get("model_type") == "pixtral":  # fills up the last patch of a row
        return ceil_div(size, round(patch * merge ** 0.5)) ** 2, merge, 0
    grid = (size // patch) ** 2 if patch and size else 0
    shapes = config.get("image_grid_pinpoints")
    if grid and isinstance(shapes, list):
        return *_of_shapes(config, shapes, patch, size // patch), 0
    fixed = _number(config, "mm_tokens_per_image", "max_image_tokens") or _number(vision, "num_image_tokens")
    tiles = _TILES.get(str(config.get("model_type")), 1)
    if fixed:
        return fixed * tiles, max(1.0, merge, grid / fixed), 0
    if str(vision.get("model_type")) in _SOFT_TOKENS:
        tokens, patches = _SOFT_TOKENS[str(vision["model_type"])]
        return tokens, float(patches), 0
    return round(grid / merge) * tiles, merge, 0


def _merge(config: Mapping[str, Any], vision: Mapping[str, Any]) -> float:
    """Return the patches that become one token."""
    side = _number(vision, "spatial_merge_size") or _number(config, "spatial_merge_size", "scale_factor",
                                                            "downsample_factor")
    for ratio in (config.get("downsample_ratio"), vision.get("pixel_shuffle_ratio")):
        if not side and isinstance(ratio, int | float) and 0 < ratio <= 1:
            return 1 / ratio ** 2
    kernel = vision.get("merge_kernel_size")
    if isinstance(kernel, list) and kernel:
        return float(_number({"side": kernel}, "side", default=1) ** 2)
    return float(max(1, side) ** 2)


def _of_shapes(config: Mapping[str, Any], shapes: list[Any], patch: int, side: int) -> tuple[int, float]:
    """Return tokens and patches of each for an image that is cut into tiles of `side` patches, in one of these shapes.

    A token ends each row. The tower computes the whole image and all tiles; `anyres_max_9` scales down what has more
    tokens than 9 tiles by at least a tenth of its sides.
    """
    sizes = [(shape[0] // patch, shape[1] // patch) for shape in shapes
             if isinstance(shape, list) and len(shape) == 2 and all(type(edge) is int for edge in shape)]
    tokens = max((rows * columns + rows for rows, columns in sizes), default=0)
    most = _SCALED_DOWN.fullmatch(str(config.get("vision_aspect_ratio")))
    if most:
        tiles = int(most[1])
        tokens = min(tokens, int(tiles * 1.1 ** 2 * side ** 2) + math.isqrt(tiles) * side)
    patches = max((rows * columns for rows, columns in sizes), default=0) + side ** 2
    return tokens + side ** 2, patches / (tokens + side ** 2)


def _number(section: Mapping[str, Any], *keys: str, default: int = 0) -> int:
    """Return the first positive integer under one of the keys, of a list its first."""
    for key in keys:
        value = section.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value > 0:
            return value
    return default
