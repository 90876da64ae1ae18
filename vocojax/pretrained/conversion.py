"""Conversion of weights from one layout to another, with verification."""

import hashlib
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vocojax.config import ModelConfig
from vocojax.convert.peft import is_adapter
from vocojax.convert.tables import VOCABULARY
from vocojax.errors import ConvertError
from vocojax.models.lora import factor_names
from vocojax.pretrained.export import Layout, export
from vocojax.pretrained.source import Source, open_source, parameter_shapes
from vocojax.runs.directory import is_run, run_config
from vocojax.runs.weights import RunWeights
from vocojax.weights import Weights

_REMEDY = "convert the source again"


def convert(
    source: str | Path,
    target: str | Path,
    target_layout: Layout,
    *,
    dtype: str | None = None,
    verify: bool = False,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    tokenizer: str | Path | None = None,
    num_vocos: int | None = None,
    allow_missing: Collection[str] = (),
    base: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Converts weights from one layout to another.

    Args:
      source: directory to read, see `open_source`.
      target: directory to write, see `export`.
      target_layout: see `export`.
      dtype: see `export`.
      verify: whether to read the target again and compare it, see `verify_target`.
      vision: see `open_source`.
      projector: see `open_source`.
      tokenizer: see `open_source`.
      num_vocos: see `open_source`.
      allow_missing: see `open_source`.
      base: base model of an adapter that is read, see `open_source`, or written (layout `peft`), see `export`; for the
        latter it is by default what the run was started from (`init_from`).
      report: called with each line of the report.

    Raises:
      ConvertError: see `open_source`, `export` and `verify_target`.
    """
    opened = open_source(source, vision=vision, projector=projector, tokenizer=tokenizer, num_vocos=num_vocos,
                         allow_missing=allow_missing, base=None if target_layout == "peft" else base)
    if target_layout == "peft" and base is None and is_run(source):
        base = run_config(source).get("init_from")
    total = sum(int(np.prod(shape)) for shape in opened.weights.shapes.values())
    report(f"{opened.weights.where}: {len(opened.weights.shapes)} parameters, {total:,} values")
    digests: list[str] = []
    check = lambda directory: digests.append(verify_target(opened, directory, report)) if verify else None
    export(opened, target, target_layout, dtype, check, base)
    report(f"{target}: written as {target_layout}")
    for digest in digests:
        report(f"{target}: sha256 {digest}")


def verify_target(source: Source, target: str | Path, report: Callable[[str], None]) -> str:
    """Reads a converted directory again and compares it with its source, layer by layer.

    Args:
      source: what was converted.
      target: the converted directory.
      report: called with a line for each parameter: the largest |Δ| from the source, which is the error of rounding to
        the target's dtype.

    Returns:
      SHA-256 of all parameters by path: the same weights have the same digest in every layout.

    Raises:
      ConvertError: the configs differ in more than the vocabulary's length, or a value is not the source's rounded to
        the target's dtype. An adapter's base may be wider than the run, and merged kernels may differ by rounding.
    """
    absent = parameter_shapes(source.config).keys() - source.weights.shapes.keys()
    written = open_source(target, allow_missing=[re.escape(path) for path in absent])
    if _without_vocabulary(written.config) != _without_vocabulary(source.config):
        raise ConvertError(f"{target}: verification failed: its config is {written.config}, the source's is "
                           f"{source.config}; {_REMEDY}")
    for entry in ("template", "fit", "visibility"):
        here, there = getattr(written.card, entry), getattr(source.card, entry)
        if here != there:
            raise ConvertError(f"{target}: verification failed: its {entry} is {here!r}, the source's is {there!r}; "
                               f"{_REMEDY}")
    if set(written.weights.shapes) != set(source.weights.shapes):
        odd = sorted(set(written.weights.shapes) ^ set(source.weights.shapes))
        raise ConvertError(f"{target}: verification failed: these parameters are only in it or only in the source: "
                           f"{', '.join(odd)}; {_REMEDY}")
    whole, on_base = hashlib.sha256(), is_adapter(Path(target))
    wrong = []
    for path in sorted(written.weights.shapes):
        num_tokens = source.config.decoder.num_tokens
        largest, is_exact = _compare(path, source.weights, written.weights, whole, num_tokens, on_base)
        if not is_exact and not (on_base and _is_same_sum(path, source.weights, written.weights, largest)):
            wrong.append(path)
        report(f"{path} {written.weights.dtype(path).name} {list(written.weights.shapes[path])}: max |Δ| {largest:.3g}")
    if wrong:
        raise ConvertError(f"{target}: verification failed: these parameters are not the source's rounded to the "
                           f"target's dtype: {', '.join(wrong)}; {_REMEDY}, with a wider --dtype if values overflow")
    return whole.hexdigest()


def _is_same_sum(path: str, source: Weights, written: Weights, largest: float) -> bool:
    """Returns whether a difference is rounding: W + scale A B is summed in another order after an adapter is read."""
    if not isinstance(source, RunWeights) or factor_names(path)[0] not in source.stored.shapes:
        return False
    resolution = max(float(ml_dtypes.finfo(weights.dtype(path)).eps) for weights in (source, written))
    return largest <= 2 * resolution * float(np.abs(source.read(path).astype(np.float32)).max())


def _compare(
    path: str, source: Weights, written: Weights, whole: Any, num_tokens: int, on_base: bool
) -> tuple[float, bool]:
    """Compares a parameter with the source's, and adds it to the digest `whole`.

    Returns:
      The largest |Δ|, and whether the parameter is exactly the source's rounded to the target's dtype; or (`on_base`)
      the source's exactly the parameter rounded, as it is where an adapter's base is wider than the run.
    """
    dtype, shape = written.dtype(path), written.shapes[path]
    whole.update(f"{path} {dtype.name} {list(shape)} ".encode())
    largest, is_exact = 0.0, True
    rest = tuple(slice(None) for _ in shape[1:])
    first = [slice(layer, layer + 1) for layer in range(shape[0])] if "blocks/" in path else [slice(None)]
    for part in first:
        before, after = source.read(path, (part, *rest)), written.read(path, (part, *rest))
        whole.update(np.ascontiguousarray(after).reshape(-1).view(np.uint8).data)
        if path in VOCABULARY:  # padding rows have no meaning, and <image> may have added one
            tokens = (slice(None),) * VOCABULARY[path] + (slice(num_tokens),)
            before, after = before[tokens], after[tokens]
        difference = before.astype(np.float32) - after.astype(np.float32)
        largest = max(largest, float(np.fmax.reduce(np.abs(difference), axis=None, initial=0)))
        is_rounded = np.array_equal(before.astype(dtype, copy=False), after, equal_nan=True)
        is_exact &= is_rounded or (on_base and np.array_equal(before, after.astype(before.dtype), equal_nan=True))
        is_exact &= not (np.isfinite(before) & ~np.isfinite(after)).any()  # the target's dtype overflowed
    return largest, is_exact


def _without_vocabulary(config: ModelConfig) -> ModelConfig:
    num_tokens = config.voco.token_id + 1
    return replace(config, decoder=replace(config.decoder, vocab_size=num_tokens, vocab_padding=0))
