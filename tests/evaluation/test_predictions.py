"""Files of answers: every form that is accepted, and one clear error for each way to be wrong."""

import gzip
import json

import pytest

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.predictions import read_predictions


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def gqa(data_root):
    return open_benchmark("gqa", data_root)


RIGHT = [{"question_id": f"20{i}", "text": text} for i, text in enumerate(["dog", "yes", "cat", "no"])]


@pytest.mark.parametrize("content", [
    json.dumps(RIGHT),  # a list
    json.dumps(RIGHT, indent=2),
    json.dumps({"200": "dog", "201": "yes", "202": "cat", "203": "no"}),  # an object
    "\ufeff" + "\r\n".join(map(json.dumps, RIGHT)) + "\r\n\n",  # lines with a byte order mark, from Windows
    "\n".join(json.dumps({"id": int(each["question_id"]), "answer": each["text"], "more": 1}) for each in RIGHT[::-1]),
    json.dumps([{"questionId": each["question_id"], "prediction": each["text"]} for each in RIGHT]),
])
def test_forms_that_are_accepted(gqa, tmp_path, content):
    path = tmp_path / "answers"
    path.write_text(content)
    assert gqa.score(read_predictions(path, gqa).texts).value == 100.0


def test_tables_are_accepted(gqa, tmp_path):
    for suffix, cell in ((".tsv", "\t"), (".csv", ",")):
        path = tmp_path / f"answers{suffix}"
        path.write_text("\n".join(cell.join(row) for row in [("id", "answer"), *((e["question_id"], e["text"])
                                                                                for e in RIGHT)]))
        assert gqa.score(read_predictions(path, gqa).texts).value == 100.0


@pytest.mark.parametrize(("records", "message"), [
    (RIGHT[:1], r"3 of gqa's 4 questions without an answer: '201', '202', '203'; the official tool stops at the first "
                r"question without a prediction; --allow_missing counts them as wrong"),
    ([*RIGHT, *RIGHT[:2]], r"2 answered more than once: '200', '201'; keep one answer per question"),
    ([*RIGHT, {"id": "7", "text": "x"}], r"1 that are no questions of gqa: '7'; is it the file of another split"),
    ([{"question_id": str(i), "text": "x"} for i in range(900, 905)],
     r"5 that are no questions of gqa: '900', '901', '902' and 2 more"),
    ([*RIGHT[:3], {"question_id": "203", "text": 4}], r"1 whose answer is no text: '203' \(int\)"),
    ([*RIGHT[:3], {"question_id": "203"}], r"1 whose answer is no text: '203' \(none\)"),
    ([*RIGHT[:3], {"question_id": True, "text": "no"}], r"1 without the id of a question: record 4; a record holds it"),
    ([*RIGHT[:3], {"question_id": ["203"], "text": "no"}], r"1 without the id of a question: record 4"),
    ([*RIGHT[:3], 5], r"must be a JSON object, got int"),
    ([], r"holds no record of an answer"),
])
def test_malformed_files_are_one_line_that_names_the_first_and_counts(gqa, tmp_path, records, message):
    with pytest.raises(InputError, match=message) as error:
        read_predictions(lines(tmp_path / "answers.jsonl", records), gqa)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_files_that_can_not_be_read(gqa, tmp_path):
    with pytest.raises(InputError, match="is missing"):
        read_predictions(tmp_path / "nowhere.jsonl", gqa)
    path = tmp_path / "torn.jsonl"
    path.write_text(json.dumps(RIGHT[0]) + '\n{"question_id": "201", "te')
    with pytest.raises(InputError, match=r"torn.jsonl, line 2: is no JSON"):
        read_predictions(path, gqa)
    path.write_bytes(b'{"question_id": "201", "text": "\xff"}\n')
    with pytest.raises(InputError, match="must be UTF-8"):
        read_predictions(path, gqa)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"torn.jsonl, line 1: is no JSON: nested too deeply"):
        read_predictions(path, gqa)


ROUND = [{"question_id": int(each["question_id"]), "text": each["text"]} for each in RIGHT]


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, ROUND)) + "\r\n\r\n  \r\n"),
    ("a.jsonl", "\n".join(json.dumps({**each, "question_id": float(each["question_id"]), "score": []})
                          for each in ROUND)),  # as pandas writes ids
    ("a.json", "\ufeff" + json.dumps(RIGHT, indent=1)),
    ("a.json", json.dumps({each["question_id"]: each["text"] for each in RIGHT})),
    ("a.csv", "\ufeffquestion_id,text\r\n" + "".join(f'{each["question_id"]},{each["text"]}\r\n' for each in RIGHT)),
])
@pytest.mark.parametrize("packed", [False, True])
def test_legal_files_as_people_write_them(gqa, tmp_path, name, content, packed):
    path = tmp_path / f"{name}{'.gz' * packed}"
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert list(read_predictions(path, gqa).texts) == [each["text"] for each in RIGHT]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl.gz", b"\x1f\x8b\x00", r"a.jsonl.gz: gzip can't unpack it"),
    ("a.csv", b"question_id,text\n200,\xff\n", r"a.csv, line 2: must be UTF-8"),
    ("a.xlsx", b"PK", r"a.xlsx: is no Excel file"),
    ("a.json", b'{"200": "dog", "201": "yes", "200": "cat", "202": "cat", "203": "no"}',
     r"1 answered more than once: '200'"),
])
def test_damaged_files_and_keys_that_are_there_twice(gqa, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_predictions(tmp_path / name, gqa)
    assert "\n" not in str(error.value)


def test_boxes_of_grit_in_pixels(data_root, tmp_path):
    grit = open_benchmark("grit_refexp", data_root)
    boxes = [{"example_id": f"r{i}", "bboxes": [[0, 0, 40, 30 - 16 * i]]} for i in range(2)]
    assert grit.score(read_predictions(lines(tmp_path / "a.jsonl", boxes), grit).texts).value == 50.0
    for odd in ([["a", 0, 1, 2]], [5], [[0, 0, 1]], ["text"]):
        with pytest.raises(InputError, match=r"1 whose answer is no text: 'r1' \(list\)"):
            read_predictions(lines(tmp_path / "a.jsonl", [boxes[0], {**boxes[1], "bboxes": odd}]), grit)
    assert grit.score(['{"bboxes": [["x"]]}', '{"bboxes": 5}']).unreadable == 2


def test_missing_answers_are_treated_as_the_official_tool_does(data_root, tmp_path):
    gqa, textvqa = (open_benchmark(name, data_root) for name in ("gqa", "textvqa"))
    found = read_predictions(lines(tmp_path / "a.jsonl", RIGHT[:1]), gqa, allow_missing=True)
    result = gqa.score(found.texts)
    assert result.value == 25.0 and result.missing == 3  # counted as wrong
    assert found.notes == ("3 questions without an answer: the official tool stops at the first question without a "
                           "prediction; this score counts them as wrong",)
    found = read_predictions(lines(tmp_path / "b.jsonl", [{"id": 34602, "text": "dog"}]), textvqa, allow_missing=True)
    assert textvqa.score(found.texts).value == 100.0 and "leaves them out" in found.notes[0]


def test_pope_refuses_another_release_of_its_questions(data_root, tmp_path):
    pope = open_benchmark("pope_random", data_root)
    records = [{"question_id": i, "prompt": f"Is there a thing {i} in the image?\nAnswer the question using a single "
                "word or phrase.", "text": "No"} for i in range(1, 5)]
    assert len(read_predictions(lines(tmp_path / "a.jsonl", records), pope).texts) == 4
    records[2]["prompt"] = "Is there an thing 3 in the image?"
    with pytest.raises(InputError, match=r"1 that are no questions of pope_random: .3 with the question 'Is there an"):
        read_predictions(lines(tmp_path / "a.jsonl", records), pope)
    own = [{"question": f"Is there a thing {i} in the image?", "answer": "No"} for i in range(1, 5)]  # POPE's own form
    assert len(read_predictions(lines(tmp_path / "b.jsonl", own), pope).texts) == 4
    with pytest.raises(InputError, match=r"4 without the id of a question: record 1"):
        read_predictions(lines(tmp_path / "b.jsonl", own), open_benchmark("pope", data_root))
    with pytest.raises(InputError, match="2 that are no questions of pope_random"):
        read_predictions(lines(tmp_path / "b.jsonl", [own[1], own[0], *own[2:]]), pope)


def test_llavas_question_file_gives_popes_ids(data_root, tmp_path):
    root = tmp_path / "pope"
    root.mkdir()
    for split in ("random", "popular", "adversarial"):
        (root / f"coco_pope_{split}.json").write_text((data_root / f"pope/coco_pope_{split}.json").read_text())
    asked = [json.loads(line) for line in (root / "coco_pope_random.json").read_text().splitlines()]
    lines(root / "llava_pope_test.jsonl", [
        {"question_id": 500 + i, "image": each["image"], "text": each["text"] + "\nAnswer the question using a single "
         "word or phrase.", "category": "random"} for i, each in enumerate(asked[::-1])])
    assert [item.id for item in open_benchmark("pope", tmp_path).items[:5]] == ["503", "502", "501", "500", "20000001"]


def test_mme_answers_are_told_apart_by_prompts_or_by_order(data_root, tmp_path):
    mme = open_benchmark("mme", data_root)
    answers = [{"question_id": f"{task}/{stem}.jpg", "text": text,
                "prompt": question + "\nAnswer the question using a single word or phrase."}
               for task in ("existence", "artwork/images") for stem in "12"
               for question, text in ((f"Is there a cat in {stem}?", "No"), ("Is there a dog?", "Yes"))]
    assert mme.score(read_predictions(lines(tmp_path / "a.jsonl", answers), mme).texts).value == 400.0
    plain = [{"question_id": each["question_id"], "text": each["text"]} for each in answers]
    assert mme.score(read_predictions(lines(tmp_path / "b.jsonl", plain), mme).texts).value == 0.0  # order of the files
    with pytest.raises(InputError, match=r"1 that are no questions of mme: .existence/1.jpg with the prompt"):
        read_predictions(lines(tmp_path / "c.jsonl", [*answers, {**answers[0], "prompt": "Is there a cow?"}]), mme)


def test_answers_to_questions_that_do_not_count_are_passed_over(data_root, tmp_path):
    seed = open_benchmark("seed_image", data_root)
    records = [{"question_id": 100 + i, "text": "ABCD"[i]} for i in range(4)]  # the last is about a video
    assert seed.score(read_predictions(lines(tmp_path / "a.jsonl", records), seed).texts).value == 100.0


def test_spreadsheets_of_vlmevalkit(data_root, tmp_path):
    pytest.importorskip("openpyxl")
    from vocojax.evaluation.benchmarks.spreadsheets import spreadsheet

    mmbench = open_benchmark("mmbench_en", data_root)
    rows = [[int(item.id), item.gold, "" if item.id == "2" else f"({item.gold})"] for item in mmbench.items]
    (tmp_path / "a.xlsx").write_bytes(spreadsheet(["index", "answer", "prediction"], rows))
    assert mmbench.score(read_predictions(tmp_path / "a.xlsx", mmbench).texts).value == 50.0


def test_a_gold_answer_beside_a_missing_answer_is_never_scored(data_root, tmp_path):
    """Official files hold both; a record without the answer is refused, not scored by its gold answer."""
    videomme = open_benchmark("videomme", data_root)
    records = [{"question_id": f"001-{i}", "answer": "ABC"[i], "response": "A"} for i in range(3)]
    assert videomme.score(read_predictions(lines(tmp_path / "a.jsonl", records), videomme).texts).value < 50
    del records[1]["response"]
    with pytest.raises(InputError, match=r"'001-1' \(none\); every record holds a text under 'response'"):
        read_predictions(lines(tmp_path / "a.jsonl", records), videomme)


def test_llavas_numbers_of_vizwizs_images(data_root, tmp_path):
    vizwiz = open_benchmark("vizwiz_val", data_root)
    path = lines(tmp_path / "a.jsonl", [{"question_id": i, "text": "dog"} for i in range(3)])
    assert vizwiz.score(read_predictions(path, vizwiz).texts).value == 100.0
