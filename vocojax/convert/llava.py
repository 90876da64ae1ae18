"""Readers and writers of the original layout's config files (`llava_llama`).

LLaVA-1.5, the released VoCo-LLaMA, Shikra and LLaMA-VID use this layout. Its config files name the vision tower but do
not describe it; the missing values are derived from the tensors' shapes.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vocojax.config import ModelConfig, ProjectorConfig, VisionConfig
from vocojax.convert.huggingface import (
    Json,
    checked,
    read_decoder,
    read_vision,
    read_voco,
    typed,
    write_decoder,
    write_vision,
)
from vocojax.convert.tables import TOWER
from vocojax.data.images import Fit
from vocojax.errors import ConvertError
from vocojax.weights import Shape

# Width of a head, and the widest tower that has such heads: CLIP ViT-B and ViT-L (ViT-H differs), and EVA-CLIP-g.
_CLIP_HEAD, _EVA_HEAD = (64, 1024), (88, 1408)
_EVA_DEPTH = 39  # BLIP-2 and LLaMA-VID run 39 of the 40 published blocks
_FITS: Mapping[str, Fit] = {"pad": "pad", "square": "crop"}  # by their image_aspect_ratio
_PUBLISHED = {336: "openai/clip-vit-large-patch14-336", 224: "openai/clip-vit-large-patch14"}


def read_llava(values: Mapping[str, Any], vision: VisionConfig, projector: ProjectorConfig, where: str) -> ModelConfig:
    """Reads the config of a model, given its tower and its projector.

    Args:
      values: the config file's content.
      vision: the tower, see `vision_of_tensors`.
      projector: see `read_projector`.
      where: the file, for errors.

    Raises:
      ConvertError: a value is invalid or not supported.
    """
    if values.get("mm_vision_select_feature", "patch") != "patch":
        raise ConvertError(f"{where}: mm_vision_select_feature must be 'patch', got "
                           f"{values['mm_vision_select_feature']!r}: the class token can't be a vision token here")
    decoder = read_decoder(values, where)
    return checked(where, lambda: ModelConfig(vision, projector, decoder, read_voco(values, where)))


def read_projector(values: Mapping[str, Any], names: Iterable[str], where: str) -> ProjectorConfig:
    """Reads the projector's kind from the config file, or else from the tensors' names; the default is LLaVA-1.5's.

    Args:
      values: the config file's content.
      names: names of all tensors.
      where: the file, for the error.

    Raises:
      ConvertError: the kind is not supported.
    """
    is_linear = any(name.endswith("mm_projector.weight") for name in names)
    by_tensors = "linear" if is_linear else "mlp2x_gelu"
    kind = values.get("mm_projector_type", by_tensors)
    if kind not in ("linear", "mlp2x_gelu"):
        raise ConvertError(f"{where}: mm_projector_type must be 'linear' or 'mlp2x_gelu', got {kind!r}")
    return ProjectorConfig(kind)


def vision_of_tensors(values: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> VisionConfig:
    """Reads the vision tower from the entry `vision_config`, which vocojax's exports have, or else from the tensors.

    Args:
      values: the config file's content.
      shapes: shapes of all tensors, by the names of this layout.
      where: the file, for errors.

    Raises:
      ConvertError: there are no tensors of a tower, or the number of heads can't be derived from them.
    """
    is_eva = f"{TOWER}cls_token" in shapes
    select_layer = -1 if is_eva else typed(values, "mm_vision_select_layer", int, -2, where)
    if own := typed(values, "vision_config", dict, {}, where):
        return read_vision(own, where, select_layer)
    names = (("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", r"blocks\.(\d+)\..*") if is_eva else
             ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
              "encoder.layers.0.mlp.fc1.weight", r"encoder\.layers\.(\d+)\..*"))
    tower = {name.removeprefix(TOWER).removeprefix("vision_model."): shape for name, shape in shapes.items()
             if name.startswith(TOWER)}
    patch, position, mlp, layer = names
    if absent := [name for name in (patch, position, mlp) if name not in tower]:
        raise ConvertError(f"{where}: no vision tower among the tensors ({TOWER}{absent[0]} is missing); pass its "
                           "directory or file as --vision")
    depth = 1 + max(int(found[1]) for name in tower if (found := re.fullmatch(layer, name)))
    width, patch_size = tower[patch][0], tower[patch][-1]
    head, widest = _EVA_HEAD if is_eva else _CLIP_HEAD
    if width % head or width > widest:
        raise ConvertError(f"{where}: the number of heads of a vision tower of width {width} can't be derived from its "
                           "tensors; add the tower's own config to this file as 'vision_config'")
    return checked(where, lambda: VisionConfig(
        kind="eva" if is_eva else "clip",
        image_size=math.isqrt(tower[position][-2] - 1) * patch_size, patch_size=patch_size, width=width,
        depth=min(depth, _EVA_DEPTH) if is_eva else depth, num_heads=width // head,
        mlp_width=tower[mlp][0], select_layer=select_layer, norm_eps=1e-6 if is_eva else 1e-5,
    ))


def read_fit(values: Mapping[str, Any], where: str) -> Fit:
    """Reads from `image_aspect_ratio` how images become square; the default is LLaVA-1.5's padding.

    Raises:
      ConvertError: the value is not supported.
    """
    ratio = values.get("image_aspect_ratio") or "pad"
    if not isinstance(ratio, str) or ratio not in _FITS:
        raise ConvertError(f"{where}: image_aspect_ratio must be one of {', '.join(_FITS)}, got {ratio!r}")
    return _FITS[ratio]


def write_llava(config: ModelConfig, rows: int, ids: Mapping[str, int | None], fit: Fit) -> Json:
    """Returns the content of a config file. Its entry `vision_config` is vocojax's own; other readers ignore it.

    Args:
      config: the model.
      rows: rows of the vocabulary in the tensors.
      ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`.
      fit: how images become square.
    """
    vision = config.vision
    ratio = next(theirs for theirs, ours in _FITS.items() if ours == fit)
    published = _PUBLISHED.get(vision.image_size, "") if vision.kind == "clip" and vision.width == 1024 else ""
    return {
        **write_decoder(config.decoder, rows, ids), "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama", "mm_vision_tower": published, "vision_config": write_vision(vision),
        "mm_hidden_size": vision.width, "mm_projector_type": config.projector.kind,
        "mm_vision_select_layer": vision.select_layer, "mm_vision_select_feature": "patch", "use_mm_proj": True,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": ratio,
    }
