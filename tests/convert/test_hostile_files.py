"""Files of weights that were made to do harm: none takes memory, runs code, or is read from another directory."""

import json
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from vocojax.convert.huggingface import read_json
from vocojax.convert.pickle_files import PickleFile
from vocojax.convert.safetensors_files import SafetensorsFile
from vocojax.convert.tensor_files import open_directory
from vocojax.errors import ConvertError
from vocojax.files import parse_json

NESTED = b"[" * 100_000 + b"]" * 100_000


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(f"a/{name}", content)
    return path


@pytest.mark.parametrize("entry", ["byteorder", "data.pkl", "data/0"])
def test_a_compressed_entry_is_refused_before_it_is_inflated(tmp_path, entry):
    entries = {"data.pkl": pickle.dumps({}, 2), entry: b"\0" * 300_000_000}
    path = archive(tmp_path / "bomb.bin", entries, zipfile.ZIP_DEFLATED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConvertError, match="is compressed, or larger than the file"):
        PickleFile(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    storage = (b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ")
    size, stride = pickle.dumps((10**12,), 2)[2:-1], pickle.dumps((0,), 2)[2:-1]
    content = (b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n" + storage + b"K\x00" + size + stride
               + b"\x89ccollections\nOrderedDict\n)RtRs.")
    path = archive(tmp_path / "pytorch_model.bin", {"data.pkl": content, "data/0": b"\0" * 4})
    with pytest.raises(ConvertError, match=r"tensor w of shape \[1000000000000\] is larger than the file"):
        PickleFile(path)


def test_a_pickle_can_not_ask_for_a_large_memo(tmp_path):
    """LONG_BINPUT with a large index: the unpickler in C would fill gigabytes with zeros."""
    path = archive(tmp_path / "memo.bin", {"data.pkl": b"\x80\x02}r" + struct.pack("<I", 2**31) + b"."})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert PickleFile(path).shapes == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "{parent}/elsewhere.safetensors", "..", "", "a/b"])
def test_shards_lie_beside_their_index(tmp_path, shard):
    (tmp_path / "model").mkdir()
    save_file({"a": np.arange(3.0)}, tmp_path / "elsewhere.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.format(parent=tmp_path)}}))
    with pytest.raises(ConvertError, match="is not the name of a file beside it"):
        open_directory(tmp_path / "model")


def test_deep_nesting_is_damage(tmp_path):
    (tmp_path / "config.json").write_bytes(NESTED)
    (tmp_path / "model.safetensors.index.json").write_bytes(NESTED)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(NESTED)) + NESTED)
    for read in (lambda: read_json(tmp_path / "config.json"), lambda: open_directory(tmp_path),
                 lambda: SafetensorsFile(tmp_path / "x.safetensors")):
        with pytest.raises(ConvertError) as error:
            read()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(NESTED)
