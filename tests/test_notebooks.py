"""The notebooks, executed as they are, one after the other in one checkout: the first one trains what others read."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 200_000  # bytes of a notebook with its outputs


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A directory that looks like a checkout, so that nothing is written into this one."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "vocojax", "launch"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    return root


def test_notebooks_are_small_and_have_no_error():
    nbformat = pytest.importorskip("nbformat")
    assert NAMES == ["compress_once", "convert", "mask", "own_data", "retention"]
    for name in NAMES:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        assert path.stat().st_size < LARGEST
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", ())]
        assert outputs and all(output.output_type != "error" for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, checkout, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # training at the tests' level of optimization takes longer
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(checkout / "notebooks" / f"{name}.ipynb", 4)
    client = nbclient.NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(checkout / "notebooks")}})
    client.execute()
