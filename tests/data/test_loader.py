"""The batch stream: deterministic, resumable, and honest about what it skips."""

import collections
import dataclasses
import json
import shutil

import numpy as np
import pytest
from absl import flags

from vocojax.config import ConfigError
from vocojax.data.config import DataConfig, PartConfig
from vocojax.data.loader import BatchStream, SkippedTooMany, StreamStateError, merge_states
from vocojax.data.prepared import drawn_vocos
from vocojax.data.sources import LlavaSource
from vocojax.layout import IGNORE, LayoutError


@pytest.fixture
def data(llava_data):
    return DataConfig(
        path=str(llava_data / "records.json"), image_root=str(llava_data / "images"),
        tokenizer=str(llava_data / "tokenizer"), template="short", row_length=40, images_per_row=2, pack_window=5,
        num_threads=2, max_skipped_share=0.01,
    )


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a)


def rewrite(llava_data, tmp_path, edit):
    """A copy of the records with some of them edited."""
    records = json.loads((llava_data / "records.json").read_text())
    edit(records)
    (tmp_path / "records.json").write_text(json.dumps(records))
    return str(tmp_path / "records.json")


def test_stream_is_a_function_of_the_seed(tiny_config, data):
    first, again = (BatchStream(tiny_config, data, 2, 7, "voco") for _ in range(2))
    batches = [next(first) for _ in range(12)]  # several epochs
    assert all(same(batch, next(again)) for batch in batches)
    other = BatchStream(tiny_config, data, 2, 8, "voco")
    assert not all(same(batch, next(other)) for batch in batches)
    more_threads = BatchStream(tiny_config, dataclasses.replace(data, num_threads=5), 2, 7, "voco")
    assert all(same(batch, next(more_threads)) for batch in batches)


@pytest.mark.parametrize("taken", [0, 1, 4, 9])
def test_stream_resumes_with_exactly_the_next_batch(tiny_config, data, taken):
    stream = BatchStream(tiny_config, data, 2, 7, "voco", "causal")
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(5)]
    resumed = BatchStream(tiny_config, data, 2, 7, "voco", "causal")
    resumed.set_state(state)
    assert all(same(batch, next(resumed)) for batch in expected)


def test_elastic_samples_read_a_random_number_of_vocos(tiny_config, data):
    """Only who sees whom and where differs, batches resume, and what is kept in memory is drawn again."""
    model = dataclasses.replace(tiny_config, voco=dataclasses.replace(tiny_config.voco, num_vocos=3))
    data = dataclasses.replace(data, row_length=60)
    elastic = dataclasses.replace(data, fewest_vocos=1)
    plain, stream = (BatchStream(model, each, 2, 7, "voco", "causal") for each in (data, elastic))
    kept = BatchStream(model, dataclasses.replace(elastic, keep_in_memory=True), 2, 7, "voco", "causal")
    resumed, read = BatchStream(model, elastic, 2, 7, "voco", "causal"), set()
    for number in range(12):
        if number == 5:
            resumed.set_state(json.loads(json.dumps(stream.get_state())))
        batch, whole = next(stream), next(plain)
        assert same(batch, next(kept)) and (number < 5 or same(batch, next(resumed)))
        assert {key for key in batch if not np.array_equal(batch[key], whole[key])} <= {"positions", "stop"}
        is_seen = (batch["ids"] == model.voco.token_id) & (batch["stop"] == whole["stop"])
        read |= set((is_seen.sum(-1) / np.maximum((whole["vision"] % 4 == 0).sum(-1), 1)).tolist())
    assert {1.0, 2.0, 3.0} <= read
    with pytest.raises(ConfigError, match=r"data\.fewest_vocos must be at most 3, the model's VoCo tokens, got 4"):
        BatchStream(model, dataclasses.replace(data, fewest_vocos=4), 2, 7, "voco")
    with pytest.raises(ConfigError, match="anneal_samples must be 0 without fewest_vocos, got 10"):
        dataclasses.replace(data, anneal_samples=10)


def test_the_fewest_vocos_go_down_over_the_samples():
    draw = lambda position, anneal=0, fewest=1: drawn_vocos((1, 2, 4, 8), fewest, position, anneal, 7)
    counts = collections.Counter(draw(position) for position in range(4000))
    assert sorted(counts) == [1, 2, 4, 8] and all(900 < count < 1100 for count in counts.values())
    assert {draw(position, fewest=3) for position in range(50)} == {4, 8}
    seen = [{draw(position, 1200) for position in range(first, first + 400)} for first in (0, 400, 800, 1200)]
    assert seen == [{8}, {4, 8}, {2, 4, 8}, {1, 2, 4, 8}]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(tiny_config, data, processes):
    whole = BatchStream(tiny_config, data, 4, 7, "voco")
    parts = [BatchStream(tiny_config, data, 4, 7, "voco", process_index=i, process_count=processes)
             for i in range(processes)]
    for _ in range(6):
        made = [next(part) for part in parts]
        assert all(len(part["ids"]) == 4 // processes for part in made)
        assert same(next(whole), {key: np.concatenate([part[key] for part in made]) for key in made[0]})


@pytest.mark.parametrize(("before", "behind"), [(1, 4), (4, 2), (2, 1)])
def test_a_stream_goes_on_with_another_number_of_processes(tiny_config, data, llava_data, tmp_path, before, behind):
    path = rewrite(llava_data, tmp_path, lambda records: records[2].update(image="missing.png"))
    data = dataclasses.replace(data, path=path, max_skipped_share=1.0)
    whole = BatchStream(tiny_config, data, 4, 7, "voco")
    streams = [BatchStream(tiny_config, data, 4, 7, "voco", process_index=i, process_count=before)
               for i in range(before)]
    for _ in range(3):
        next(whole)
        made = [next(stream) for stream in streams]
    state = json.loads(json.dumps(merge_states([stream.get_state() for stream in streams])))
    assert state == json.loads(json.dumps(whole.get_state()))
    streams = [BatchStream(tiny_config, data, 4, 7, "voco", process_index=i, process_count=behind)
               for i in range(behind)]
    for stream in streams:
        stream.set_state(state)
    for _ in range(3):
        made = [next(stream) for stream in streams]
        assert same(next(whole), {key: np.concatenate([part[key] for part in made]) for key in made[0]})
    assert merge_states([stream.get_state() for stream in streams]) == whole.get_state()
    counted = [stream.tally.scalars() for stream in streams]
    assert sum(c["data/records"] for c in counted) == whole.tally.scalars()["data/records"]


def test_states_of_another_stream_are_refused(tiny_config, data):
    stream = BatchStream(tiny_config, data, 4, 7, "voco")
    state = stream.get_state()
    with pytest.raises(StreamStateError, match=r"another stream, with packers 4 \(here 2\): resume with the data"):
        BatchStream(tiny_config, dataclasses.replace(data, packers=2), 4, 7, "voco").set_state(state)
    with pytest.raises(StreamStateError, match=r"with seed 7 \(here 8\)"):
        BatchStream(tiny_config, data, 4, 8, "voco").set_state(state)
    half = [BatchStream(tiny_config, data, 4, 7, "voco", process_index=i, process_count=2) for i in range(2)]
    with pytest.raises(StreamStateError, match=r"lacks the packers \[2, 3\] of 4: merge the states"):
        stream.set_state(half[0].get_state())
    with pytest.raises(StreamStateError, match="states of 1 processes hold 2 of 4 packers"):
        merge_states([half[0].get_state()])
    with pytest.raises(StreamStateError, match="are of different streams"):
        merge_states([half[0].get_state(), BatchStream(tiny_config, data, 4, 8, "voco").get_state()])


@pytest.mark.parametrize(("change", "message"), [
    ({"row_length": 41}, r"with row_length 40 \(here 41\)"),
    ({"pack_window": 6}, r"with pack_window 5 \(here 6\)"),
    ({"template": "vicuna_v1"}, r"with template short \(here vicuna_v1\)"),
    ({"fit": "square"}, r"with fit pad \(here square\)"),
])
def test_states_of_a_config_that_makes_other_batches_are_refused(tiny_config, data, change, message):
    state = json.loads(json.dumps(BatchStream(tiny_config, data, 2, 7, "voco").get_state()))
    with pytest.raises(StreamStateError, match=message):
        BatchStream(tiny_config, dataclasses.replace(data, **change), 2, 7, "voco").set_state(state)


def test_states_of_other_data_are_refused_wherever_they_lie(tiny_config, data, llava_data, tmp_path):
    """A copy elsewhere goes on; an edit of as many records, another weight in a mixture and other units do not."""
    state = json.loads(json.dumps(BatchStream(tiny_config, data, 2, 7, "voco").get_state()))
    (tmp_path / "copy.json").write_bytes((llava_data / "records.json").read_bytes())
    free = {"path": str(tmp_path / "copy.json"), "num_threads": 3, "max_skipped_share": 0.5}
    BatchStream(tiny_config, dataclasses.replace(data, **free), 2, 7, "voco").set_state(state)
    edited = rewrite(llava_data, tmp_path, lambda records: records[0]["conversations"][1].update(value="tan"))
    with pytest.raises(StreamStateError, match="of another stream, with content"):
        BatchStream(tiny_config, dataclasses.replace(data, path=edited), 2, 7, "voco").set_state(state)
    mixed = [dataclasses.replace(data, mixture=(PartConfig(path=data.path, image_root=data.image_root, weight=weight),))
             for weight in (1.0, 1.01)]
    state = json.loads(json.dumps(BatchStream(tiny_config, mixed[0], 2, 7, "voco").get_state()))
    BatchStream(tiny_config, mixed[0], 2, 7, "voco").set_state(state)
    with pytest.raises(StreamStateError, match=r"with mixture .*'weight': 1\.0"):
        BatchStream(tiny_config, mixed[1], 2, 7, "voco").set_state(state)
    more = dataclasses.replace(tiny_config, voco=dataclasses.replace(tiny_config.voco, num_vocos=3))
    with pytest.raises(StreamStateError, match="with unit"):
        BatchStream(more, mixed[0], 2, 7, "voco").set_state(state)


def test_a_file_that_went_since_the_state_was_saved_stops_the_run_by_name(tiny_config, data, llava_data, tmp_path):
    """With anyres, laying out a record reads its image."""
    shutil.copytree(llava_data / "images", tmp_path / "images")
    data = dataclasses.replace(data, image_root=str(tmp_path / "images"), fit="anyres", row_length=80, images_per_row=5)
    stream = BatchStream(tiny_config, data, 2, 7, "voco")
    next(stream)
    state = stream.get_state()
    stream.close()
    for image in sorted((tmp_path / "images").iterdir())[1:]:
        image.unlink()
    resumed = BatchStream(tiny_config, data, 2, 7, "voco")
    with pytest.raises(StreamStateError, match=r"record #\d+ could be used when .*\.png': cannot be read.*restore its"):
        resumed.set_state(state)
        next(resumed)


def test_packers_must_share_rows_and_processes_evenly(tiny_config, data):
    with pytest.raises(ConfigError, match=r"data\.packers must divide the 4 rows of a batch, got 3"):
        BatchStream(tiny_config, dataclasses.replace(data, packers=3), 4, 0, "voco")
    with pytest.raises(ConfigError, match=r"must be a multiple of the 3 processes that share them, got 4"):
        BatchStream(tiny_config, data, 4, 0, "voco", process_count=3)


def test_a_stream_without_a_usable_record_says_so(tiny_config, data, llava_data, tmp_path):
    path = rewrite(llava_data, tmp_path, lambda records: [r.update(image="../x") for r in records])
    stream = BatchStream(tiny_config, dataclasses.replace(data, path=path, max_skipped_share=1.0), 1, 0, "voco")
    with pytest.raises(SkippedTooMany, match="no record can be used"):
        next(stream)


def test_epochs_hold_every_record_once(tiny_config, data):
    one_by_one = dataclasses.replace(data, images_per_row=1, row_length=24, pack_window=1)
    stream = BatchStream(tiny_config, one_by_one, 1, 0, "voco")
    answers = [int(next(stream)["target_ids"][0, 0]) for _ in range(12)]
    colours = [stream.tokenizer.encode(c).ids[0] for c in ("red", "green", "blue")]
    assert sorted(answers) == sorted(colours * 4)


def test_bad_images_are_skipped_and_counted(tiny_config, data, llava_data, tmp_path):
    (llava_data / "images" / "broken.png").write_bytes(b"no image")

    def edit(records):
        records[2]["image"], records[5]["image"] = "missing.png", "broken.png"

    path = rewrite(llava_data, tmp_path, edit)
    stream = BatchStream(tiny_config, dataclasses.replace(data, path=path, max_skipped_share=0.5), 2, 0, "voco")
    for _ in range(6):
        next(stream)
    scalars = stream.tally.scalars()
    assert scalars["data/skipped/missing image"] >= 1 and scalars["data/skipped/undecodable image"] >= 1


def test_a_run_stops_when_too_much_is_skipped(tiny_config, data, llava_data, tmp_path):
    path = rewrite(llava_data, tmp_path, lambda records: [r.update(image="missing.png") for r in records[:9]])
    stream = BatchStream(tiny_config, dataclasses.replace(data, path=path), 2, 0, "voco")
    with pytest.raises(SkippedTooMany, match=r"records were skipped \(missing image: \d+\), more than data\.max_skip"):
        for _ in range(20):
            next(stream)


def test_truncated_answers_are_counted_and_lost_ones_skipped(tiny_config, data):
    """A unit takes 8 tokens, question and answer 13: the row cuts `</s>` off, then the answer as well."""
    cut = dataclasses.replace(data, row_length=20, max_skipped_share=1.0)
    stream = BatchStream(tiny_config, cut, 1, 0, "voco")
    next(stream)
    scalars = stream.tally.scalars()
    assert scalars["data/dropped_tokens"] > 0 and "data/skipped/truncated away" not in scalars
    stream = BatchStream(tiny_config, dataclasses.replace(cut, row_length=19), 1, 0, "voco")
    next(stream)
    assert stream.tally.scalars()["data/skipped/truncated away"] > 0


def test_kept_records_are_counted_once(tiny_config, data, llava_data, tmp_path):
    """One bad record of twelve stays one bad record, however many epochs go by."""
    path = rewrite(llava_data, tmp_path, lambda records: records[2].update(image="missing.png"))
    kept = dataclasses.replace(data, path=path, keep_in_memory=True, max_skipped_share=0.001)
    stream = BatchStream(tiny_config, kept, 2, 0, "voco")
    for _ in range(40):
        next(stream)
    assert stream.tally.scalars() == {"data/records": 12, "data/dropped_tokens": 0, "data/skipped/missing image": 1}


def test_labels_reach_the_row_shifted(tiny_config, data):
    stream = BatchStream(tiny_config, data, 2, 7, "voco")
    batch = next(stream)
    for ids, index, targets in zip(batch["ids"], batch["target_index"], batch["target_ids"], strict=True):
        used = targets != IGNORE
        assert used.any() and (ids[index[used] + 1] == targets[used]).all()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda r: r.update(image="../records.json"), "image outside root"),
        (lambda r: r.update(image="/etc/passwd"), "image outside root"),
        (lambda r: r["conversations"][0].update(value="<image><image>what?"), "more <image> than images"),
        (lambda r: r["conversations"][1].update(value=""), "empty answer"),
        (lambda r: r.update(conversations="hello"), "no conversation"),
        (lambda r: r.update(conversations=["a"]), "no conversation"),
        (lambda r: r.update(image=5), "malformed record"),
    ],
)
def test_bad_records_name_their_reason(llava_data, tmp_path, edit, reason):
    path = rewrite(llava_data, tmp_path, lambda records: edit(records[0]))
    with pytest.raises(LayoutError, match="record 'r0'") as error:
        LlavaSource(path, llava_data / "images")[0]
    assert error.value.reason == reason


def test_a_file_that_is_no_list_is_named(tmp_path):
    for content, problem in ((b"{}", "Expected `array`, got `object`"), (b"[", "truncated"), (b"\xff", "byte 0")):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.json: not a JSON list in UTF-8: .*{problem}"):
            LlavaSource(tmp_path / "x.json", tmp_path)


def test_the_tokenizer_must_fit_the_model(tiny_config, data):
    wrong = dataclasses.replace(tiny_config, voco=dataclasses.replace(tiny_config.voco, token_id=3))
    with pytest.raises(ConfigError, match=r"model\.voco\.token_id must be \d+, the id of <voco>"):
        BatchStream(wrong, data, 2, 0, "voco")


def test_data_config_errors_name_the_key():
    with pytest.raises(ConfigError, match=r"template must be one of .*, got 'v2'"):
        DataConfig(source="easy_vqa", tokenizer="x", template="v2")


@pytest.mark.slow
def test_worker_processes_change_nothing(tiny_config, data):
    whole = BatchStream(tiny_config, data, 4, 7, "voco")
    expected = [next(whole) for _ in range(6)]
    flags.FLAGS(["test"])
    workers = BatchStream(tiny_config, dataclasses.replace(data, num_workers=2), 4, 7, "voco")
    assert all(same(batch, next(workers)) for batch in expected[:3])
    state = workers.get_state()
    workers.close()
    resumed = BatchStream(tiny_config, dataclasses.replace(data, num_workers=1), 4, 7, "voco")
    resumed.set_state(state)
    assert all(same(batch, next(resumed)) for batch in expected[3:])
    assert resumed.tally.scalars() == whole.tally.scalars()
    resumed.close()
