"""Readers and writers of the original layout's config files (`llava_llama`).

LLaVA-1.5, the released VoCo-LLaMA, Shikra and LLaMA-VID use this layout. Its config files name the vision tower but do
not describe it; the missing values are derived from the tensors' shapes.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vocojax.config import ModelConfig, ProjectorConfig, VisionConfig
from vocojax.convert.entries import DECODER
from vocojax.convert.huggingface import (
    Json,
    checked,
    read_decoder,
    read_json,
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

LOG = logging.getLogger(__name__)
_CLIP_HEAD, _EVA_HEAD = 64, 88  # width of a head, of all of OpenAI's CLIPs and of EVA-CLIP-g
# Names of OpenAI's CLIPs, also as directories.
_OPENAI = re.compile(r"(.*/)?clip-vit-(base|large)-patch\d+(-336)?/*")
_WIDEST = {False: 1024, True: 1408}  # widest tower with such heads, by whether it is EVA-CLIP
_EVA_DEPTH = 39  # BLIP-2 and LLaMA-VID run 39 of the 40 published blocks
_FITS: Mapping[str, Fit] = {"pad": "pad", "square": "crop"}  # by their image_aspect_ratio
# image_aspect_ratio of an export. `square` is stretched by the image processor of the tower's own directory, and the
# original code has nothing for the other fits.
_RATIOS: Mapping[Fit, str] = {"pad": "pad", "crop": "square", "square": "square"}


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
    width = typed(values, "mm_hidden_size", int, vision.width, where)
    if width != vision.width:
        raise ConvertError(f"{where}: mm_hidden_size is {width}, and the vision tower is {vision.width} wide; pass the "
                           "tower that belongs to these weights")
    decoder = read_decoder({name: value for name, value in values.items() if name in DECODER}, where)
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


def tower_directory(values: Mapping[str, Any], where: str) -> Path | None:
    """Returns the tower's own directory, if `mm_vision_tower` names one that is here and has a config.

    A relative name is looked up beside the config file, and then, as the original code does, in the working directory.

    Args:
      values: the config file's content.
      where: the config file.

    Raises:
      ConvertError: the entry is not a string.
    """
    name = _tower_name(values, where)
    homes = (Path(where).parent / name, Path(name)) if name else ()
    return next((home for home in homes if (home / "config.json").is_file()), None)


def _tower_name(values: Mapping[str, Any], where: str) -> str:
    return typed(values, "mm_vision_tower", str, "", where) or typed(values, "vision_tower", str, "", where)


def vision_of_tensors(values: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> VisionConfig:
    """Reads the config of the vision tower among the tensors.

    It is the entry `vision_config`, which vocojax's exports have; or the tower's own config.json, see
    `tower_directory`; or, for OpenAI's CLIPs and EVA-CLIP-g, it is derived from the tensors' shapes.

    Args:
      values: the config file's content.
      shapes: shapes of all tensors, by the names of this layout.
      where: the file, for errors.

    Raises:
      ConvertError: there are no tensors of a tower, or its number of heads, activation and epsilon are unknown.
    """
    is_eva = f"{TOWER}cls_token" in shapes
    select_layer = -1 if is_eva else typed(values, "mm_vision_select_layer", int, -2, where)
    if own := typed(values, "vision_config", dict, {}, where):
        return read_vision(own, where, select_layer)
    if not is_eva and (home := tower_directory(values, where)):
        path = home / "config.json"
        return read_vision(read_json(path), str(path), select_layer)
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
    name, head = _tower_name(values, where), _EVA_HEAD if is_eva else _CLIP_HEAD
    if not is_eva and name and not _OPENAI.fullmatch(name):
        raise ConvertError(f"{where}: mm_vision_tower is {name!r}, which is no directory here and not one of OpenAI's "
                           "CLIPs: heads, activation and epsilon are not in the tensors; put the tower's directory "
                           "there, or add its own config to this file as 'vision_config'")
    if width % head or width > _WIDEST[is_eva]:
        raise ConvertError(f"{where}: the number of heads of a vision tower of width {width} can't be derived from its "
                           "tensors; add the tower's own config to this file as 'vision_config'")
    if not is_eva and not name:
        LOG.warning("%s: names no mm_vision_tower; the tower is taken for one of OpenAI's CLIPs, with %d heads", where,
                    width // head)
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


def require_writable(fit: Fit) -> None:
    """Raises `ConvertError` if the original code can't make images square in this way."""
    if fit not in _RATIOS:
        raise ConvertError(f"the layout 'llava' does not support the fit {fit!r}, which the original code does not "
                           f"have; supported are {', '.join(_RATIOS)}; use the layout 'huggingface'")


def write_llava(config: ModelConfig, rows: int, ids: Mapping[str, int | None], fit: Fit, tower: str) -> Json:
    """Returns the content of a config file. Its entry `vision_config` is vocojax's own; other readers ignore it.

    Args:
      config: the model.
      rows: rows of the vocabulary in the tensors.
      ids: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`.
      fit: how images become square, see `require_writable`.
      tower: name or directory of the vision tower.
    """
    vision, decoder = config.vision, write_decoder(config.decoder, rows, ids)
    if (scaling := config.decoder.rope_scaling) is not None and scaling.kind == "linear":
        decoder["rope_scaling"] = {"type": "linear", "factor": scaling.factor}  # as transformers 4.37 demands it
    return {
        **decoder, "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama", "mm_vision_tower": tower, "vision_config": write_vision(vision),
        "mm_hidden_size": vision.width, "mm_projector_type": config.projector.kind,
        "mm_vision_select_layer": vision.select_layer, "mm_vision_select_feature": "patch", "use_mm_proj": True,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": _RATIOS[fit],
    }
