"""The experiment about time: one stage on clips with a handful of steps, then evaluation, results and page."""

import json
import re
import shutil
from pathlib import Path

import pytest

from configs import quickstart_video
from vocojax.config import ConfigError
from vocojax.data.sources.easy_vqa import EasyVqaSource, Question
from vocojax.data.sources.easy_vqa_clips import ORDERED, SHARES, Clip, EasyVqaClips, words
from vocojax.data.tokenizer import word_tokenizer
from vocojax.experiments import video
from vocojax.experiments.jobs import Runs
from vocojax.experiments.video import VideoQuickstart, answer_clips, format_table, majority, table_row
from vocojax.training.config import stage_config
from vocojax.training.stage import train

pytest.importorskip("easy_vqa")
ROWS = ["Video stage, N = 2", "Image stage only, N = 2", "Shuffled frames, N = 2", "Text only"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A work directory whose stages are one run of two steps on clips of 8 frames."""
    workdir = tmp_path_factory.mktemp("video")
    questions = (f"{q.text} {q.answer}" for group in EasyVqaSource("train").questions for q in group)
    word_tokenizer([words(), *questions]).save(workdir / "tokenizer")
    values = quickstart_video.get_config("short_2")
    values.data.tokenizer = str(workdir / "tokenizer")
    values.update(steps=2, batch_size=2, unit_chunk=8)
    values.data.num_threads = 1
    train(stage_config(values), workdir / "seed_0" / "short_2")
    for stage in ("voco_2", "video_2"):
        shutil.copytree(workdir / "seed_0" / "short_2", workdir / "seed_0" / stage)
    return workdir


@pytest.fixture(scope="module")
def finished(workdir):
    return workdir, evaluated(workdir)


def evaluated(workdir):
    """The result of two clips, of 8 and 16 frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runs, "train", lambda self, jobs: None)  # all runs are finished
        patch.setattr(video, "MAJORITY_CLIPS", 50)
        return VideoQuickstart(quickstart_video.get_config, workdir, vocos=(2,), clips=2).run()


def test_result_is_what_is_promised(finished):
    workdir, result = finished
    assert json.loads((workdir / "video.json").read_text()) == result
    assert list(result["rows"]) == ROWS
    for row in result["rows"].values():
        assert 0 <= row["accuracy"] <= 1
        assert set(row["by_type"]) <= set(SHARES) and "came first" in row["by_type"]
        assert list(row["by_frames"]) == ["8", "16"]
        assert len(row["per_seed"]) == 1 and row["spread"]["accuracy"] == 0.0
    assert result["frames"] == [8, 16, 32, 64] and result["seeds"] == [0] and result["vocos"] == [2]
    assert result["ordered_types"] == list(ORDERED) and result["split"] == "test" and result["questions"] == 48


def test_report_is_one_self_contained_page(finished):
    page = (finished[0] / "report.html").read_text()
    assert not re.search(r"(src|href)='?(?!data:)\w", page) and "<script" not in page
    assert page.count("data:image/png;base64,") == 8 + 16 + 1  # two clips, the losses
    for text in (*ROWS, "gold", "Clips of 16 frames"):
        assert text in page


def test_answers_that_are_there_are_not_asked_for_again(finished):
    workdir, _ = finished
    path = workdir / "seed_0" / "video_2" / "answers_test_2.json"
    answers = json.loads(path.read_text())
    assert len(answers) == 48
    path.write_text(json.dumps(["nothing"] * 48))
    again = evaluated(workdir)
    path.write_text(json.dumps(answers))
    assert again["rows"][ROWS[0]]["accuracy"] == 0.0


class Recorder:
    """An assistant that remembers what it is asked."""

    def __init__(self):
        self.compressed, self.asked = [], []

    def compress(self, images):
        self.compressed += images
        return images

    def read(self, cache, questions, units, sampling):
        self.asked += [(text, [cache[unit] for unit in own]) for text, own in zip(questions, units, strict=True)]
        return [question.upper() for question in questions]


def test_each_image_is_compressed_once_and_each_question_sees_its_own_clip():
    ask = lambda text: Question(text, "red", "frame t")
    clips = [Clip((Path("a"), Path("b"), Path("a")), (ask("long 1"), ask("long 2"))),
             Clip((Path("b"),), (ask("short"),))]
    recorder = Recorder()
    assert answer_clips(recorder, clips, batch_size=2) == ["LONG 1", "LONG 2", "SHORT"]
    assert recorder.compressed == [Path("a"), Path("b")]
    assert recorder.asked == [
        ("short", [Path("b")]), ("long 1", [Path("a"), Path("b"), Path("a")]),
        ("long 2", [Path("a"), Path("b"), Path("a")])]


def test_shuffled_frames_are_the_same_images_in_another_order():
    names = tuple(Path(str(number)) for number in range(8))
    recorder = Recorder()
    answer_clips(recorder, [Clip(names, (Question("one", "red", "frame t"), Question("two", "red", "frame t")))], True)
    (_, first), (_, second) = recorder.asked
    assert first == second != list(names) and sorted(first) == sorted(names)


def test_text_only_guesses_the_most_frequent_answer():
    class Source:
        def clip(self, index):
            answers = (("red", "red", "blue"), ("red", "blue", "blue"), ("green",) * 3)[index]
            return Clip((), tuple(Question("q1" if index < 2 else "q2", answer, "frame t") for answer in answers))

    guess = majority(Source(), 3)
    assert guess(Question("q1", "", "frame t")) == "blue"  # three of each: the first in the alphabet
    assert guess(Question("q2", "", "frame t")) == "green"
    assert guess(Question("unknown", "", "frame t")) == "blue"


def test_a_row_is_the_mean_over_seeds():
    clips = [Clip((Path("a"),) * 8, (Question("q1", "red", "frame t"), Question("q2", "2", "count"))),
             Clip((Path("a"),) * 16, (Question("q3", "blue", "frame t"),))]
    row = table_row(clips, [["red", "1", "red"], ["red", "2", "blue"]])
    assert row["accuracy"] == pytest.approx(2 / 3) and row["spread"]["accuracy"] == pytest.approx(2 / 3)
    assert row["by_type"] == {"frame t": 0.75, "count": 0.5}
    assert row["by_frames"]["8"] == {"accuracy": 0.75, "by_type": {"frame t": 1.0, "count": 0.5}}
    assert row["by_frames"]["16"] == {"accuracy": 0.5, "by_type": {"frame t": 0.5}}
    assert [one["accuracy"] for one in row["per_seed"]] == [pytest.approx(1 / 3), 1.0]
    assert format_table({"A": row}) == ("|  | accuracy | frame t | count | frame t of 8 |\n"
                                        "| --- | --- | --- | --- | --- |\n"
                                        "| A | 66.7 % | 75.0 % | 50.0 % | 100.0 % |")


@pytest.mark.parametrize("stage", ["alignment", "voco_1", "short_1", "video_2"])
def test_every_stage_s_config_is_valid(stage):
    values = quickstart_video.get_config(stage)
    values.data.tokenizer = "tokenizer"
    config = stage_config(values)
    assert config.name == stage and config.model.decoder.vocab_size == 113
    assert config.plan == ("two_stage" if stage in ("short_1", "video_2") else "single_pass")


def test_unknown_stages_are_refused():
    with pytest.raises(ConfigError, match="'video' is unknown: alignment, voco_N, short_N or video_N"):
        quickstart_video.get_config("video")


def test_the_vocabulary_is_that_of_the_config(workdir):
    tokenizer = json.loads((workdir / "tokenizer" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) + 1 == quickstart_video.VOCABULARY  # <voco> is an added token
    assert len(EasyVqaClips("test")) == 150


@pytest.mark.slow
def test_all_of_it(tmp_path):
    class Tiny(dict):
        def get(self, stage, default=None):
            return 1

    result = VideoQuickstart(quickstart_video.get_config, tmp_path, vocos=(2,), steps=Tiny(), clips=8).run()
    assert list(result["rows"]) == ROWS
