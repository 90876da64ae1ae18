"""Digests that caches are recognised by: of the model that made them, and of their images' pixels."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vocojax.config import PAPER_VOCO, Positions
from vocojax.data.tokenizer import Tokenizer
from vocojax.layout import Role, lay_out_unit, unit_shape
from vocojax.models.parameters import parameters_of
from vocojax.models.voco import VocoLlama

COMPACT: Positions = "compact"
_WORDS = 4  # 32-bit words of a parameter's checksum


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Identity of a model: two models with the same fingerprint can read each other's caches.

    The number of VoCo tokens is left out: a unit's first n VoCo tokens are the same whatever follows them, so it is a
    property of the cache. With some recipes they are not (`VocoConfig.is_nested`), and the number is in.

    Attributes:
      config: the model's config, the dtype it computes in, and the ids that its tokenizer puts around an image's vision
        tokens, as canonical JSON. Left out are `voco.num_vocos` where it may be, and what has the value that models
        before the entry had: the paper's VoCo tokens, and `voco.positions` if they are compact.
      parameters: digest of names, dtypes, shapes and values of all parameters.
    """

    config: str
    parameters: str

    @property
    def digest(self) -> str:
        """A digest of both: 32 hexadecimal digits."""
        return hashlib.sha256(f"{self.config} {self.parameters}".encode()).hexdigest()[:32]

    def differences(self, other: "Fingerprint") -> str:
        """Returns how `other` differs from this one, for errors: `decoder.depth is 2 there, 3 here`."""
        default = {"voco.positions": COMPACT, **{f"voco.{entry}": value for entry, value in PAPER_VOCO.items()}}
        here, there = ({**default, **_flat(json.loads(f.config))} for f in (self, other))
        odd = [f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
               for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
        if not odd and self.parameters != other.parameters:
            odd = [f"the config is the same, but its parameters differ (digest {other.parameters[:12]} there, "
                   f"{self.parameters[:12]} here)"]
        return "; ".join(odd)


def fingerprint(model: VocoLlama, tokenizer: Tokenizer) -> Fingerprint:
    """Returns a model's fingerprint, the same on every mesh and device.

    It reads every parameter once, where it lies.

    Args:
      model: whose parameters are read.
      tokenizer: the model's.
    """
    unit = lay_out_unit("unit", tokenizer, unit_shape(model.config))
    config = dataclasses.asdict(model.config)
    if model.config.voco.is_nested:
        del config["voco"]["num_vocos"]
    # Fingerprints of models without these entries mean these values.
    for entry, value in {"positions": COMPACT, **PAPER_VOCO}.items():
        if config["voco"][entry] == value:
            del config["voco"][entry]
    if not model.config.compressor.reads_text:  # and without these two
        del config["compressor"]["num_queries"], config["compressor"]["question_tokens"]
    config["dtype"] = model.dtype.name
    config["unit_ids"] = unit.ids[(unit.roles != Role.VISION) & (unit.roles != Role.VOCO)].tolist()
    parameters = parameters_of(model)
    sums = jax.device_get(_checksums(parameters))
    text = "".join(f"{name} {value.dtype.name} {list(value.shape)} {sums[name].tolist()}\n"
                   for name, value in sorted(parameters.items()))
    return Fingerprint(json.dumps(config, sort_keys=True), hashlib.sha256(text.encode()).hexdigest())


def is_digest(value: object) -> bool:
    """Returns whether a value has the form of a digest of an image or a visual: 32 hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) is not None


def visual_digest(image_digests: Sequence[str]) -> str:
    """Returns the digest of a visual from those of its units: the unit's own, or of several units one of all."""
    if len(image_digests) == 1:
        return image_digests[0]
    return hashlib.sha256(" ".join(image_digests).encode()).hexdigest()[:32]


def image_digest(image: np.ndarray) -> str:
    """Returns the digest of a prepared image, uint8 [size, size, 3]: of what the model sees, whatever the file."""
    return hashlib.sha256(f"{list(image.shape)} ".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()[:32]


@jax.jit
def _checksums(parameters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(value) for name, value in parameters.items()}


def _checksum(x: jax.Array) -> jax.Array:
    """Returns uint32 [_WORDS]: sums over all entries of a hash of their bits and their place.

    Sums of integers are the same in every order, so a parameter that is sharded over devices stays there.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = _mix(bits ^ _mix(place + jnp.uint32(0x9E3779B9)))
    return jnp.stack([_mix(mixed + jnp.uint32(0x85EBCA6B * word % 2**32)).sum(dtype=jnp.uint32)
                      for word in range(1, _WORDS + 1)])


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: every bit of the input changes about half of the output's."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs = ((prefix + key, value) for key, value in values.items())
    return functools.reduce(
        lambda out, pair: out | (_flat(pair[1], pair[0] + ".") if isinstance(pair[1], dict) else {pair[0]: pair[1]}),
        pairs, {},
    )
