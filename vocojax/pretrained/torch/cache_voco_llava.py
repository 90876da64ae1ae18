"""The VoCo cache: the keys and values of images' VoCo tokens, in files that vocojax reads and writes too.

    keys, values                [L, U, N, G, D] in the cache's dtype, or int8 with
    keys_scale, values_scale    float32 [L, U, N, G]: factors of the int8 values of each token and head
    metadata                    format; config and parameters (the model's fingerprint); position; images; dtype; sha256
"""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import safetensors
import torch
from safetensors.torch import save as to_safetensors

from .fingerprint_voco_llava import Fingerprint

FORMAT = "vocojax-voco-cache-1"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CacheError(ValueError):
    """A cache that can't be used for what was asked of it."""


@dataclasses.dataclass(frozen=True, eq=False)
class VocoCache:
    """Keys and values of the VoCo tokens of U units.

        cache = model.compress(processor(images=["photo.png"])["pixel_values"])
        cache.save("photo.safetensors")
        cache = model.load_cache("photo.safetensors")
        inputs = processor(text=prompt, voco_cache=cache)
        model.generate(**inputs, voco_cache=cache, max_new_tokens=64)

    Attributes:
      keys: [L, U, N, G, D], rotated to the positions that they have where the unit stands alone.
      values: [L, U, N, G, D].
      first_position: position of a unit's first VoCo token in the unit.
      image_digests: digest of each unit's pixels, U of them.
      fingerprint: fingerprint of the model whose keys they are.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first_position: int
    image_digests: tuple[str, ...]
    fingerprint: Fingerprint

    @property
    def num_units(self) -> int:
        """Number of units, U."""
        return self.keys.shape[1]

    @property
    def num_vocos(self) -> int:
        """Number of VoCo tokens per unit, N."""
        return self.keys.shape[2]

    def to(self, *args: object, **kwargs: object) -> "VocoCache":
        """Returns the cache on another device or in another dtype; arguments are those of `torch.Tensor.to`."""
        return self._with(lambda x: x.to(*args, **kwargs))  # type: ignore[call-overload]

    def take(self, units: slice) -> "VocoCache":
        """Returns the cache of some of the units."""
        return self._with(lambda x: x[:, units], image_digests=self.image_digests[units])

    def truncate(self, num_vocos: int) -> "VocoCache":
        """Returns the cache of every unit's first `num_vocos` VoCo tokens.

        A VoCo token sees only what stands before it, so text can be read after any number of them.

        Raises:
          CacheError: the cache has fewer.
        """
        if not 1 <= num_vocos <= self.num_vocos:
            raise CacheError(f"a cache of {self.num_vocos} VoCo tokens per unit can't be truncated to {num_vocos}")
        return self._with(lambda x: x[:, :, :num_vocos])

    @classmethod
    def concat(cls, caches: Sequence["VocoCache"]) -> "VocoCache":
        """Returns the units of several caches of one model, one after the other.

        Raises:
          CacheError: there is none, or they are of several models or of units of different lengths.
        """
        if not caches:
            raise CacheError("no cache to concatenate")
        first = caches[0]
        for index, cache in enumerate(caches):
            cache.require_model(first.fingerprint, f"cache {index}")
            if (cache.num_vocos, cache.first_position) != (first.num_vocos, first.first_position):
                raise CacheError(f"cache {index} has {cache.num_vocos} VoCo tokens per unit, cache 0 has "
                                 f"{first.num_vocos}: truncate them to one number first")
        return dataclasses.replace(
            first, keys=torch.cat([cache.keys for cache in caches], dim=1),
            values=torch.cat([cache.values for cache in caches], dim=1),
            image_digests=tuple(digest for cache in caches for digest in cache.image_digests),
        )

    def require_model(self, fingerprint: Fingerprint, name: str = "the cache") -> None:
        """Checks that the cache is of the model with this fingerprint.

        Raises:
          CacheError: it is not; the message says what differs.
        """
        if self.fingerprint != fingerprint:
            raise CacheError(f"{name} is of another model: {fingerprint.differences(self.fingerprint)}; compress its "
                             "images with this one")

    def save(self, path: str | os.PathLike[str], storage: Literal["exact", "int8"] = "exact") -> None:
        """Writes the cache to a file, which appears when it is complete.

        Args:
          path: the file.
          storage: `exact`, or `int8` for half of bfloat16's bytes and a small loss.

        Raises:
          CacheError: `storage` is neither.
          OSError: the file can't be written.
        """
        if storage not in ("exact", "int8"):
            raise CacheError(f"storage must be 'exact' or 'int8', got {storage!r}")
        tensors = {"keys": self.keys.detach().cpu(), "values": self.values.detach().cpu()}
        metadata = {
            "format": FORMAT, "config": self.fingerprint.config, "parameters": self.fingerprint.parameters,
            "position": str(self.first_position), "images": json.dumps(self.image_digests),
            "dtype": _name(tensors["keys"].dtype),
        }
        if storage == "int8":
            tensors = {name: part for key, tensor in tensors.items()
                       for name, part in zip((key, f"{key}_scale"), _quantise(tensor), strict=True)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        content = to_safetensors(tensors, metadata | {"sha256": _digest(metadata, tensors)})
        partial = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "VocoCache":
        """Reads a cache; `load_cache` of a model also checks that it is the model's.

        Raises:
          CacheError: the file is no cache, or is damaged.
          OSError: the file can't be read.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                raise CacheError(f"{path}: is no VoCo cache of format {FORMAT} but {metadata.get('format')!r}")
            if metadata.pop("sha256") != _digest(metadata, tensors):
                raise ValueError("its digest is not that of its content")
            dtype = _DTYPES[metadata["dtype"]]
            keys, values = (
                _dequantise(tensors[key], tensors[f"{key}_scale"], dtype) if f"{key}_scale" in tensors
                else tensors[key] for key in ("keys", "values")
            )
            return cls(keys, values, int(metadata["position"]), tuple(json.loads(metadata["images"])),
                       Fingerprint(metadata["config"], metadata["parameters"]))
        except CacheError:
            raise
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CacheError(f"{path}: torn or damaged ({error}); delete it and compress the image again") from error

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor],
              image_digests: tuple[str, ...] | None = None) -> "VocoCache":
        digests = self.image_digests if image_digests is None else image_digests
        return dataclasses.replace(self, keys=change(self.keys), values=change(self.values), image_digests=digests)


def image_digest(image_CHW: torch.Tensor) -> str:
    """Returns the digest of a prepared image, uint8 [3, H, W]: of what the model sees, whatever the file."""
    image_HWC = image_CHW.permute(1, 2, 0).contiguous().cpu()
    return hashlib.sha256(f"{list(image_HWC.shape)} ".encode() + _bytes(image_HWC)).hexdigest()[:32]


def _quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int8 [..., D] and the float32 scale [...] that brings each vector's largest entry to 127."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    return (x / torch.where(scale > 0, scale, 1.0)[..., None]).round().to(torch.int8), scale


def _dequantise(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns [..., D] from int8 and scale: the inverse of `_quantise` up to rounding."""
    return (x.float() * scale[..., None]).to(dtype)


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f" {name} {_name(tensor.dtype)} {list(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
