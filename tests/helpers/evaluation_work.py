"""Answers benchmarks in a process of its own."""

from collections.abc import Sequence
from pathlib import Path

from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.running import Asking, answer_benchmark, asked_items, write_submission
from vocojax.inference.assistant import Assistant
from vocojax.parallel import processes


def answer(names: Sequence[str], data_root: Path, checkpoint: Path, output: Path, batch_size: int) -> None:
    """Answers benchmarks and writes their answer files, as `vocojax evaluate` does."""
    assistant = Assistant.from_pretrained(checkpoint)
    for name in names:
        benchmark = open_benchmark(name, data_root)
        asking = Asking("tiny", batch_size)
        texts = answer_benchmark(assistant, benchmark, output / name, asking)
        if processes.is_first():
            write_submission(benchmark, asked_items(benchmark, None), texts, output / name)
