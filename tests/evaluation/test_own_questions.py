"""Questions of one's own: what is read, what is refused, and what counts as right."""

import json

import pytest

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.registry import expand, open_benchmark, result_name

RECORDS = [
    {"id": "a", "image": "1.png", "question": "what is it?", "answer": "A cat", "kind": "animal"},
    {"image": ["1.png", "2.png"], "question": "how many?", "answer": ["2", "a pair"], "kind": "number"},
    {"id": 7, "image": "2.png", "kind": "animal", "conversations": [
        {"from": "human", "value": "<image>\nwho barks?"}, {"from": "gpt", "value": "the dog"}]},
    {"question": "is it day?", "answer": "yes"},
]


def written(path, records):
    lines = map(json.dumps, records)
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_both_forms_are_asked_and_scored(suffix, tmp_path):
    path = written(tmp_path / f"held out.{suffix}", RECORDS)
    assert expand(["pope", str(path)]) == ["pope", str(path)] and result_name(str(path)) == "held out"
    benchmark = open_benchmark(str(path), tmp_path / "images")
    assert [(item.id, item.prompt, [image.name for image in item.visuals], item.gold) for item in benchmark.items] == [
        ("a", "what is it?", ["1.png"], ["A cat"]), ("1", "how many?", ["1.png", "2.png"], ["2", "a pair"]),
        ("7", "<image>\nwho barks?", ["2.png"], ["the dog"]), ("3", "is it day?", [], ["yes"])]
    assert benchmark.items[0].visuals == (tmp_path / "images" / "1.png",)
    result = benchmark.score(["a cat.", "A  pair", "dog", None])
    assert result.metrics == {"accuracy": 25.0, "accuracy, cleaned as VQAv2 does": 75.0} and result.missing == 1
    assert benchmark.score(["cat", "two", "The dog!", "yes"]).metrics == {
        "accuracy": 25.0, "accuracy, cleaned as VQAv2 does": 100.0}
    assert result.by_kind == {"": 0.0, "animal": 50.0, "number": 0.0}


@pytest.mark.parametrize(("change", "message"), [
    ({"answer": None}, "record 0: must have 'answer', a text or a list of texts"),
    ({"answer": []}, "record 0: must have 'answer'"),
    ({"question": " "}, "record 0: record 'a': turn 0 is an empty question"),
    ({"image": "../1.png"}, "record 0: record 'a': image '../1.png' leaves the image root"),
    ({"video": "a.mp4"}, "record 0: must be one question about images"),
    ({"id": "1"}, "the id '1' is there 2 times; make ids unique"),
])
def test_what_can_not_be_asked_is_named(change, message, tmp_path):
    path = written(tmp_path / "q.json", [{**RECORDS[0], **change}, *RECORDS[1:]])
    with pytest.raises(InputError) as raised:
        open_benchmark(str(path), tmp_path)
    assert str(raised.value).startswith(str(path)) and message in str(raised.value)


def test_several_turns_are_refused(tmp_path):
    turns = [{"from": who, "value": "x"} for who in ("human", "gpt", "human", "gpt")]
    with pytest.raises(InputError, match="write one record per question"):
        open_benchmark(str(written(tmp_path / "q.json", [{"conversations": turns}])), tmp_path)
    with pytest.raises(InputError, match="there is no such file of questions"):
        open_benchmark(str(tmp_path / "none.json"), tmp_path)
