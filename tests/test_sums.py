"""Sums refuse changed files, and nothing else."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from vocojax import sums
from vocojax.convert.tensor_files import open_directory
from vocojax.sums import ChangedFile, read_sums, require_small_files, write_sums

DIGEST = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of b"x"


@pytest.mark.parametrize("line", [f"{DIGEST}  a.json", f"{DIGEST} *a.json", f"{DIGEST.upper()}  ./a.json\n"])
def test_all_forms_that_sha256sum_writes_are_read(tmp_path, line):
    (tmp_path / "a.json").write_text("x")
    (tmp_path / "SHA256SUMS").write_text(f"{line}\n")
    assert require_small_files(tmp_path) == {"a.json": DIGEST}
    (tmp_path / "a.json").write_text("y")
    with pytest.raises(ChangedFile, match=rf"^{tmp_path}/a.json: was changed after it was written"):
        require_small_files(tmp_path)


def test_a_readme_may_be_edited(tmp_path):
    for name in ("README.md", "a.json"):
        (tmp_path / name).write_text("x")
    write_sums(tmp_path, ["README.md", "a.json"])
    assert read_sums(tmp_path) == {"a.json": DIGEST}
    (tmp_path / "SHA256SUMS").write_text(f"{DIGEST}  README.md\n")  # version 0.1 listed it
    (tmp_path / "README.md").write_text("my card")
    require_small_files(tmp_path)


def test_files_of_others_that_are_never_read_are_not_compared(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("not hashed at every opening")
    (tmp_path / "SHA256SUMS").write_text(f"{DIGEST} *pytorch_model.bin\n{DIGEST} *original/consolidated.00.pth\n")
    require_small_files(tmp_path)


def test_threads_that_read_a_shard_compare_it_once(tmp_path, monkeypatch):
    save_file({f"t{i}": np.zeros(10**5, np.float32) for i in range(8)}, tmp_path / "model.safetensors")
    write_sums(tmp_path, ["model.safetensors"])
    compared, real = [], sums.sha256_of
    monkeypatch.setattr(sums, "sha256_of", lambda path: compared.append(path.name) or real(path))
    weights = open_directory(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert [array.sum() for array in pool.map(weights.read, [f"t{i}" for i in range(8)])] == [0.0] * 8
    assert compared == ["model.safetensors"]
