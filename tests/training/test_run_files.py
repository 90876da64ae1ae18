"""Files of a run that are damaged do not stop it, if its checkpoints are sound."""

import json
import logging

import pytest

from vocojax.parallel import processes
from vocojax.training.goodput import Goodput
from vocojax.training.run_log import RunLog

CONTENTS = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"began": "x", "starts": 1}',
            b'{"began": 1e999, "starts": 1}', b'{"began": 100, "starts": 1e999}', b'{"began": NaN, "starts": 1}']


@pytest.mark.parametrize("content", CONTENTS)
def test_a_damaged_goodput_is_put_aside(content, tmp_path, caplog):
    (tmp_path / "goodput.json").write_bytes(content)
    goodput = Goodput(tmp_path, 5.0, clock=lambda: 1000.0)
    assert (goodput.share, goodput.useful) == (5e9, 5.0)
    goodput.write(3)
    assert json.loads((tmp_path / "goodput.json").read_text()) == {
        "began": 1000.0, "starts": 1, "step": 3, "useful_seconds": 5.0, "wall_seconds": 0.0, "goodput": 5e9}
    aside, = (tmp_path / "damaged").iterdir()
    assert aside.name.startswith("goodput.json-") and aside.read_bytes() == content
    assert "goodput.json: is damaged" in caplog.text and str(aside) in caplog.text


def test_a_sound_goodput_counts_on(tmp_path):
    (tmp_path / "goodput.json").write_text('{"began": 900.0, "starts": 2}')
    assert Goodput(tmp_path, 5.0, clock=lambda: 1000.0).share == 0.05
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("bad", [b"", b"\xff\xfe", b'{"step": "2"}', b"[1]", b'{"loss": 1.0}', b"[" * 100_000,
                                 b'{"step": 2, "loss": "x"}'])
def test_damaged_lines_of_metrics_are_dropped_and_the_file_put_aside(bad, tmp_path, caplog):
    lines = [b'{"step": 1, "loss": 3.0}', bad, b'{"step": 3, "loss": 1.0}', b'{"step": 4, "loss": 0.5}', b'{"step": 5']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    RunLog(tmp_path, 3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines[0] + b"\n" + lines[2] + b"\n"
    aside, = (tmp_path / "damaged").iterdir()
    assert aside.name.startswith("metrics.jsonl-") and aside.read_bytes() == b"\n".join(lines)
    assert f"metrics.jsonl: line 2 and 0 others are damaged, moved to {aside}" in caplog.text


def test_a_line_that_was_cut_off_is_dropped_without_a_word(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for content in (b"", b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo'):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        RunLog(tmp_path, 9).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 3.0}\n'
    assert not (tmp_path / "damaged").exists() and not caplog.records


def test_values_that_all_processes_have_read_leave_the_coordinator(monkeypatch):
    """Process 0 of two, of which the other answers at once."""
    class Coordinator(dict):
        key_value_set, key_value_delete = dict.__setitem__, dict.__delitem__

        def blocking_key_value_get(self, key: str, limit: int) -> str:
            self[key] = "7"
            return "7"

    coordinator = Coordinator()
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "is_first", lambda: True)
    monkeypatch.setattr(processes, "_store", lambda: coordinator)
    for number in range(5):
        assert processes.from_first("some", number) == number
    assert len(coordinator) == 5
    assert processes.to_first("other", 6) == [6, 7] and coordinator == {}
    assert processes.from_all("other", 6) == [6, 7] and len(coordinator) == 1
