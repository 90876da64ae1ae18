"""Answering benchmarks with a tiny model: the same answers after a kill, in other batches, by several processes."""

import itertools
import json
import shutil

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocojax.data.conversation import template
from vocojax.errors import InputError
from vocojax.evaluation import running
from vocojax.evaluation.benchmarks.base import Item
from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.predictions import read_predictions
from vocojax.evaluation.running import ANSWERS, Asking, answer_benchmark
from vocojax.inference.assistant import Assistant

NAMES = ("textvqa", "mme", "pope")


@pytest.fixture(scope="module")
def assistant(tiny_model, words):
    return Assistant(tiny_model, words, template("short"))


@pytest.fixture(scope="module")
def asked(data_root):
    return [open_benchmark(name, data_root) for name in NAMES]


@pytest.fixture(scope="module")
def whole(assistant, asked, tmp_path_factory):
    """Every benchmark's answer file, of one undisturbed run."""
    output = tmp_path_factory.mktemp("whole")
    for benchmark in asked:
        texts = answer_benchmark(assistant, benchmark, output / benchmark.name, Asking("tiny", batch_size=4))
        assert list(read_predictions(output / benchmark.name / ANSWERS, benchmark).texts) == texts
    return output


def test_a_killed_run_resumes_without_asking_again_and_in_other_batches(assistant, asked, whole, tmp_path, monkeypatch):
    killed, append = [], running._Log.append

    def append_and_die(log, records):
        append(log, records)
        killed.append(len(records))
        if len(killed) % 2:  # the second of every two starts ends well
            log._file.write(b'{"id": "torn')
            log._file.flush()
            raise KeyboardInterrupt

    compressed, compress = [], assistant.caches_of
    monkeypatch.setattr(assistant, "caches_of", lambda visuals, store=None: (
        compressed.extend(visuals), compress(visuals, store))[1])
    for benchmark in asked:
        with monkeypatch.context() as patch:
            patch.setattr(running._Log, "append", append_and_die)
            with pytest.raises(KeyboardInterrupt):
                answer_benchmark(assistant, benchmark, tmp_path / benchmark.name, Asking("tiny", batch_size=3))
            killed.append(0)
        first = killed[-2]
        del compressed[:]
        answer_benchmark(assistant, benchmark, tmp_path / benchmark.name, Asking("tiny", batch_size=2))
        assert (tmp_path / benchmark.name / ANSWERS).read_bytes() == (whole / benchmark.name / ANSWERS).read_bytes()
        parts = (tmp_path / benchmark.name / "parts" / "0.jsonl").read_text().splitlines()
        assert len(parts) == len(benchmark.items) and first == 3
        del compressed[:]
        answer_benchmark(assistant, benchmark, tmp_path / benchmark.name, Asking("tiny"))
        assert not compressed  # all is answered


def test_every_visual_is_compressed_once(assistant, asked, tmp_path, monkeypatch):
    compressed, compress = [], assistant.caches_of
    monkeypatch.setattr(assistant, "caches_of", lambda visuals, store=None: (
        compressed.extend(visuals), compress(visuals, store))[1])
    mme = asked[1]
    answer_benchmark(assistant, mme, tmp_path, Asking("tiny", batch_size=3))
    assert len(compressed) == len({item.visuals for item in mme.items})


def test_two_processes_share_the_questions(assistant, asked, whole, tmp_path, monkeypatch):
    pope = asked[2]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(running.processes, "from_all", lambda topic, value, limit: [value])
    for index in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        if index:
            with pytest.raises(InputError, match=r"lacks .* answers of other processes; --output must be a directory"):
                answer_benchmark(assistant, pope, tmp_path, Asking("tiny"))
        else:
            answer_benchmark(assistant, pope, tmp_path, Asking("tiny"))
    assert (tmp_path / ANSWERS).read_bytes() == (whole / "pope" / ANSWERS).read_bytes()
    sizes = [len((tmp_path / "parts" / f"{i}.jsonl").read_text().splitlines()) for i in (0, 1)]
    assert sum(sizes) == len(pope.items) and min(sizes) > 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 5))
def test_shares_are_a_partition_by_visuals(images, count):
    items = [Item(str(i), "what?", (f"{image}.png",)) for i, image in enumerate(images)]
    shares = [running._share(items, index, count) for index in range(count)]
    assert sorted(item.id for share in shares for item in share) == sorted(item.id for item in items)
    for share in shares:
        seen = [item.visuals for item in share]
        assert len(set(seen)) == len(list(itertools.groupby(seen)))  # questions about a visual follow one another
    assert not set.intersection(*({item.visuals for item in share} for share in shares)) or count == 1


def test_another_runs_directory_and_unreadable_images_are_refused(assistant, asked, whole, data_root, tmp_path):
    with pytest.raises(InputError, match=r"holds the answers of another run \(vocos is None there, 1 here\); name"):
        answer_benchmark(assistant, asked[2], whole / "pope", Asking("tiny", num_vocos=1))
    shutil.copytree(data_root / "gqa", tmp_path / "data" / "gqa")
    (tmp_path / "data/gqa/images/n1.jpg").rename(tmp_path / "n1.jpg")
    gqa = open_benchmark("gqa", tmp_path / "data")
    with pytest.raises(InputError, match=r"gqa: 2 questions could not be answered: '202' .*n1.jpg.*; mend them"):
        answer_benchmark(assistant, gqa, tmp_path, Asking("tiny"))
    (tmp_path / "n1.jpg").rename(tmp_path / "data/gqa/images/n1.jpg")
    assert len(answer_benchmark(assistant, gqa, tmp_path, Asking("tiny"))) == 4
    assert json.loads((tmp_path / ANSWERS).read_text().splitlines()[0])["question_id"] == "200"


def test_limit(assistant, asked, whole, tmp_path):
    texts = answer_benchmark(assistant, asked[1], tmp_path, Asking("tiny", limit=2))
    assert len(texts) == 2
    assert (tmp_path / ANSWERS).read_text().splitlines() == (whole / "mme" / ANSWERS).read_text().splitlines()[:2]


def test_prompts_and_answers_may_be_of_any_characters(tmp_path):
    record = {"id": "1", "prompt": "\ud83d", "text": "caf\u00e9"}  # half a pair of surrogates, as JSON files have them
    with running._Log(tmp_path / running.PARTS / "0.jsonl") as log:
        log.append([record, record | {"id": "2", "prompt": "\u00e9"}])
    first, second = (tmp_path / running.PARTS / "0.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == record and "caf\u00e9" in second
    (tmp_path / running.PARTS / "0.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match=r"0.jsonl, line 1: is no answer; remove the file"):
        running._read_parts(tmp_path, [])


def test_a_damaged_run_file_is_named(tmp_path):
    (tmp_path / running.RUN).write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"run.json: is damaged \(nested too deeply\); name another --output"):
        running._claim(tmp_path, {})
