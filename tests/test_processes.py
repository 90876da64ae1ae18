"""Values and work that processes share."""

from collections import defaultdict

import jax
import pytest

from vocojax.parallel import processes


class _Store:
    """A key-value store in memory; a key that is not there has not come in time."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.values[key]


@pytest.fixture
def become(monkeypatch):
    """Makes this process one of two; both have the same store."""
    store = _Store()

    def become(index):
        monkeypatch.setattr(processes, "_store", lambda: store)
        monkeypatch.setattr(processes, "_rounds", defaultdict(int))
        monkeypatch.setattr(processes, "_set_by_first", [])
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)

    return become


def test_the_others_wait_until_process_0_has_done_its_work(become):
    done = []
    become(1)
    with pytest.raises(processes.MissingProcesses, match=r"^scores: process 0 of 2 did not arrive within 5 s"):
        processes.wait_for_first("scores", lambda: done.append(1), 5)
    become(0)
    processes.wait_for_first("scores", lambda: done.append(0), 5)
    become(1)
    processes.wait_for_first("scores", lambda: done.append(1), 5)
    assert done == [0]


def test_a_failure_of_process_0_is_one_everywhere(become):
    def fail():
        raise OSError("the judge is away")

    become(0)
    with pytest.raises(OSError, match=r"^the judge is away$"):
        processes.wait_for_first("scores", fail)
    become(1)
    with pytest.raises(processes.FailedFirst, match=r"^scores: process 0 failed with OSError: the judge is away; look"):
        processes.wait_for_first("scores", fail)
