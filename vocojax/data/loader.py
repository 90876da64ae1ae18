"""From a stage's data config to a stream of batches: read, lay out, pack, decode, batch.

The stream is a pure function of (seed, step, config): threads, worker processes and the number of hosts that share it
change no batch. `packers.py` says why.
"""

import collections
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np

from vocojax.config import ConfigError, ModelConfig, require_seed
from vocojax.data.config import DataConfig, PartConfig, Plan
from vocojax.data.images import ImageError
from vocojax.data.packers import Packer, PlannedRow, RowReport, StreamStateError
from vocojax.data.packing import Row, RowShape, row_of, row_shape
from vocojax.data.prepared import PreparedSource
from vocojax.data.sources import file_digest, identity, open_source, sampled_digest
from vocojax.data.tally import SkippedTooMany, Tally
from vocojax.data.text_rows import TextRowShape, text_row_shape
from vocojax.data.tokenizer import Tokenizer
from vocojax.layout import Visibility, lay_out_unit, unit_shape

__all__ = ["BatchStream", "SkippedTooMany", "StreamStateError", "merge_states", "open_tokenizer", "unit_shape"]
BATCHES_AHEAD = 2  # batches made before the step asks for them
# Fields of a data config that change no batch: how it is made, and where files are (their content is compared).
FREE = ("path", "image_root", "tokenizer", "num_threads", "num_workers", "keep_in_memory", "max_skipped_share",
        "video_seconds")


def open_tokenizer(data: DataConfig, model: ModelConfig) -> Tokenizer:
    """Loads the tokenizer that a data config names.

    Raises:
      ConfigError: it can't be loaded, it has another id for `<voco>` than the model, or the model has too few
        embeddings for it.
    """
    try:
        tokenizer = Tokenizer.from_directory(data.tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError("data.tokenizer", f"must be usable: {error}") from error
    if tokenizer.voco_id != model.voco.token_id:
        raise ConfigError("model.voco.token_id", f"must be {tokenizer.voco_id}, the id of <voco> in {data.tokenizer}, "
                          f"got {model.voco.token_id}")
    if len(tokenizer) > model.decoder.num_tokens:
        raise ConfigError("model.decoder.vocab_size", f"must be at least {len(tokenizer)}, the size of "
                          f"{data.tokenizer} (without padding), got {model.decoder.num_tokens}")
    return tokenizer


class BatchStream:
    """An endless stream of batches (dicts of numpy arrays with a leading row axis) that can be saved and resumed.

    Batches are made ahead of time; the state is always the one after the batch that was taken last.

    Attributes:
      tokenizer: the tokenizer.
      tally: counts of the records read and skipped.
      shape: the static shape of a row.
      source: the records, laid out one by one.
      records: how many of them an epoch has.
      seed: of the shuffling.
      window: number of samples from which a packer chooses.

    Args:
      model: model config of the stage.
      data: data config of the stage.
      rows: rows per batch, of all processes together.
      seed: seed of the shuffling; every epoch has another order.
      visibilities: the model's visibility, and its teacher's if it has one.
      process_index: which part of each batch this process makes.
      process_count: number of processes; each makes rows / process_count rows of a batch.
      plan: `single_pass` for rows of whole samples (`packing.py`), `two_stage` for rows of text (`text_rows.py`).

    Raises:
      ConfigError: something that the configs name can't be used, or the processes can't share the packers evenly.
    """

    def __init__(self, model: ModelConfig, data: DataConfig, rows: int, seed: int, *visibilities: Visibility,
                 process_index: int = 0, process_count: int = 1, plan: Plan = "single_pass"):
        require_seed(seed)
        self.packers, self.seed, self.window = data.packers or rows, seed, data.pack_window
        if rows % self.packers:
            raise ConfigError("data.packers", f"must divide the {rows} rows of a batch, got {self.packers}")
        if self.packers % process_count:
            raise ConfigError("data.packers", f"(by default the {rows} rows of a batch) must be a multiple of the "
                              f"{process_count} processes that share them, got {self.packers}")
        share = self.packers // process_count
        self._own = range(process_index * share, (process_index + 1) * share)
        self.tokenizer = open_tokenizer(data, model)
        self.tally = Tally(data.max_skipped_share)
        self.shape: RowShape | TextRowShape = row_shape(
            data, model.vision.image_size, model.unit_tokens, *visibilities, question=model.question_tokens)
        if plan == "two_stage":
            alone = lay_out_unit("unit", self.tokenizer, unit_shape(model))
            self.shape = text_row_shape(data, model.vision.image_size, unit_shape(model), alone)
        self.source = PreparedSource(open_source(data), model, data, self.tokenizer, self.shape, seed)
        self._identity = {**_identity(data, model, self.tokenizer), "plan": plan, "packers": self.packers, "seed": seed,
                          "records": len(self.source)}
        self._data, self._rows_per_packer = data, rows // self.packers
        self.records = len(self.source)
        if self.records == 0:
            raise ConfigError("data", f"has no record in {data.path or data.source}")
        self._states = {packer: {"position": packer, "window": []} for packer in self._own}
        self._start()

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        parts = [next(iterator) for iterator in self._iterators]
        for report in (report for _, reports in parts for report in reports):
            self._take(report)
        batches = [batch for batch, _ in parts]
        if len(batches) == 1:
            return batches[0]
        return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}

    def get_state(self) -> dict[str, Any]:
        """Returns the states and counts of this process's packers, as values for JSON."""
        return {
            **self._identity,
            "state": {str(packer): {**state, "counts": self.tally.get_state(packer)}
                      for packer, state in self._states.items()},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch at which `get_state` was called.

        Args:
          state: holds the states of all packers of this process; those of other packers are ignored. It may come from
            any number of processes, see `merge_states`.

        Raises:
          StreamStateError: the state has another seed, other data or a config that makes other batches, or lacks a
            packer.
        """
        state = _with_defaults(state)
        sampled = _contents(self._data, sampled_digest) if _has_sampled_digests(state) else {}
        here = {**self._identity, **sampled}
        other = [f"{key} {state.get(key)} (here {value})" for key, value in here.items() if state.get(key) != value]
        if other:
            raise StreamStateError(f"the saved data state is of another stream, with {', '.join(other)}: resume with "
                                   "the data and config (packers: by default the batch_size) of its first start")
        missing = [packer for packer in self._own if str(packer) not in state["state"]]
        if missing:
            raise StreamStateError(f"the saved data state lacks the packers {missing} of {self.packers}: merge the "
                                   "states of all processes that made it")
        self.close()
        for packer in self._own:
            saved = state["state"][str(packer)]
            self._states[packer] = {"position": saved["position"], "window": list(saved["window"])}
            self.tally.set_state(packer, saved["counts"])
        self._start()

    def close(self) -> None:
        """Stops the threads and worker processes that make batches."""
        self._close()

    def _start(self) -> None:
        workers = min(max(self._data.num_workers, 1), len(self._own))
        groups = [_Group(self.source, self._data, self.shape, self.packers, self.seed, self._rows_per_packer,
                         {packer: self._states[packer] for packer in packers})
                  for packers in (part.tolist() for part in np.array_split(self._own, workers))]
        self._iterators = [iter(_ahead(group, self._data)) for group in groups]
        self._close = weakref.finalize(self, _close_all, self._iterators)

    def _take(self, report: RowReport) -> None:
        packer = report.packer
        self._states[packer] = {"position": report.position, "window": list(report.window)}
        self.tally.read(packer, report.records, report.dropped_tokens)
        for reason, message in report.skipped:
            self.tally.skip(packer, reason, message)
        if report.empty:
            raise SkippedTooMany(f"no record can be used ({self.tally.records} were read, skipped: "
                                 f"{dict(self.tally.skipped())})")


def _identity(data: DataConfig, model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what a state and its stream must have in common, in addition to packers, records and seed."""
    return {**_fixed(data), **_contents(data, file_digest),
            "vocabulary": tokenizer.vocabulary_digest,
            "unit": [model.unit_tokens, model.unit_vocos, model.vision.image_size]}


def _contents(data: DataConfig, digest: Callable[[Path], str]) -> dict[str, Any]:
    """Returns the part of a stream's identity that depends on the content of files."""
    parts = [{**_fixed(part), "content": identity(part, digest)} for part in data.mixture]
    return {"mixture": parts, "content": identity(data, digest)}


def _has_sampled_digests(state: Mapping[str, Any]) -> bool:
    """Returns whether a saved state has version 0.1's digests of files, which have 16 digits."""
    return any(len(part.get("content", "")) == 16 for part in (state, *state["mixture"]))


def _fixed(config: DataConfig | PartConfig) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}


def _with_defaults(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved state in today's keys: those that are newer than the state have their defaults."""
    parts = [{**_fixed(PartConfig()), **part} for part in state.get("mixture", [])]
    renamed = {"packers" if key == "lanes" else key: value for key, value in state.items()}  # version 0.1's name
    return {**_fixed(DataConfig()), "plan": "single_pass", **renamed, "mixture": parts}


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all processes of a stream into one, for `BatchStream.set_state` on any number of processes.

    Raises:
      StreamStateError: they are of different streams, or some are missing.
    """
    states = list(states)
    merged: dict[str, Any] = {**states[0], "state": {}}
    for state in states:
        if any(state.get(key) != merged[key] for key in merged if key != "state"):
            raise StreamStateError("the data states of the processes are of different streams")
        merged["state"].update(state["state"])
    if len(merged["state"]) != merged["packers"]:
        raise StreamStateError(f"the data states of {len(states)} processes hold {len(merged['state'])} of "
                               f"{merged['packers']} packers")
    return merged


def _ahead(group: "_Group", data: DataConfig) -> grain.IterDataset:
    """Makes the group's batches ahead of time, in a worker process if the config asks for any, else in threads."""
    if data.num_workers:
        return group.mp_prefetch(grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=BATCHES_AHEAD))
    return grain.experimental.ThreadPrefetchIterDataset(group, prefetch_buffer_size=BATCHES_AHEAD)


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:  # removed as well: grain's iterators must not be left until the interpreter shuts down
        iterators.pop().close()


class _Group(grain.IterDataset):
    """The rows of some packers: its elements are (these packers' rows of a batch, stacked; the rows' reports)."""

    def __init__(self, source: PreparedSource, data: DataConfig, shape: RowShape | TextRowShape, packers: int,
                 seed: int, rows_per_packer: int, states: Mapping[int, Mapping[str, Any]]):
        super().__init__()
        self.source, self.data, self.shape, self.packers, self.seed = source, data, shape, packers, seed
        self.rows_per_packer, self.states = rows_per_packer, states

    def __iter__(self) -> "_GroupIterator":
        return _GroupIterator(self)


class _GroupIterator(grain.DatasetIterator):
    def __init__(self, group: _Group):
        super().__init__()
        self._group, data = group, group.data
        self._pool = ThreadPoolExecutor(data.num_threads, "decode")
        self._layout_pool = ThreadPoolExecutor(data.num_threads, "lay_out")
        self._packers = {
            number: Packer(number, group.packers, group.seed, group.source, group.shape, data.pack_window,
                           data.keep_in_memory, self._layout_pool)
            for number in group.states
        }
        self._rows = len(self._packers) * group.rows_per_packer
        self._batches: collections.deque[tuple[Row, list[Future[RowReport]]]] = collections.deque()
        self._plans = self._plan_rows()

    def __next__(self) -> tuple[Row, list[RowReport]]:
        ahead = self._rows + 2 * self._group.data.num_threads
        while sum(len(made) for _, made in self._batches) < ahead and (plans := list(
                itertools.islice(self._plans, self._rows))):
            rows = self._group.shape.empty(self._rows)
            self._batches.append((rows, [self._pool.submit(self._make, plan, row_of(rows, index))
                                         for index, plan in enumerate(plans)]))
        rows, made = self._batches.popleft()
        return rows, [future.result() for future in made]

    def get_state(self) -> dict[str, Any]:
        return {}  # the reports carry the state to `BatchStream`

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a group starts from the states that it is made with")

    def close(self) -> None:
        for pool in (self._pool, self._layout_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _plan_rows(self) -> Iterator[PlannedRow]:
        """Yields the packers' rows in turn, without end unless a packer finds no usable record."""
        for number, state in self._group.states.items():
            self._packers[number].set_state(state)
        while True:
            for packer in self._packers.values():
                for _ in range(self._group.rows_per_packer):
                    plan = packer.next_row()
                    yield plan
                    if plan.report.empty:
                        return

    def _make(self, plan: PlannedRow, row: Row) -> RowReport:
        """Decodes the images of a planned row and packs it; a record with an unusable image becomes padding."""
        items = []
        for position, prepared in plan.members:
            try:
                items.append(self._group.source.load(prepared))
            except ImageError as error:
                if self._packers[plan.report.packer].counts(position):
                    plan.report.skipped.append((error.reason, str(error)))
        self._group.shape.pack(items, row)
        return plan.report
