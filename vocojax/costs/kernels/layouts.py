"""The four layouts that the kernels are compared on, as mask vectors."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rows of samples: what they are, and their `start` and `stop`, int32 `[rows, length]`."""

    title: str
    start: np.ndarray
    stop: np.ndarray

    @property
    def rows(self) -> int:
        return self.start.shape[0]

    @property
    def length(self) -> int:
        return self.start.shape[1]

    def tiles_with_a_visible_pair(self, block_q: int, block_k: int) -> int:
        """By looking at every pair, a band of queries at a time: the check on what the kernels' lists say."""
        count = 0
        edges = np.arange(0, self.length, block_k)
        j = np.arange(self.length)
        for start, stop in zip(self.start, self.stop, strict=True):
            for low in range(0, self.length, block_q):
                i = np.arange(low, min(low + block_q, self.length))[:, None]
                seen = ((start[i] <= j) & (j <= i) & (i < stop)).any(axis=0)
                count += int(np.logical_or.reduceat(seen, edges).sum())
        return count


def row(length: int, samples: list[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
    """`start` and `stop` of one row: samples of (lengths of the units, each with one VoCo token at its end; text)."""
    start, stop = np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32)  # padding until written over
    at = 0
    for units, text in samples:
        first, end = at, at + sum(units) + text
        for unit in units:
            start[at : at + unit], stop[at : at + unit] = at, at + unit
            stop[at + unit - 1] = end
            at += unit
        start[at:end], stop[at:end] = first, end
        at = end
    return start, stop


def packed_row(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """2,048 tokens of LLaVA samples with text of 64 to 400 tokens, as many as fit."""
    samples: list[tuple[list[int], int]] = []
    room = 2048
    while room >= 579 + (text := int(rng.integers(64, 401))):
        samples.append(([579], text))
        room -= 579 + text
    return row(2048, samples)


def layouts() -> dict[str, Layout]:
    """The layouts by their letter."""
    rng = np.random.default_rng(0)
    rows = {
        "a": (
            "8 rows of 2,048: packed LLaVA samples (unit of 579, text of 64-400)",
            [packed_row(rng) for _ in range(8)],
        ),
        "b": ("one unit of 576 and 128 text tokens", [row(704, [([576], 128)])]),
        "c": ("video: 64 frames of 258 tokens and 128 text tokens", [row(64 * 258 + 128, [([258] * 64, 128)])]),
        "d": ("causal 8,192", [row(8192, [([], 8192)])]),
    }
    return {
        name: Layout(title, *(np.stack(x) for x in zip(*vectors, strict=True)))
        for name, (title, vectors) in rows.items()
    }
