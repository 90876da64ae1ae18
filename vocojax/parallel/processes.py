"""Small values passed between the processes of a run.

These are decisions and states of a few kilobytes. They go over the hosts' network by JAX's key-value store: no device
waits for them. For a process on its own every function returns at once. All processes call the functions from their
main thread, in the same order.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src.distributed import global_state  # the only way to JAX's key-value store

from vocojax.errors import VocojaxError, first_line

EXCHANGE_SECONDS = 600.0


class MissingProcesses(VocojaxError, RuntimeError):
    """Processes of the run didn't arrive in time."""


class FailedFirst(VocojaxError, RuntimeError):
    """Work of process 0 failed, for which this process has waited."""


def is_first() -> bool:
    """Returns whether this process writes what only one process writes."""
    return jax.process_index() == 0


_rounds: defaultdict[str, int] = defaultdict(int)
_set_by_first: list[str] = []  # keys that other processes may still have to read


def from_first(topic: str, value: Any, limit: float = EXCHANGE_SECONDS) -> Any:
    """Returns process 0's value (JSON-able) on all processes."""
    if jax.process_count() == 1:
        return value
    key = _next_key(topic)
    if is_first():
        _store().key_value_set(key, json.dumps(value))
        _set_by_first.append(key)
        return value
    return json.loads(_get(key, limit, (0,), topic))


def wait_for_first(topic: str, work: Callable[[], None], limit: float = EXCHANGE_SECONDS) -> None:
    """Runs work on process 0, for which the other processes wait.

    They must not leave earlier: JAX ends a process a minute after another one has left.

    Args:
      topic: names the work in messages.
      work: called on process 0 only.
      limit: seconds that the others wait.

    Raises:
      FailedFirst: on the other processes, if the work fails; process 0 raises the work's own error.
      MissingProcesses: process 0 did not finish in time.
    """
    if is_first():
        try:
            work()
        except BaseException as error:
            from_first(topic, f"{type(error).__name__}: {first_line(error)}", limit)
            raise
    if problem := from_first(topic, "", limit):
        raise FailedFirst(f"{topic}: process 0 failed with {problem}; look at the log there")


def to_first(topic: str, value: Any, limit: float = EXCHANGE_SECONDS) -> list[Any] | None:
    """Returns every process's value in order on process 0, None on the others. Values must fit JSON.

    Raises:
      MissingProcesses: on process 0, naming those whose value did not come within `limit` seconds.
    """
    if jax.process_count() == 1:
        return [value]
    key = _next_key(topic)
    if not is_first():
        _store().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
        return None
    values, missing, deadline = [value], [], time.monotonic() + limit
    for index in range(1, jax.process_count()):
        own = f"{key}/{index}"
        try:
            values.append(json.loads(_get(own, max(deadline - time.monotonic(), 0.1), (index,), topic)))
        except MissingProcesses:
            missing.append(index)
        else:
            _store().key_value_delete(own)
    if missing:
        raise MissingProcesses(missing_message(missing, jax.process_count(), topic, limit))
    while _set_by_first:  # every process has read them: it has come to this call
        _store().key_value_delete(_set_by_first.pop())
    return values


def from_all(topic: str, value: Any, limit: float = EXCHANGE_SECONDS) -> list[Any]:
    """Returns every process's value, in order, on all processes. Values must fit JSON."""
    return from_first(topic, to_first(topic, value, limit), 2 * limit)


def _store() -> Any:
    """Returns JAX's key-value store, which process 0 holds for all."""
    return global_state.client


def _next_key(topic: str) -> str:
    _rounds[topic] += 1
    return f"vocojax/{topic}/{_rounds[topic]}"


def _get(key: str, limit: float, awaited: Sequence[int], topic: str) -> str:
    try:
        return _store().blocking_key_value_get(key, int(limit * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise MissingProcesses(missing_message(awaited, jax.process_count(), topic, limit)) from None


def missing_message(missing: Sequence[int], count: int, topic: str, limit: float) -> str:
    """Returns the message of `MissingProcesses`."""
    return f"{topic}: {named(missing, count)} did not arrive within {limit:g} s; look at the log there"


def named(processes: Sequence[int], count: int) -> str:
    """Returns how messages name processes: `processes 1, 3 of 4`."""
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes))} of {count}"
