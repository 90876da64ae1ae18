"""The columnar form of a JSON: complete or absent, made once, and forgiving to single records only."""

import io
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


def test_other_users_may_read_it(tmp_path):
    (tmp_path / "x.json").write_text('[{"id": 1}]')
    before = os.umask(0o022)
    try:
        ColumnarRecords(tmp_path / "x.json")
    finally:
        os.umask(before)
    made, = (tmp_path / ".vocojax").iterdir()
    assert made.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_one_that_was_cut_off_is_made_again(tmp_path, kept):
    (tmp_path / "x.json").write_text('[{"id": 1}]')
    ColumnarRecords(tmp_path / "x.json")
    made, = (tmp_path / ".vocojax").iterdir()
    content = made.read_bytes()
    made.write_bytes(content[:kept])
    assert ColumnarRecords(tmp_path / "x.json")[0] == {"id": 1} and made.read_bytes() == content


def test_a_full_disk_is_left_for_another(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text('[{"id": 1}]')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = columnar._write

    def full(path, target):
        if ".vocojax" in str(target):
            raise OSError(28, "No space left on device")
        write(path, target)

    monkeypatch.setattr(columnar, "_write", full)
    assert ColumnarRecords(tmp_path / "x.json")[0] == {"id": 1}
    assert list((tmp_path / ".vocojax").iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x.json"))
    with pytest.raises(OSError, match=r"x\.json: no place for .*\.vocojax: No space left on device; "):
        ColumnarRecords(tmp_path / "x.json")


def test_a_number_too_long_for_python_costs_its_record_only(tmp_path):
    (tmp_path / "x.json").write_text(f'[{{"a": 1}}, {{"a": {"7" * 5000}}}, {{"a": 3}}]')
    records = ColumnarRecords(tmp_path / "x.json")
    assert [records[0], records[2]] == [{"a": 1}, {"a": 3}]
    with pytest.raises(LayoutError) as error:
        records[1]
    assert error.value.reason == "malformed record"


def test_damage_is_found_without_reading_on(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "CHUNK", 64)
    file = io.BytesIO(b'[{"a": 1}, {"a": x}' + b', {"a": 2}' * 1000)
    with pytest.raises(ValueError, match=r"at byte 11"):
        list(columnar._elements(file, tmp_path / "x.json"))
    assert file.tell() < 200


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
