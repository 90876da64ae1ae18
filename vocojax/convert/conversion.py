"""A conversion from end to end: open, write, and read again what was written."""

import hashlib
import re
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from vocojax.convert.export import Layout, export
from vocojax.convert.mapping import ConvertError
from vocojax.convert.source import Source, open_source, parameter_shapes
from vocojax.convert.weights import Index, Weights


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
    report: Callable[[str], None] = print,
) -> None:
    """Converts weights from one layout to another; arguments as `open_source`'s and `export`'s.

    Args:
      verify: read the target again and compare, see `verify_target`.
      report: takes the lines of the report.

    Raises:
      ConvertError: see `open_source`, `export` and `verify_target`.
    """
    opened = open_source(source, vision=vision, projector=projector, tokenizer=tokenizer, num_vocos=num_vocos,
                         allow_missing=allow_missing)
    total = sum(int(np.prod(shape)) for shape in opened.weights.shapes.values())
    report(f"{opened.weights.where}: {len(opened.weights.shapes)} parameters, {total:,} values")
    export(opened, target, target_layout, dtype)
    report(f"{target}: written as {target_layout}")
    if verify:
        verify_target(opened, target, report)


def verify_target(source: Source, target: str | Path, report: Callable[[str], None]) -> str:
    """Reads a converted directory again and compares it with its source, layer by layer.

    Reports for every parameter the largest |Δ| from the source, which is the rounding to the target's dtype, and at the
    end a digest. The digest is of the parameters by path, so the same weights have the same one in every layout.

    Raises:
      ConvertError: a value is not the source's rounded to the target's dtype.
    """
    absent = parameter_shapes(source.config).keys() - source.weights.shapes.keys()
    written = open_source(target, allow_missing=[re.escape(path) for path in absent])
    if set(written.weights.shapes) != set(source.weights.shapes):
        odd = sorted(set(written.weights.shapes) ^ set(source.weights.shapes))
        raise ConvertError(f"{target}: has other parameters than its source: {', '.join(odd)}")
    whole = hashlib.sha256()
    wrong = []
    for path in sorted(written.weights.shapes):
        dtype = written.weights.dtype(path)
        whole.update(f"{path} {dtype.name} {list(written.weights.shapes[path])} ".encode())
        largest = 0.0
        for index in _layers(path, written.weights):
            before, after = source.weights.read(path, index), written.weights.read(path, index)
            whole.update(np.ascontiguousarray(after).reshape(-1).view(np.uint8).data)
            if before.size:
                largest = max(largest, _largest_difference(before, after))
            if not np.array_equal(before.astype(dtype, copy=False), after, equal_nan=True) and path not in wrong:
                wrong.append(path)
        report(f"{path} {dtype.name} {list(written.weights.shapes[path])}: max |Δ| {largest:.3g}")
    if wrong:
        raise ConvertError(f"{target}: read again, these are not what was to be written: {', '.join(wrong)}")
    digest = whole.hexdigest()
    report(f"{target}: sha256 {digest}")
    return digest


def _layers(path: str, weights: Weights) -> list[Index]:
    """Slices that make up a parameter: the layers of a stacked one."""
    shape = weights.shapes[path]
    rest = tuple(slice(None) for _ in shape[1:])
    return [(slice(i, i + 1), *rest) for i in range(shape[0])] if "blocks/" in path else [(slice(None), *rest)]


def _largest_difference(before: np.ndarray, after: np.ndarray) -> float:
    return float(np.abs(before.astype(np.float32) - after.astype(np.float32)).max())
