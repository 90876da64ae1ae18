"""A look at every record of a stage's data, read as training reads it: what can't be used, and what fills the rows."""

import collections
import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from vocojax.data.images import ImageError
from vocojax.data.loader import BatchStream
from vocojax.data.packers import Packer
from vocojax.data.packing import Item, RowShape, Size, best_fit
from vocojax.data.prepared import PreparedSource
from vocojax.data.text_rows import TextRowShape
from vocojax.layout import LayoutError

SHOWN = 10  # unknown words that are printed
AT_ONCE = 1024  # records that wait for a thread


@dataclass(frozen=True)
class Checked:
    """A record after a look at it.

    Attributes:
      record: its number in the source.
      id: the record's own name; '' if it can't be read.
      size: the room that it needs in a row; None if it can't be used.
      dropped: tokens that were cut off its end.
      reason: a short key for why it can't be used; '' if it can.
      problem: the whole message.
      unknown: words that the tokenizer does not know, each with whether it is a target.
    """

    record: int
    id: str = ""
    size: Size | None = None
    dropped: int = 0
    reason: str = ""
    problem: str = ""
    unknown: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class DataReport:
    """A report on all records of a stage's data.

    Attributes:
      records: how many there are.
      usable: how many can be used.
      bad: record number, id ('' if it can't be read), reason and problem of every other one.
      bad_by_reason: their number by reason.
      tokens: lowest, median, mean, 95th percentile and highest number of a record's tokens in a row.
      targets: the same of its targets.
      images: the same of its images, tiles and frames.
      truncated: records of which text was cut off.
      dropped_tokens: tokens that were cut off.
      unknown_words: how often each word is there that the tokenizer does not know, the most frequent first. All of
        them are one token, which says nothing of the word.
      unknown_targets: how many of them are targets: the model learns to answer with that token.
      unknown_records: how many records have such words.
      rows: rows of one epoch.
      fill: share of these rows' tokens that is no padding.
      images_per_row: images, tiles and frames of a row, on average.
      samples_per_row: records of a row, on average.
      digest: SHA-256 over the data's content and the config that lays it out; equal digests mean equal batches.
    """

    records: int
    usable: int
    bad: tuple[dict[str, Any], ...]
    bad_by_reason: dict[str, int]
    tokens: dict[str, float]
    targets: dict[str, float]
    images: dict[str, float]
    truncated: int
    dropped_tokens: int
    unknown_words: dict[str, int]
    unknown_targets: int
    unknown_records: int
    rows: int
    fill: float
    images_per_row: float
    samples_per_row: float
    digest: str

    def to_json(self) -> str:
        """Returns the report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def to_csv(self) -> str:
        """Returns the records that can't be used as CSV."""
        file = io.StringIO()
        writer = csv.DictWriter(file, ["record", "id", "reason", "problem"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.bad)
        return file.getvalue()

    def __str__(self) -> str:
        numbers = lambda values: "  ".join(f"{name} {value:,.6g}" for name, value in values.items())
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.bad_by_reason.items())
        return "\n".join([
            f"records         {self.records:,}, of which {self.usable:,} can be used",
            f"bad             {len(self.bad):,}{f' ({reasons})' if reasons else ''}",
            f"tokens          {numbers(self.tokens)}",
            f"targets         {numbers(self.targets)}",
            f"images          {numbers(self.images)}",
            f"cut off         {self.dropped_tokens:,} tokens of {self.truncated:,} records",
            f"unknown words   {self._unknown()}",
            f"rows per epoch  {self.rows:,}: {self.fill:.1%} full, with {self.samples_per_row:.2f} records and "
            f"{self.images_per_row:.2f} images",
            f"digest          {self.digest}",
        ])

    def _unknown(self) -> str:
        """Returns how many words the tokenizer does not know, and the most frequent ones."""
        if not self.unknown_words:
            return "0"
        first = ", ".join(f"{word} ({count:,})" for word, count in list(self.unknown_words.items())[:SHOWN])
        return (f"{sum(self.unknown_words.values()):,} in {self.unknown_records:,} records, {self.unknown_targets:,} "
                f"of them targets: {first}{', ...' * (len(self.unknown_words) > SHOWN)}")


def check(stream: BatchStream, threads: int, decodes: bool = True, limit: int | None = None) -> DataReport:
    """Reads every record of a stream's source.

    Args:
      stream: of the stage; no batch is taken.
      threads: how many read at once.
      decodes: whether images and frames are decoded as well.
      limit: number of records, evenly spread, that are looked at; None for all.
    """
    records = range(stream.records)
    chosen = records if limit is None else sorted({i * len(records) // limit for i in range(limit)})
    look = lambda record: check_record(stream.source, record, decodes)
    checked = list(tqdm(_in_order(look, chosen, threads), "records", len(chosen), mininterval=1.0, disable=None))
    good = [(record, one.size) for record, one in zip(chosen, checked, strict=True) if one.size is not None]
    bad = tuple({"record": one.record, "id": one.id, "reason": one.reason, "problem": one.problem}
                for one in checked if one.reason)
    unknown = [entry for one in checked for entry in one.unknown]
    shuffled = grain.MapDataset.range(len(records)).shuffle(stream.seed)
    order = {int(shuffled[place]): place for place in range(len(records))}
    sizes = [size for _, size in sorted(good, key=lambda entry: order[entry[0]])]
    rows = list(pack(sizes, stream.shape, stream.window))
    share = lambda total: total / max(len(rows), 1)
    return DataReport(
        records=len(chosen), usable=len(good), bad=bad,
        bad_by_reason=dict(collections.Counter(one.reason for one in checked if one.reason).most_common()),
        tokens=_spread([size.tokens for size in sizes]), targets=_spread([size.targets for size in sizes]),
        images=_spread([size.images for size in sizes]),
        truncated=sum(one.dropped > 0 for one in checked), dropped_tokens=sum(one.dropped for one in checked),
        unknown_words=dict(collections.Counter(word for word, _ in unknown).most_common()),
        unknown_targets=sum(is_target for _, is_target in unknown),
        unknown_records=sum(bool(one.unknown) for one in checked),
        rows=len(rows), fill=share(sum(row.tokens for row in rows)) / stream.shape.length,
        images_per_row=share(sum(row.images for row in rows)), samples_per_row=share(len(sizes)),
        digest=digest(stream),
    )


def check_record(source: PreparedSource, record: int, decodes: bool) -> Checked:
    """Reads one record as training does.

    Args:
      source: the records.
      record: its number.
      decodes: whether its images and frames are decoded as well.
    """
    try:
        prepared = source.lay_out(record)
        if decodes:
            source.load(prepared)
    except (LayoutError, ImageError) as error:
        return Checked(record, source.record_id(record), reason=error.reason, problem=str(error))
    return Checked(record, prepared.layout.record, prepared.size, prepared.layout.dropped,
                   unknown=tuple(source.unknown_words(record)))


def pack(sizes: Sequence[Size], shape: RowShape | TextRowShape, window: int) -> Iterator[Size]:
    """Yields what is used of each row of an epoch, as one packer with this window fills them."""
    waiting, rest = list(sizes[:window]), iter(sizes[window:])
    room = Size(shape.length, shape.images, shape.targets)
    while waiting:
        chosen = set(best_fit(waiting, room))
        yield Size(*(sum(column) for column in zip(*(waiting[index] for index in chosen), strict=True)))
        waiting = [size for index, size in enumerate(waiting) if index not in chosen]
        waiting += itertools.islice(rest, len(chosen))


def first_rows(stream: BatchStream, count: int) -> list[list[Item]]:
    """Returns the samples of the first rows that a stream's packers fill, with their images."""
    packers = [Packer(number, stream.packers, stream.seed, stream.source, stream.shape, stream.window, False)
               for number in range(min(count, stream.packers))]
    rows = []
    for packer in itertools.islice(itertools.cycle(packers), count):
        items = []
        for _, prepared in packer.next_row().members:
            with contextlib.suppress(ImageError):  # padding in training; `check` names it
                items.append(stream.source.load(prepared))
        rows.append(items)
    return [items for items in rows if items]


def digest(stream: BatchStream) -> str:
    """Returns a SHA-256 over the content of a stream's data and the config that makes batches of it."""
    identity = {key: value for key, value in stream.get_state().items() if key != "state"}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _in_order(function: Callable[[int], Checked], records: Sequence[int], threads: int) -> Iterator[Checked]:
    """Yields a function's results in the order of the records, with few of them under way at once."""
    with ThreadPoolExecutor(threads, "check") as pool:
        for first in range(0, len(records), AT_ONCE):
            yield from pool.map(function, records[first : first + AT_ONCE])


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"lowest": min(values), "median": float(np.median(values)), "mean": float(np.mean(values)),
            "p95": float(np.percentile(values, 95)), "highest": max(values)}
