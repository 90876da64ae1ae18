"""lmms-eval itself, in an environment of its own: its command on local data, and its scores against ours."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.yes_no_model import save_yes_no_model
from tests.helpers.wheel import PIP, ROOT, build_wheel
from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.predictions import read_predictions
from vocojax.evaluation.running import Asking, answer_benchmark
from vocojax.inference.assistant import Assistant

# As README.md says; lmms-eval's own requirements would bring another torch and several hundred packages.
BESIDE = ("torch==2.13.0", "filelock<3.20", "av<16", "loguru", "datasets", "accelerate", "dill", "pandas", "evaluate",
          "sacrebleu", "pytz", "tenacity", "pydantic", "jinja2", "packaging", "pyyaml", "pytablewriter")
LMMS_EVAL = "lmms_eval==0.7.3"
NAMES = ("pope", "mme")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with this package and lmms-eval."""
    root = tmp_path_factory.mktemp("lmms_eval")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "environment"], check=True)
    python = root / "environment" / "bin" / "python"
    install = [*PIP, "--python", python, "install", "--quiet"]
    subprocess.run([*install, build_wheel(root), *BESIDE], check=True)
    subprocess.run([*install, "--no-deps", LMMS_EVAL], check=True)
    return python


def run(directory: Path, *command) -> None:
    done = subprocess.run(list(map(str, command)), cwd=directory, capture_output=True, text=True, timeout=1200, env={
        "PATH": os.environ["PATH"], "HOME": str(directory), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr


def results(output: Path) -> tuple[dict, dict]:
    """Returns lmms-eval's figures by task and name, and its answers by task in the documents' order."""
    (path,) = output.glob("*/*_results.json")
    figures = {task: {name.partition(",")[0]: value for name, value in found.items()}
               for task, found in json.loads(path.read_text())["results"].items()}
    answers = {}
    for task in figures:
        (path,) = output.glob(f"*/*_samples_{task}.jsonl")
        samples = map(json.loads, path.read_text().splitlines())
        answers[task] = [each["filtered_resps"] for each in sorted(samples, key=lambda each: each["doc_id"])]
    return figures, {task: [text if isinstance(text, str) else text[0] for text in texts]
                     for task, texts in answers.items()}


@pytest.mark.slow
def test_lmms_evals_command_and_scores(python, data_root, tmp_path):
    checkpoint = save_yes_no_model(tmp_path / "model")
    root = shutil.copytree(data_root, tmp_path / "data")
    path = root / "mme/MME_Benchmark_release_version/artwork/questions_answers_YN/2.txt"
    path.write_text("Is there a dog? Please answer yes or no.\tNo\n"  # the model would answer all right
                    "Is there a cat in 2? Please answer yes or no.\tYes\n")
    benchmarks = {name: open_benchmark(name, root) for name in NAMES}
    questions = {name: [{
        "question_id": item.id.partition("#")[0], "category": item.kind, "answer": item.record.get("gold", item.gold),
        "question": item.record.get("question", item.record.get("text")), "image": str(item.visuals[0])}
        for item in benchmark.items] for name, benchmark in benchmarks.items()}
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "tasks").mkdir()
    run(tmp_path, python, Path(__file__).with_name("lmms_eval_data.py"), "questions.json", "tasks")
    flags = ["--model", "vocojax", "--model_args", f"pretrained={checkpoint},store=caches", "--tasks",
             "local_pope,local_mme", "--include_path", "tasks", "--batch_size", 4, "--log_samples", "--output_path"]
    run(tmp_path, python, "-m", "lmms_eval", *flags, "one")
    figures, answers = results(tmp_path / "one")

    files = {str(path.read_bytes()) for path in (tmp_path / "caches").rglob("*.safetensors")}
    assert len(files) == len({item.visuals for benchmark in benchmarks.values() for item in benchmark.items})
    scores = {}
    for name, benchmark in benchmarks.items():
        texts = answers[f"local_{name}"]
        assert {"yes", "no"} <= {text.lower().strip(".") for text in texts}, texts  # else the scores say little
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for item, text in zip(benchmark.items, texts, strict=True):
                file.write(json.dumps({"question_id": item.id, "text": text}) + "\n")
        predictions = read_predictions(tmp_path / f"{name}.jsonl", benchmark)
        scores[name] = benchmark.score(predictions.texts, "lmms-eval").metrics
        # The same model, the same pictures and prompts: the same answers (lmms-eval's are limited to one word).
        assistant = Assistant.from_pretrained(checkpoint)
        own = answer_benchmark(assistant, benchmark, tmp_path / "own" / name, Asking("tiny"))
        assert [text.split(" ")[0] for text in own] == texts
    theirs = figures["local_pope"]
    assert scores["pope"] == pytest.approx({
        "f1": 100 * theirs["pope_f1_score"], "accuracy": 100 * theirs["pope_accuracy"],
        "precision": 100 * theirs["pope_precision"], "recall": 100 * theirs["pope_recall"],
        "yes_ratio": 100 * theirs["pope_yes_ratio"]}, rel=1e-12)
    assert scores["mme"]["perception"] == pytest.approx(figures["local_mme"]["mme_perception_score"], rel=1e-12)
    assert 0 < scores["pope"]["accuracy"] < 100 and 0 < scores["mme"]["perception"] < 400

    shutil.rmtree(tmp_path / "caches")
    run(tmp_path, python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1,
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "lmms_eval", *flags, "two")
    assert results(tmp_path / "two") == (figures, answers)
