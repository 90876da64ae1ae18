"""Every benchmark on a small data root: prompts, official scores, conventions and official answer files."""

import json

import pytest

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import LETTER_ANSWER, SHORT_ANSWER
from vocojax.evaluation.benchmarks.registry import BENCHMARKS, GROUPS, expand, open_benchmark
from vocojax.evaluation.predictions import read_predictions
from vocojax.evaluation.running import answer_file, write_submission
from vocojax.inference.visuals import Video

HIDDEN = {"vqav2_test_dev", "vqav2_test", "vizwiz_test"}
NO_PIXELS = {name for name in BENCHMARKS if name != "easy_vqa"}


@pytest.fixture(scope="module", params=sorted(NO_PIXELS))
def benchmark(request, data_root):
    return open_benchmark(request.param, data_root)


def test_names_ids_and_groups(benchmark):
    assert BENCHMARKS[benchmark.name] and set().union(*GROUPS.values()) <= BENCHMARKS.keys()
    ids = [item.id for item in benchmark.items]
    assert len(ids) == len(set(ids)) > 0
    assert all(item.prompt and item.visuals for item in benchmark.items if benchmark.name != "scienceqa")
    assert (benchmark.items[0].gold is None) == (benchmark.name in HIDDEN)


def test_own_answer_files_are_read_back_and_scored(benchmark, tmp_path):
    """In LLaVA's format, as every run writes them."""
    texts = [f"Answer {i}." for i in range(len(benchmark.items))]
    path = tmp_path / "answers.jsonl"
    path.write_text(answer_file(benchmark, benchmark.items, texts, "model"))
    assert list(read_predictions(path, benchmark).texts) == texts
    if benchmark.name in HIDDEN:
        with pytest.raises(InputError, match="labels are not public"):
            benchmark.score(texts)
    elif not benchmark.name.startswith("reg_"):
        for convention in benchmark.conventions:
            result = benchmark.score(texts, convention)
            assert result.convention == convention and f"({convention};" in str(result)
            assert result.questions <= len(texts) and json.dumps(result.as_json())


def test_plain_files_and_files_for_servers_are_read_back(benchmark, tmp_path):
    pytest.importorskip("openpyxl") if benchmark.name.startswith("mmbench") else None
    texts = ["ABCDE"[i % 5] for i in range(len(benchmark.items))]
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"id": item.id, "answer": text}) + "\n"
                            for item, text in zip(benchmark.items, texts, strict=True)))
    assert list(read_predictions(path, benchmark).texts) == texts
    written = write_submission(benchmark, benchmark.items, texts, tmp_path)
    cleaned = {"gqa", "vqav2_val", "vqav2_test", "vqav2_test_dev", "vizwiz_val", "vizwiz_test"}
    if written:
        source = written[0].parent if benchmark.name == "mme" else written[0]
        if benchmark.name in cleaned:  # written as LLaVA submits them: "A" is an article
            assert len(read_predictions(source, benchmark).texts) == len(texts)
        else:
            assert list(read_predictions(source, benchmark).texts) == texts


def score(root, name, texts, convention="official"):
    benchmark = open_benchmark(name, root)
    listed = [texts[item.id] for item in benchmark.items] if isinstance(texts, dict) else texts
    return benchmark.score(listed, convention)


def test_prompts(data_root):
    first = lambda name: open_benchmark(name, data_root).items[0]
    assert first("gqa").prompt == "What is it, number 0?" + SHORT_ANSWER
    assert first("mmbench_en").prompt == "A hint\nWhich, 1?\nA. cat\nB. dog\nC. bird" + LETTER_ANSWER
    assert first("mmbench_cn").prompt.endswith("\nC. bird\n请直接回答选项字母。")
    assert first("mme").prompt == "Is there a dog?" + SHORT_ANSWER
    assert first("seed_image").prompt == "Which?\nA. w\nB. x\nC. y\nD. z" + LETTER_ANSWER
    assert open_benchmark("scienceqa_image", data_root).items[1].prompt == (
        "Context: A hint.\nWhich 1?\nA. cat\nB. dog" + LETTER_ANSWER)
    assert first("textvqa").prompt == "What brand is it?\nReference OCR token: dog, 2012" + SHORT_ANSWER
    assert open_benchmark("textvqa", data_root).items[2].prompt == (
        "What brand is it?\nReference OCR token: " + SHORT_ANSWER)
    assert first("textvqa_no_ocr").prompt == "What brand is it?" + SHORT_ANSWER
    assert first("vizwiz_val").prompt == ("What is this?\nWhen the provided information is insufficient, respond with "
                                          "'Unanswerable'." + SHORT_ANSWER)
    assert first("refcoco_val").prompt == "Where is thing 0?"
    (request, *_) = open_benchmark("pointqa_local_point_val", data_root).requests()
    assert "What is this?[0.125,0.250]" in request.conversation  # (5, 5 + 5) of 40
    (request, *_) = open_benchmark("reg_refcoco_val", data_root).requests()
    assert "[0.000,0.125,1.000,0.875]" in request.conversation
    assert isinstance(first("activitynet_qa").visuals[0], Video)
    assert first("msrvtt_qa").visuals[0].path.name == "video1300.mp4"


def test_answer_files_state_the_whole_prompt(data_root):
    """The boxes and points of REG and PointQA as well, which are written when a question is asked."""
    for name in ("reg_refcoco_val", "pointqa_local_point_val", "refcoco_val"):
        benchmark = open_benchmark(name, data_root)
        texts = ["x"] * len(benchmark.items)
        lines = answer_file(benchmark, benchmark.items, texts, "tiny").splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == [
            request.conversation for request in benchmark.requests()]
    assert [json.loads(line)["prompt"] for line in lines] == [f"Where is thing {i}?" for i in range(4)]


def test_mmbench_images_are_decoded_also_where_a_row_names_another(data_root):
    benchmark = open_benchmark("mmbench_en", data_root)
    sizes = [request.visuals[0].size for request in benchmark.requests()]
    assert sizes == [(40, 30)] * 5


def test_gqa(data_root):
    result = score(data_root, "gqa", ["Dog.", "yes", "dog", "No"])
    assert result.value == 75.0 and result.by_kind["binary"] == 100.0 and result.by_kind["open"] == 50.0
    assert result.by_kind["steps 1"] == 75.0 and result.by_kind["words 5"] == 75.0
    # Group animal: gold dog, yes, cat, no once each; predicted dog 2, yes 1, cat 0, no 1: (1 + 0 + 1 + 0) / 100.
    assert result.metrics["distribution"] == pytest.approx(0.02)


def test_mmbench_counts_a_question_only_if_every_rotation_is_right(data_root):
    golds = {item.id: item.gold for item in open_benchmark("mmbench_en", data_root).items}
    assert list(golds) == ["1", "1000001", "2000001", "2", "1000002"] and list(golds.values()) == list("ABCAB")
    result = score(data_root, "mmbench_en", golds)
    assert result.value == 100.0 and result.by_kind == {"coarse": 100.0, "identity": 100.0}
    result = score(data_root, "mmbench_en", golds | {"2000001": "A"})
    assert result.value == 50.0 and result.metrics["accuracy of rotations"] == 80.0


def test_mme(data_root):
    # existence: image 1 both right, image 2 one: 75 + 50; artwork: all answers "Other": 0.
    benchmark = open_benchmark("mme", data_root)
    texts = {item.id: "other" for item in benchmark.items}
    texts |= {"existence/1.jpg#1": "Yes", "existence/1.jpg#2": "No", "existence/2.jpg#1": "yes, it is",
              "existence/2.jpg#2": "yes"}
    result = score(data_root, "mme", texts)
    assert result.metrics == {"perception": 125.0, "cognition": 0.0, "total": 125.0}
    assert result.by_kind == {"existence": 125.0, "artwork": 0.0} and result.unreadable == 4
    assert "tasks that are not in" in result.notes[0]


def test_pope_is_the_mean_of_three_f1s(data_root):
    # Labels are no, yes, no, yes. "Yes" always: precision 1/2, recall 1: F1 2/3.
    texts = ["Yes"] * 4 + ["No", "Yes", "No", "Yes"] + ["Yes"] * 4
    result = score(data_root, "pope", texts)
    assert result.value == pytest.approx(100 * (2 / 3 + 1 + 2 / 3) / 3)
    assert result.metrics["f1, popular"] == 100.0 and result.metrics["yes_ratio, random"] == 100.0
    assert [item.id for item in open_benchmark("pope", data_root).items][::4] == ["10000001", "20000001", "1"]
    assert score(data_root, "pope_popular", texts[4:8]).metrics["f1"] == 100.0


def test_pope_by_both_conventions(data_root):
    texts = ["No", "Yes", "Yes", "yes."]  # labels no, yes, no, yes
    assert score(data_root, "pope_random", texts).metrics["accuracy"] == 75.0
    assert score(data_root, "pope_random", texts, "lmms-eval").metrics["accuracy"] == 50.0


def test_seed_takes_the_letter_only(data_root):
    texts = ["A", "B.", "c"]
    assert score(data_root, "seed_image", texts).value == pytest.approx(100 / 3)
    assert score(data_root, "seed_image", texts, "lmms-eval").value == 100.0


def test_science_qa(data_root):
    texts = ["A", "B. dog", "The answer is A.", "C"]  # golds A, B, A, B; the last has no image, and no option C
    result = score(data_root, "scienceqa", texts)
    assert result.metrics == {"accuracy, image": 100.0, "accuracy, all": 75.0} and result.unreadable == 1
    # A missing image question officially leaves the accuracy over images, and is wrong over all.
    result = score(data_root, "scienceqa", [None, "A", "A", "B"])
    assert result.metrics == {"accuracy, image": 50.0, "accuracy, all": 50.0}


def test_vqa(data_root):
    assert score(data_root, "vqav2_val", ["dog", "A dog", ""]).value == pytest.approx(200 / 3)
    assert score(data_root, "vqav2_val", ["cat"] * 3).by_kind == {"answer: other": 100.0, "question: what": 100.0}
    assert score(data_root, "textvqa", ["dog", None, None]).value == 100.0  # the mean of the answers that are there
    assert score(data_root, "vizwiz_val", ["Dog.", "the dog", "bird"]).value == pytest.approx(200 / 3)


def test_ocrbench_is_points(data_root):
    result = score(data_root, "ocrbench", ["It says\nStop!", "13", "x^2"])
    assert result.value == 2.0 and result.metrics["recognition"] == 1.0 and result.metrics["document VQA"] == 0.0


def test_rec(data_root):
    """Images of 40 x 30: the padded square has 5 pixels above and below. Golds are the image, then its upper half."""
    whole, half = "[0.000,0.125,1.000,0.875]", "[0.000,0.125,1.000,0.500]"
    result = score(data_root, "refcoco_val", [whole, half, half, "no box"])
    # IoU of half and whole is exactly 0.5: no hit officially.
    assert result.value == 50.0 and result.unreadable == 1
    assert result.metrics["mean IoU"] == pytest.approx(100 * (1 + 0.5 + 1 + 0) / 4)
    texts = ["[0, 0, 1, 1]", "[0, 0, 1, 0.5]", "[0,0,1,0.5] [0,0,1,1]", ""]  # shares of the image itself
    assert score(data_root, "refcoco_val", texts, "lmms-eval").value == 75.0


def test_shikras_answer_files_are_matched_by_position_and_target(data_root, tmp_path):
    benchmark = open_benchmark("refcoco_val", data_root)
    lines = [{"pred": "Answer: [0.000,0.125,1.000,0.875] .", "target": f"ASSISTANT: Answer: {benchmark.target(i)} ."}
             for i in range(4)]
    path = tmp_path / "multitest_extra_prediction.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert benchmark.score(read_predictions(path, benchmark).texts).value == 50.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    with pytest.raises(InputError, match=r"4 that are no questions of refcoco_val: .line 1 with the target"):
        read_predictions(path, benchmark)


def test_grit_takes_boxes_in_pixels_too(data_root, tmp_path):
    benchmark = open_benchmark("grit_refexp", data_root)
    path = tmp_path / "refexp.json"
    path.write_text(json.dumps([{"example_id": "r0", "confidence": 1.0, "bboxes": [[0, 0, 40, 30]]},
                                {"example_id": "r1", "confidence": 1.0, "bboxes": []}]))
    result = benchmark.score(read_predictions(path, benchmark).texts)
    assert result.metrics == {"accuracy": 50.0, "accuracy, new source": 0.0, "accuracy, same source": 100.0}


def test_point_qa(data_root):
    result = score(data_root, "pointqa_local_box_val", ["The answer is red .", "The answer is Red ."])
    assert result.value == 50.0


def test_video_benchmarks(data_root):
    assert score(data_root, "activitynet_qa", ["running", "Running", "running"]).by_kind == {
        "type 0": 100.0, "type 3": 0.0, "free": 0.0}
    # Answers without a letter leave the official denominator.
    result = score(data_root, "videomme", ["A", "The answer is C", "none"])
    assert result.value == 50.0 and result.questions == 2 and result.unreadable == 1
    assert score(data_root, "mvbench", ["A", "(C) 3"]).value == 50.0
    assert score(data_root, "nextqa", ["cat", "A"]).by_kind == {"CW": 100.0, "DC": 0.0, "causal": 100.0,
                                                               "descriptive": 0.0}
    assert score(data_root, "egoschema_subset", ["B", "(E) sea"]).value == 100.0


def test_egoschemas_file_for_the_server_holds_numbers(data_root, tmp_path):
    benchmark = open_benchmark("egoschema", data_root)
    (path,) = write_submission(benchmark, benchmark.items, ["B", "sea", "hm"], tmp_path)
    assert json.loads(path.read_text()) == {"u0": 1, "u1": 4, "u2": -1}
    path.write_text('{"u0": 1, "u1": 0}')
    subset = open_benchmark("egoschema_subset", data_root)
    assert subset.score(read_predictions(path, subset).texts).value == 50.0


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"benchmark 'gqaa' is unknown, did you mean gqa\?"):
        expand(["gqaa"])
    with pytest.raises(InputError, match=r"gqa/testdev_balanced_questions.json: is missing; put the official file"):
        open_benchmark("gqa", tmp_path)
    (tmp_path / "OCRBench.json").write_text('[{"id": 1}]')
    with pytest.raises(InputError, match=r"OCRBench.json, record 0: has no 'image_path'"):
        open_benchmark("ocrbench", tmp_path)
    with pytest.raises(InputError, match="'rec' is a group of benchmarks: refcoco_val"):
        open_benchmark("rec", tmp_path)
    record = {"id": 1, "image_path": "a", "question": "q", "answers": "a", "type": "t", "dataset_name": "d"}
    (tmp_path / "OCRBench.json").write_text(json.dumps([record, record]))
    with pytest.raises(InputError, match=r"ocrbench: 1 ids of its annotation file in .* are not unique"):
        open_benchmark("ocrbench", tmp_path)
    (tmp_path / "OCRBench.json").write_text(json.dumps([record]))
    with pytest.raises(InputError, match="not scored by the convention 'lmms'; available: official, lmms-eval"):
        open_benchmark("ocrbench", tmp_path).score(["a"], "lmms")
