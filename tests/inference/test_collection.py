"""Files into a store and questions out of it, by the package and by its launch scripts."""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.helpers.environment import on_cpu
from vocojax.cli.flag_checks import refuse_empty, require_writable
from vocojax.config import ConfigError
from vocojax.data.conversation import Turn
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import CacheError, VocoCache
from vocojax.inference.caches.store import Store
from vocojax.inference.collection import compress_files, find_files, int8_loss
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import Question, answer_all, read_questions
from vocojax.parallel.mesh import MeshConfig, local_mesh, parse_mesh
from vocojax.pretrained.loading import save_model
from vocojax.runs.card import ModelCard

ROOT = Path(__file__).parent.parent.parent
SHORT = SamplingConfig(max_new_tokens=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven images, one of them twice, and two files that are none."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    (root / "more").mkdir()
    (root / "more" / "twin.png").write_bytes((root / "3.png").read_bytes())
    (root / "more" / "empty.png").touch()
    (root / "more" / "torn.png").write_bytes((root / "0.png").read_bytes()[:100])
    return root


def test_every_process_takes_its_share(photos):
    patterns = [f"{photos}/**/*.png", f"{photos}/0.png"]
    everything = find_files(patterns)
    shares = [find_files(patterns, index, 3) for index in range(3)]
    assert len(everything) == 10 and sorted(itertools.chain(*shares)) == everything
    assert [len(share) for share in shares] == [4, 3, 3]
    assert find_files([f"{photos}/0.png"], 1, 2) == []
    for index in range(2):
        with pytest.raises(FileNotFoundError, match=r"no file matches .*/none\*"):
            find_files([f"{photos}/none*"], index, 2)


def test_compression_resumes_and_reports_bad_files(assistant, photos, tmp_path):
    store, files = Store(tmp_path), find_files([f"{photos}/**/*.png"])
    first = compress_files(assistant, store, files[:4], batch_size=3, num_threads=2)
    assert (first.compressed, first.skipped, first.bad) == (4, 0, {})
    rest = compress_files(assistant, store, files, batch_size=3, num_threads=2)
    assert (rest.compressed, rest.skipped) == (3, 5)
    assert sorted(Path(path).name for path in rest.bad) == ["empty.png", "torn.png"]
    assert all("cannot be decoded" in problem for problem in rest.bad.values())
    assert str(rest) == "3 compressed, 5 there already, 2 bad"
    cache = assistant.recall(store, [photos / "5.png"])
    np.testing.assert_allclose(cache.k_LUNGD, assistant.compress([photos / "5.png"]).k_LUNGD, atol=1e-5)


def test_nothing_is_compressed_for_a_store_that_cannot_be_written(assistant, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(type(assistant), "compress", lambda *_: pytest.fail("images were compressed"))

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    store = Store(tmp_path)
    for work in (lambda: assistant.recall(store, [photos / "0.png"]),
                 lambda: compress_files(assistant, store, [photos / "0.png"], num_threads=1)):
        with pytest.raises(CacheError, match="can't be written: Read-only file system: name a store that can"):
            work()


def test_what_a_store_lacks_or_has_damaged_is_compressed_and_put_in(assistant, photos, tmp_path):
    store, paths = Store(tmp_path), [photos / "2.png", photos / "0.png", photos / "2.png"]
    cache = assistant.recall(store, paths)
    assert cache.num_units == 3 and cache.image_digests[0] == cache.image_digests[2]
    path = store.path(cache.image_digests[1], assistant.fingerprint, 2)
    path.write_bytes(path.read_bytes()[:-3])
    again = assistant.recall(store, paths)
    np.testing.assert_allclose(again.v_LUNGD, cache.v_LUNGD, atol=1e-5)
    assert store.has(cache.image_digests[1], assistant.fingerprint, 2)
    assert assistant.recall(store, paths, num_vocos=1).k_LUNGD.shape[2] == 1


def test_answers_come_in_order_and_a_bad_question_spoils_no_other(assistant, photos, tmp_path):
    ask = "what color is the shape?"
    questions = [Question((str(photos / "1.png"),), ask, 1), Question((str(photos / "more" / "empty.png"),), ask),
                 Question((str(photos / "2.png"), str(photos / "1.png")), "is the shape red?", 2),
                 Question((str(photos / "2.png"),), "red " * 3000)]
    answers = list(answer_all(assistant, Store(tmp_path), questions, SHORT, batch_size=3))
    assert [question for question, _ in answers] == questions
    cache = assistant.compress([photos / "1.png", photos / "2.png"])
    expected = assistant.read(cache, [ask, "is the shape red?"], [[0], [1, 0]], SHORT)
    assert [answers[0][1], answers[2][1]] == [{"answer": text} for text in expected]
    assert "empty.png" in answers[1][1]["error"] and "there is room for" in answers[3][1]["error"]


def test_questions_are_read_strictly(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"image": "a.png", "question": "what?", "id": 7}\n\n'
                    '{"image": ["a.png", "b.png"], "question": "is?", "seed": 9}\n')
    first, second = read_questions(file, seed=4)
    assert (first.images, first.text, first.seed, first.record["id"]) == (("a.png",), "what?", 4, 7)
    assert (second.images, second.seed) == (("a.png", "b.png"), 9)
    for line, problem in (("{", "Expecting"), ('{"image": "a"}', "'question' is missing"), ("[]", "is no"),
                          ('{"image": [], "question": "x"}', "must be strings"),
                          ('{"image": 1, "question": 1}', "is no"),
                          *((f'{{"image": "a", "question": "x", "seed": {seed}}}', "seed must be a whole number in")
                            for seed in ("-1", "4294967296", "1e999", '"7"'))):
        file.write_text('{"image": "a.png", "question": "what?"}\n' + line)
        with pytest.raises(ValueError, match=rf"q\.jsonl, line 2: .*{problem}"):
            read_questions(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(file)
    file.write_bytes('{"image": "a.png", "question": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"q\.jsonl: must be UTF-8"):
        read_questions(file)


def test_only_a_newline_ends_a_line_of_questions(tmp_path):
    """JSON strings may hold what Unicode counts as the ends of lines."""
    file, text = tmp_path / "q.jsonl", "one\u2028two\x85three"
    line = json.dumps({"image": "a.png", "question": text}, ensure_ascii=False)
    file.write_bytes(f"{line}\r\n{line}\n".encode())
    assert [question.text for question in read_questions(file)] == [text, text]
    assert [question.seed for question in read_questions(file, seed=2**32 - 1)] == [2**32 - 1, 0]


def test_byte_order_marks_in_questions_are_passed_over(tmp_path):
    line = '\ufeff{"image": "a.png", "question": "what?"}\n'  # two files joined, each with its own
    (tmp_path / "q.jsonl").write_text(line * 2 + "\ufeff", encoding="utf-8")
    assert len(read_questions(tmp_path / "q.jsonl")) == 2


def test_the_loss_of_int8_is_measured(assistant, cache):
    loss = int8_loss(assistant, cache, "what color is the shape?")
    assert 0 < loss.mean < loss.largest < 0.05 * loss.spread and loss.same_token == 1
    assert "int8 storage: |Δ logit| at most" in str(loss)


def test_a_mesh_is_of_the_devices_that_there_are():
    assert local_mesh(MeshConfig()).shape == {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}
    for sizes in ("2,1,1", "-1,2,1"):
        with pytest.raises(ConfigError, match="mesh slice x data x fsdp x tensor must multiply to the 1 devices"):
            parse_mesh(sizes)
    with pytest.raises(ConfigError, match=r"slice, data, fsdp, tensor must hold -1 at most once, got \(1, -1, -1, 1\)"):
        parse_mesh("-1,-1,1")
    with pytest.raises(ConfigError, match=r"slice, data, fsdp, tensor must each be >= 1, or -1, got \(1, 0, 1, 1\)"):
        parse_mesh("0,1,1")


def test_a_mesh_flag_is_read_strictly():
    assert parse_mesh(None) is None
    assert parse_mesh("1") == parse_mesh("-1,1,1") == local_mesh(MeshConfig())
    for text in ("", "1,1,1,1", "a", "1,,1", "1.5"):
        with pytest.raises(ConfigError, match=re.escape(f"--mesh must be whole numbers data,fsdp,tensor such as 4,1,2 "
                                                        f"(-1 for the rest), got {text!r}")):
            parse_mesh(text)


def test_flags_are_checked_where_they_are_given(tmp_path):
    for name, define in (("of_a_test", flags.DEFINE_string), ("several_of_a_test", flags.DEFINE_multi_string)):
        define(name, None, "")
        refuse_empty(name)
    flags.DEFINE_string("file_of_a_test", None, "")
    require_writable("file_of_a_test")
    given = flags.FLAGS
    given.of_a_test, given.several_of_a_test, given.file_of_a_test = "x", ["x", "y"], str(tmp_path / "new.json")
    with pytest.raises(flags.IllegalFlagValueError, match="--of_a_test=: must not be empty"):
        given.of_a_test = ""
    with pytest.raises(flags.IllegalFlagValueError, match="must not be empty"):
        given.several_of_a_test = ["x", ""]
    for path in ("", tmp_path, tmp_path / "missing" / "x"):
        with pytest.raises(flags.IllegalFlagValueError, match="must name a file that can be written, in a directory"):
            given.file_of_a_test = str(path)
    assert not list(tmp_path.iterdir())
    for name in ("of_a_test", "several_of_a_test", "file_of_a_test"):
        delattr(given, name)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "given", "message"), [
    ("compress", ["--images=x", "--checkpoint=c", "--store="], "flag --store=: must not be empty"),
    ("compress", ["--images=x", "--checkpoint=c", "--store=s", "--json=/missing/x"], "--json=/missing/x: must name"),
    ("compress", ["--images=x", "--checkpoint=c", "--store=s"], "error: no file matches x"),
    ("answer", ["--checkpoint=c", "--store=s", "--questions=q", "--question=what?"], "without them"),
    ("answer", ["--checkpoint=c", "--store=s", "--question=what?", "--image=a.png", "--seed=-1"], "--seed"),
    ("agreement", ["--checkpoint=c", "--json=/missing/x"], "--json=/missing/x: must name a file"),
    ("efficiency", ["--config=configs/voco.py", "--json=/missing/x"], "--json=/missing/x: must name a file"),
])
def test_launch_scripts_refuse_nonsense_at_once(script, given, message):
    run = subprocess.run([sys.executable, f"launch/{script}.py", *given], cwd=ROOT, text=True, capture_output=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    assert run.returncode != 0 and message in run.stderr and "Traceback" not in run.stderr


@pytest.mark.slow
def test_the_launch_scripts_on_one_device_on_a_mesh_and_on_two_processes(assistant, photos, tmp_path):
    """The same caches and answers every time; two processes with one store share the files."""
    checkpoint = tmp_path / "model"
    save_model(assistant.model, ModelCard(assistant.model.config, assistant.tokenizer), checkpoint, "orbax")

    def start(script, *flags, devices=1):
        environment = {**os.environ, **on_cpu(devices)}
        return subprocess.Popen([sys.executable, f"launch/{script}.py", f"--checkpoint={checkpoint}", *flags], cwd=ROOT,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)

    def finish(process):
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        return out

    files = f"--images={photos}/**/*.png"
    one, mesh, two = (tmp_path / name for name in ("one", "mesh", "two"))
    assert "7 compressed, 1 there already, 2 bad" in finish(start("compress", files, f"--store={one}"))
    assert "7 compressed" in finish(start("compress", files, f"--store={mesh}", "--mesh=2,1,2", devices=4))
    address = f"--coordinator_address=localhost:{20000 + os.getpid() % 10000}"
    pair = [start("compress", files, f"--store={two}", address, "--num_processes=2", f"--process_id={i}",
                  f"--json={tmp_path}/counts.json") for i in range(2)]
    for process in pair:
        finish(process)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["compressed"] in (7, 8) and counts["compressed"] + counts["skipped"] == 8  # the twins may meet
    assert sorted(Path(path).name for path in counts["bad"]) == ["empty.png", "torn.png"]

    loaded = Assistant.from_pretrained(checkpoint)
    images = loaded.load_images([photos / f"{i}.png" for i in range(7)])
    expected = loaded.compress(images)
    for root in (one, mesh, two):
        found = VocoCache.concat([Store(root).get(image, loaded.fingerprint, 2) for image in expected.image_digests])
        np.testing.assert_allclose(found.k_LUNGD, expected.k_LUNGD, atol=1e-5)

    ask = "what color is the shape?"
    flags = (f"--image={photos}/4.png", f"--image={photos}/2.png", f"--question={ask}", "--max_new_tokens=6")
    answer = loaded.read(expected, [ask], [[4, 2]], SamplingConfig(max_new_tokens=6))[0]
    assert finish(start("answer", f"--store={one}", *flags)).strip() == answer
    assert finish(start("answer", f"--store={mesh}", *flags, "--mesh=2,1,2", devices=4)).strip() == answer
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": f"{photos}/4.png", "question": ask, "id": 1}) + "\n")
    line = finish(start("answer", f"--store={one}", f"--questions={tmp_path}/q.jsonl", "--max_new_tokens=6"))
    assert json.loads(line) == {"image": f"{photos}/4.png", "question": ask, "id": 1,
                                "answer": loaded.read(expected, [ask], [[4]], SamplingConfig(max_new_tokens=6))[0]}
    odd = start("answer", f"--image={photos}/4.png", "--question=what zebra is red?", "--max_new_tokens=2")
    assert "these words of the question, and reads each as <unk>: zebra" in odd.communicate(timeout=300)[1]
    refused = start("compress", f"--images={photos}/none*", f"--store={one}")
    assert "error: no file matches" in refused.communicate(timeout=300)[1] and refused.returncode == 1

    causal = tmp_path / "causal"
    save_model(assistant.model, ModelCard(assistant.model.config, assistant.tokenizer, visibility="causal"), causal,
               "orbax")
    bound = Assistant.from_pretrained(causal)
    whole = bound.generate_whole([[images[4], images[2]]], [(Turn("user", ask),)], SamplingConfig(max_new_tokens=6))
    assert finish(start("answer", *flags, f"--checkpoint={causal}")).strip() == bound.texts(whole)[0]
