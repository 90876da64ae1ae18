"""Small values passed between the processes of a run.

What is passed here are decisions and states of a few kilobytes, over the hosts' network by JAX's key-value store: no
device waits for it. A process on its own needs none of it, and every function then returns at once.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
from jax._src.distributed import global_state  # the only way to JAX's key-value store

from vocojax.errors import VocojaxError

EXCHANGE_SECONDS = 600.0


class MissingProcesses(VocojaxError, RuntimeError):
    """Processes of the run didn't arrive in time."""


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


_rounds: defaultdict[str, int] = defaultdict(int)


def from_first(topic: str, value: Any, limit: float = EXCHANGE_SECONDS) -> Any:
    """Process 0's value (JSON-able) on all processes, which call this in the same order for a topic."""
    if jax.process_count() == 1:
        return value
    key = _next_key(topic)
    if is_first():
        _store().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_get(key, limit, (0,), topic))


def to_first(topic: str, value: Any, limit: float = EXCHANGE_SECONDS) -> list[Any] | None:
    """Every process's value (JSON-able) in order on process 0, None on the others.

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
    return values


def from_all(topic: str, value: Any, limit: float = EXCHANGE_SECONDS) -> list[Any]:
    """Every process's value (JSON-able), in order, on all processes."""
    return from_first(topic, to_first(topic, value, limit), 2 * limit)


def _store() -> Any:
    """JAX's key-value store, which process 0 holds for all."""
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
    return f"{topic}: {named(missing, count)} did not arrive within {limit:g} s; look at the log there"


def named(processes: Sequence[int], count: int) -> str:
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes))} of {count}"
