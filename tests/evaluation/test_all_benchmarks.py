"""Every benchmark on a small data root: killed and resumed, by two processes, in other batches: the same files."""

import functools
import random
import zipfile
from pathlib import Path

import pytest

from tests.evaluation.yes_no_model import save_yes_no_model
from tests.helpers import run_processes
from tests.helpers.evaluation_work import answer
from vocojax.evaluation.benchmarks.registry import BENCHMARKS, open_benchmark
from vocojax.evaluation.predictions import read_predictions
from vocojax.evaluation.running import ANSWERS, PARTS

FEW = ("refcoco_val", "nextqa")  # images that two processes share, and a video
KILLS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_yes_no_model(tmp_path_factory.mktemp("model") / "export")


def files(output: Path) -> dict[str, bytes]:
    """Returns the content of all answer files and submissions by their paths; of an Excel file that of its sheets."""
    found = {}
    for path in sorted(output.rglob("*")):
        if path.name == ANSWERS or path.parent.name == "submission":
            name = str(path.relative_to(output))
            if path.suffix == ".xlsx":  # beside its sheets it holds the time
                with zipfile.ZipFile(path) as book:
                    found[name] = book.read("xl/worksheets/sheet1.xml")
            else:
                found[name] = path.read_bytes()
    return found


def answered(output: Path) -> int:
    """Returns how many answers are on the disk."""
    return sum(path.read_bytes().count(b"\n") for path in output.glob(f"*/{PARTS}/*.jsonl"))


def run_killed(work, output: Path, questions: int, kills: int) -> None:
    """Runs work in two processes of which one is killed several times, each time after some more answers."""
    choice = random.Random(0)
    for _ in range(kills):
        goal = answered(output) + choice.randint(1, max(1, questions // (kills + 1)))
        children = run_processes.start_work(work, output, processes=2)
        run_processes.wait_until(lambda goal=goal: answered(output) >= goal, children[0])
        run_processes.kill(children[choice.randrange(2)])
        for child in children:  # the one that is left would wait for the other
            run_processes.kill(child)
        run_processes.finish(children, 30)
    codes = run_processes.finish(run_processes.start_work(work, output, processes=2), 3000)
    assert codes == [0, 0], run_processes.logs(output)


def check(names, data_root, checkpoint, tmp_path, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    benchmarks = [open_benchmark(name, data_root) for name in names]
    questions = sum(len(benchmark.items) for benchmark in benchmarks)
    answer(names, data_root, checkpoint, whole, batch_size=4)
    work = functools.partial(answer, names, data_root, checkpoint, killed, batch_size=3)
    run_killed(work, killed, questions, kills)
    expected, found = files(whole), files(killed)
    assert len(expected) >= len(names) and found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert answered(killed) == questions  # no question was asked twice
    for benchmark in benchmarks:
        assert None not in read_predictions(killed / benchmark.name / ANSWERS, benchmark).texts


def test_a_few_benchmarks_killed_and_resumed_by_two_processes(data_root, checkpoint, tmp_path):
    check(FEW, data_root, checkpoint, tmp_path, kills=1)


@pytest.mark.slow
def test_all_benchmarks_killed_and_resumed_by_two_processes(data_root, checkpoint, tmp_path):
    check([name for name in BENCHMARKS if name != "easy_vqa"], data_root, checkpoint, tmp_path, KILLS)
