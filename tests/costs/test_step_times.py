"""The step report: what it measures on a tiny model, its table, and what it says without PyTorch."""

import builtins
import dataclasses

import jax
import numpy as np
import pytest

from vocojax.config import preset
from vocojax.costs import step_times, torch_peer
from vocojax.errors import MissingPackage

TINY = dataclasses.replace(preset("tiny"), decoder=dataclasses.replace(preset("tiny").decoder, depth=1))


def test_both_sides_compute_the_same_shapes():
    ours, theirs = step_times.own_parts(TINY), step_times.peer_parts(TINY)
    assert ours["prefill"]().shape == tuple(theirs["prefill"]()[:, -1].shape) == (1, TINY.decoder.vocab_size)
    keys_LUNGD, ((keys_UGND, _),) = (
        ours["compression of 1 image"]().k_LBKGD, theirs["compression of 1 image"]())
    assert keys_LUNGD.shape[1:] == tuple(keys_UGND.transpose(1, 2).shape) == (1, 1, 2, 32)
    answer = "decoding of 1 answer"
    assert ours[answer]().shape == (1, 64) and theirs[answer]().shape == (1, 33 + 64), "theirs has the question, too"
    metrics, loss = ours["training step"]()[1], theirs["training step"]()
    assert float(metrics["targets"]) == 2 * step_times.ANSWER
    assert 3 < float(metrics["loss"]) < 8 and 3 < loss < 8, "random weights: about the log of 64 tokens, 4.2"


def test_the_peer_has_the_dense_mask():
    _, vision, pixels, mask, _ = torch_peer._tensors(step_times._unit_rows(TINY, 1))
    length = mask.shape[-1]
    np.testing.assert_array_equal(mask[0, 0] == 0, np.tril(np.ones((length, length), bool)))
    assert tuple(pixels.shape) == (1, 3, 64, 64) and int(vision.max()) == 15


def test_the_table():
    side = {"cpu_seconds": 2.0, "seconds": 1.5}
    report = {"prefill": {"vocojax": side, "torch": {"cpu_seconds": 4.0, "seconds": 3.0}, "ratio": 0.5}}
    assert step_times.format_report(report).splitlines()[1].split() == [
        "prefill", "2.000", "4.000", "0.50", "0.65", "1.500", "3.000"]


def test_without_pytorch_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(MissingPackage, match=r"needs torch: pip install -e '\.\[test\]'"):
        step_times.step_report(1, TINY)


def test_a_part_is_timed(monkeypatch):
    monkeypatch.setattr(step_times, "_parts", {"prefill": lambda: jax.numpy.ones(3)})
    assert all(seconds >= 0 for seconds in step_times._time("prefill"))
