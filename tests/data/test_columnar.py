"""The columnar form of a JSON: complete or absent, made once, and forgiving to single records only."""

import json
import os
import pickle
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vocojax.data.sources import columnar
from vocojax.data.sources.columnar import ColumnarRecords
from vocojax.errors import InputError
from vocojax.layout import LayoutError


def test_records_are_those_of_the_json(tmp_path, monkeypatch):
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


def test_byte_order_marks_are_passed_over(tmp_path):
    """Also those in the middle, where files were joined."""
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 0}\r\n\xef\xbb\xbf{"id": 1}\r\n\xef\xbb\xbf\r\n')
    read = ColumnarRecords(tmp_path / "x.jsonl")
    assert [read[i]["id"] for i in range(len(read))] == [0, 1]
    (tmp_path / "y.jsonl").write_text('{"id": 0}', encoding="utf-16")
    with pytest.raises(InputError, match=r"y\.jsonl: is UTF-16: save it as UTF-8"):
        ColumnarRecords(tmp_path / "y.jsonl")


@pytest.mark.parametrize("after", ['[{"id": 1}]', '\n[{"id": 1}]', " x", '\n{"id": 1}', "\0"])
def test_what_follows_a_list_is_not_passed_over(tmp_path, after):
    (tmp_path / "x.json").write_text('[{"id": 0}]' + after)
    with pytest.raises(InputError, match=r"x\.json: not a JSON list in UTF-8: .*\(byte 1\d\); join several lists with"):
        ColumnarRecords(tmp_path / "x.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
    | st.sampled_from(["NaN", "\ud83d", "\\ud83d", '"}, {"', "-Infinity"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 2]), st.sampled_from([b"", b"\xef\xbb\xbf", b"\n "]))
def test_elements_are_those_that_json_reads(tmp_path, values, indent, before):
    """Whatever is in them: halves of surrogate pairs, NaN, and text that looks like them or like JSON."""
    text = json.dumps(values, indent=indent)
    (tmp_path / "x.json").write_bytes(before + text.encode())
    found = [(json.dumps(json.loads(record)), problem) for record, problem in columnar.parse(tmp_path / "x.json")]
    expected = json.loads(text)
    assert [record for record, _ in found] == [json.dumps(value) for value in expected]
    assert all(problem in ("", "duplicate record") for (_, problem), value in zip(found, expected, strict=True)
               if isinstance(value, dict))


def test_it_is_made_once_and_again_for_an_edited_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('[{"id": 1}]')
    first = ColumnarRecords(path)
    monkeypatch.setattr(columnar, "write_batches", lambda *_: pytest.fail("made again"))
    assert ColumnarRecords(path)[0] == pickle.loads(pickle.dumps(first))[0] == {"id": 1}
    monkeypatch.undo()
    path.write_text('[{"id": 2}]')
    os.utime(path, ns=(1, 1))
    assert ColumnarRecords(path)[0] == {"id": 2} and first[0] == {"id": 1}


def test_nothing_is_left_of_one_that_was_not_finished(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"id": 1}, {"id"')
    with pytest.raises(ValueError, match=r"x\.json: not a JSON list in UTF-8: Input data was truncated"):
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


@pytest.mark.parametrize("kept_time", [False, True])
def test_an_edit_anywhere_is_noticed(tmp_path, kept_time):
    """Also one that changes neither the size nor the time stamp, far from the beginning, the middle and the end."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"id": i, "text": "x" * 1000} for i in range(8000)]))
    before, status = columnar.file_digest(path), path.stat()
    ColumnarRecords(path)
    content = path.read_bytes()
    place = content.index(b'"id": 2000,') + len(b'"id": 2000, "text": "')
    path.write_bytes(content[:place] + b"y" + content[place + 1:])
    if kept_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and columnar.sampled_digest(path) == "42237c8ead7fcc9e"
    assert columnar.file_digest(path) != before
    assert ColumnarRecords(path)[2000]["text"] == "y" + "x" * 999


def test_a_json_that_is_edited_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('[{"id": 1}]')
    parse = columnar.parse

    def edited(path):
        path.write_text('[{"id": 2}]')
        return parse(path)

    monkeypatch.setattr(columnar, "parse", edited)
    with pytest.raises(InputError, match=r"x\.json: was edited while it was read; start again when it is complete"):
        ColumnarRecords(path)
    assert list((tmp_path / ".vocojax").iterdir()) == []


def test_a_flipped_bit_anywhere_is_noticed_and_mended(tmp_path, monkeypatch, caplog):
    """Before or after the file was opened, also by a copy of the reader in another process."""
    monkeypatch.setattr(columnar, "BATCH", 3)
    path, records = tmp_path / "x.json", [{"id": i, "text": "x" * (i % 7)} for i in range(10)]
    path.write_text(json.dumps(records))
    before = ColumnarRecords(path)
    made, = (tmp_path / ".vocojax").iterdir()
    content, copy = made.read_bytes(), pickle.dumps(before)
    chance = random.Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        made.write_bytes(damaged)
        for reader in (before, ColumnarRecords(path), pickle.loads(copy)):
            assert [reader[i] for i in range(len(reader))] == records
        before = ColumnarRecords(path)
        made.write_bytes(content)
    message = r"x\.json.*\.arrow: its batch \d is damaged \(checksum\); making it again from .*x\.json$"
    assert any(re.search(message, said) for said in caplog.messages)


def test_a_damaged_file_that_cannot_be_replaced_is_made_elsewhere(tmp_path, monkeypatch):
    path = tmp_path / "data" / "x.json"
    path.parent.mkdir()
    path.write_text('[{"id": 1}]')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = ColumnarRecords(path)
    made, = (path.parent / ".vocojax").iterdir()
    content = bytearray(made.read_bytes())
    content[content.index(b'"id"') + 1] ^= 1
    made.write_bytes(content)
    make = columnar.new_file
    monkeypatch.setattr(columnar, "new_file", lambda file: make(file) if "cache" in str(file) else refuse())
    for reader in (records, ColumnarRecords(path)):
        assert reader[0] == {"id": 1} and made.read_bytes() == content
    assert len(list((tmp_path / "cache" / "vocojax").iterdir())) == 1


def refuse():
    raise PermissionError(13, "Permission denied")


def test_a_record_beyond_the_last_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text('[{"id": 1}]')
    for index in (-1, 1):
        with pytest.raises(IndexError, match=rf"x\.json: has 1 records, no record {index}"):
            ColumnarRecords(tmp_path / "x.json")[index]


def test_a_full_disk_is_left_for_another(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text('[{"id": 1}]')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = columnar.write_batches

    def full(target, *args):
        if ".vocojax" in str(target):
            raise OSError(28, "No space left on device")
        write(target, *args)

    monkeypatch.setattr(columnar, "write_batches", full)
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


def test_damage_is_named_by_its_byte(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"a": 1}, {"a": x}' + b', {"a": 2}' * 1000 + b"]")
    with pytest.raises(ValueError, match=r"x\.json: not a JSON list in UTF-8: .*invalid character \(byte 17\)"):
        ColumnarRecords(tmp_path / "x.json")


def test_records_after_the_list_are_not_lost_in_silence(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"a": 1}][{"a": 2}]')
    with pytest.raises(ValueError, match="trailing characters"):
        ColumnarRecords(tmp_path / "x.json")


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
    with pytest.raises(ValueError, match=r"x\.json: not a JSON list in UTF-8: "):
        ColumnarRecords(tmp_path / "x.json")
