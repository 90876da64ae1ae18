"""The columnar form of a JSON: complete or absent, made once, and forgiving to single records only."""

import json
import os
import pickle

import pytest

from vocojax.data.sources import columnar
from vocojax.data.sources.columnar import ColumnarRecords
from vocojax.layout import LayoutError


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
def test_records_are_those_of_the_json(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(columnar, "CHUNK", chunk)
    monkeypatch.setattr(columnar, "BATCH", 2)
    records = [{"id": i, "text": 'é\u4e2d😀 "]},{[ \\', "list": [{"a": [1, 2.5, None, True]}]} for i in range(5)]
    for name, text in (("plain", json.dumps(records)), ("indented", json.dumps(records, indent=2, ensure_ascii=False)),
                       ("spaced", "\n \t" + json.dumps(records).replace("}, {", "}\n , \r\n{") + "  ")):
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        read = ColumnarRecords(tmp_path / f"{name}.json")
        assert [read[i] for i in range(len(read))] == records
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    assert [ColumnarRecords(tmp_path / "lines.jsonl")[i] for i in range(5)] == records
    (tmp_path / "none.json").write_text(" [ ] ")
    assert len(ColumnarRecords(tmp_path / "none.json")) == 0


def test_it_is_made_once_and_again_for_an_edited_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('[{"id": 1}]')
    first = ColumnarRecords(path)
    monkeypatch.setattr(columnar, "_write", lambda *_: pytest.fail("made again"))
    assert ColumnarRecords(path)[0] == pickle.loads(pickle.dumps(first))[0] == {"id": 1}
    monkeypatch.undo()
    path.write_text('[{"id": 2}]')
    os.utime(path, ns=(1, 1))
    assert ColumnarRecords(path)[0] == {"id": 2} and first[0] == {"id": 1}


def test_nothing_is_left_of_one_that_was_not_finished(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"id": 1}, {"id"')
    with pytest.raises(ValueError, match=r"not a JSON list in UTF-8.* at byte 12"):
        ColumnarRecords(path)
    assert list((tmp_path / ".vocojax").iterdir()) == []


def test_a_read_only_folder_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".vocojax").write_text("in the way")
    (tmp_path / "data" / "x.json").write_text('[{"id": 1}]')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert ColumnarRecords(tmp_path / "data" / "x.json")[0] == {"id": 1}
    assert len(list((tmp_path / "cache" / "vocojax").iterdir())) == 1


def test_single_bad_records_have_a_reason(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"a": 1}, 5, {"a": "\xff"}, {"a": 1}, null, [], {"a": 2}]')
    records, reasons = ColumnarRecords(tmp_path / "x.json"), {}
    for index in range(len(records)):
        try:
            records[index]
        except LayoutError as error:
            reasons[index] = error.reason
    assert reasons == {1: "malformed record", 2: "not UTF-8", 3: "duplicate record", 4: "malformed record",
                       5: "malformed record"}


@pytest.mark.parametrize("text", ["", "  ", "{}", "[", "[1", "[1,", "[1 2]", "[1,]", "hello", '["a', "[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: (not a JSON list in UTF-8|must hold a list)"):
        ColumnarRecords(tmp_path / "x.json")
