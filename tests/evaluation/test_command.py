"""The command on files of answers, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.environment import on_cpu

ROOT = Path(__file__).parents[2]


def evaluate(*flags):
    return subprocess.run([sys.executable, ROOT / "launch" / "evaluate.py", *flags], capture_output=True, text=True,
                          timeout=120, env={"PATH": "/usr/bin:/bin", **on_cpu()})


def test_predictions_are_scored_and_written(data_root, tmp_path):
    answers, scores = tmp_path / "answers.jsonl", tmp_path / "scores.json"
    records = [{"id": f"20{i}", "answer": text} for i, text in enumerate(["Dog.", "yes", "no", "no"])]
    answers.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--benchmarks=gqa", f"--data_root={data_root}", f"--predictions={answers}"]
    done = evaluate(*flags, f"--json={scores}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gqa: accuracy 75.00 (official; 4 questions)\n")
    (result,) = json.loads(scores.read_text())
    assert (result["benchmark"], result["convention"], result["metric"], result["value"]) == (
        "gqa", "official", "accuracy", 75.0)
    answers.write_text(json.dumps(records[0]) + "\n")
    done = evaluate(*flags)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "3 of gqa's 4 questions without an answer: '201', '202', '203'" in done.stderr
