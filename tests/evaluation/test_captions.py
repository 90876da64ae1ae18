"""CIDEr by the official package."""

import shutil
import sys

import pytest

from vocojax.errors import InputError, MissingPackage
from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.metrics.captions import cider


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer needs Java")
def test_cider():
    """Two pairs of words: every n-gram is in one set of references, so each order that exists has cosine 1.

    Orders 1 and 2 exist, 3 and 4 do not: 10 * (1 + 1 + 0 + 0) / 4 = 5 for an equal caption, 0 for one without a word.
    """
    pytest.importorskip("pycocoevalcap")
    overall, each = cider({"a": "Red\ncar.", "b": "tree"}, {"a": ["red car"], "b": ["blue dog"]})
    assert each == pytest.approx({"a": 5.0, "b": 0.0}) and overall == pytest.approx(2.5)


def test_without_java_or_the_package_the_error_says_what_to_install(monkeypatch, data_root):
    benchmark = open_benchmark("reg_refcoco_val", data_root)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(InputError, match="needs Java"):
            benchmark.score(["a thing"] * len(benchmark.items))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer.ptbtokenizer", None)
    with pytest.raises(MissingPackage, match=r"pip install -e '\.\[benchmarks\]'"):
        benchmark.score(["a thing"] * len(benchmark.items))
