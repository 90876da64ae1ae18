"""`voco.init = "pool"`: VoCo tokens start from the means of windows, in a single pass and in two stages alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vocojax.config import ConfigError, VocoConfig
from vocojax.data.conversation import template
from vocojax.errors import ConvertError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.fingerprint import fingerprint
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import answer_many
from vocojax.inference.prompts import whole_rows
from vocojax.inference.requests import Request
from vocojax.layout import Role, Span, lay_out_sample, unit_shape
from vocojax.models.parameters import parameters_of, with_parameters
from vocojax.models.voco import VocoLlama, grid_windows, voco_windows, window_means
from vocojax.pretrained.loading import save_model
from vocojax.runs.card import ModelCard
from vocojax.testing import tiny_model as make_model

IMAGES = list(np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8))


def with_voco(config, **changes):
    return dataclasses.replace(config, voco=dataclasses.replace(config.voco, **changes))


def pooling(model: VocoLlama, num_vocos: int) -> VocoLlama:
    """The model's parameters in one that pools."""
    config = with_voco(model.config, num_vocos=num_vocos, init="pool")
    return with_parameters(make_model(config), parameters_of(model))


def test_windows():
    tokens_UPE = jnp.arange(36.0)[None, :, None]  # 6 x 6, row after row
    means = lambda *grid: window_means(tokens_UPE, grid_windows(*grid, 6))[0, :, 0].tolist()
    assert means(1, 1) == pytest.approx([17.5])
    assert means(1, 2) == pytest.approx([16.0, 19.0])  # columns 0-2 and 3-5
    assert means(2, 2) == pytest.approx([7.0, 10.0, 25.0, 28.0])
    assert means(1, 4) == pytest.approx([15.5, 17.0, 18.5, 20.0])  # 2, 1, 2 and 1 columns


NESTED = ["xxxx xxxx xxxx xxxx", "xx.. xx.. .... ....", "..xx ..xx .... ....", ".... .... xx.. xx..",
          ".... .... ..xx ..xx", "x... .... .... ....", ".x.. .... .... ....", "..x. .... .... ...."]


def test_nested_windows():
    """The whole image, its quarters, and theirs; a window does not depend on how many there are."""
    found = voco_windows(VocoConfig(8, init="pool_nested"), 4)
    shown = lambda window: " ".join("".join(".x"[cell] for cell in row) for row in window.reshape(4, 4).astype(int))
    assert [shown(window) for window in found] == NESTED
    for num_vocos, side in ((1, 1), (2, 2), (5, 2), (6, 4), (21, 4), (22, 8)):
        config = VocoConfig(num_vocos, init="pool_nested")
        assert config.windows == (side, side)
        assert num_vocos > 8 or np.array_equal(voco_windows(config, 4), found[:num_vocos])


@pytest.mark.parametrize(("num_vocos", "windows"), [(1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (8, (2, 4)), (6, (2, 3))])
def test_the_grid_of_windows(tiny_config, num_vocos, windows):
    assert dataclasses.replace(tiny_config.voco, num_vocos=num_vocos).windows == windows


@pytest.mark.parametrize("num_vocos", [1, 2, 4])
def test_embeddings_by_hand(tiny_model, words, num_vocos):
    """A row of two samples, the first with two units: only VoCo tokens differ, by the mean of their window."""
    model = pooling(tiny_model, num_vocos)
    plain = dataclasses.replace(model.config, voco=dataclasses.replace(model.config.voco, init="learned"))
    unit = unit_shape(model.config)
    sample = lay_out_sample("x", 2, [[Span("red green")], [Span("blue")]], words, unit, 100)
    rows = jax.tree.map(jnp.asarray, whole_rows([sample], [IMAGES[:2]], model.config, "voco", len(sample) + 5))
    embedded_SE = np.asarray(model.embed(rows))[0]
    expected_SE = np.array(with_parameters(make_model(plain), parameters_of(model)).embed(rows))[0]
    tokens_UPE = np.asarray(model.encode_images(jnp.asarray(np.stack(IMAGES[:2]))))
    of_windows = {1: [[0, 1, 2, 3]], 2: [[0, 2], [1, 3]], 4: [[0], [1], [2], [3]]}[num_vocos]  # of 2 x 2 patches
    offset = int(np.flatnonzero(np.asarray(rows.vision_BS)[0] == 0)[0]) - 1
    places = offset + np.flatnonzero(sample.roles == Role.VOCO)
    assert len(places) == 2 * num_vocos
    for number, place in enumerate(places):
        image, window = divmod(number, num_vocos)
        expected_SE[place] += tokens_UPE[image, of_windows[window]].mean(0)
    np.testing.assert_allclose(embedded_SE, expected_SE, atol=1e-5)


@pytest.mark.parametrize("num_vocos", [1, 4])
def test_two_stages_answer_as_a_single_pass(tiny_model, words, num_vocos):
    assistant = Assistant(pooling(tiny_model, num_vocos), words, template("short"))
    requests = [Request(text, tuple(IMAGES[:count]), SamplingConfig(max_new_tokens=3))
                for text, count in (("what color ?", 1), ("a picture of", 3))]
    single, cached = (list(answer_many(assistant, requests, way=way, with_logits=True, progress=None))
                      for way in ("single pass", "caches"))
    plain = list(answer_many(Assistant(tiny_model, words, template("short")), requests, with_logits=True,
                             progress=None))
    for one, other, without in zip(single, cached, plain, strict=True):
        is_token = np.isfinite(one.first_logits_V)
        np.testing.assert_allclose(other.first_logits_V[is_token], one.first_logits_V[is_token], atol=1e-4)
        assert np.abs(without.first_logits_V[is_token] - one.first_logits_V[is_token]).max() > 1e-2
        assert one.text == other.text


def test_fingerprints(tiny_model, words):
    """The default leaves no trace; a pooling model's caches belong to its number of VoCo tokens."""
    plain, one, four = (fingerprint(model, words) for model in (tiny_model, pooling(tiny_model, 1),
                                                                 pooling(tiny_model, 4)))
    assert '"voco": {"token_id"' in plain.config
    assert '"init"' not in plain.config
    assert '"num_vocos"' not in plain.config
    assert one.differences(four) == "voco.num_vocos is 4 there, 1 here"
    assert "voco.init is 'pool' there, 'learned' here" in plain.differences(one)


def test_more_windows_than_patches_are_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"voco\.num_vocos has 2 x 4 windows for voco\.init 'pool', more than the "
                                          "tower's 2 patches on a side"):
        with_voco(tiny_config, num_vocos=8, init="pool")


def test_the_original_layout_refuses_pool(tiny_model, words, tmp_path):
    model = pooling(tiny_model, 1)
    with pytest.raises(ConvertError, match=r"the layout 'llava' has no voco.init 'pool'; use 'huggingface' or 'orbax', "
                                           r"or train with voco.init 'learned'"):
        save_model(model, ModelCard(model.config, words, "short", "pad", "voco"), tmp_path / "export", "llava")
    assert not (tmp_path / "export").exists()


def test_a_run_keeps_pool(tiny_model, words, tmp_path):
    model = pooling(tiny_model, 1)
    save_model(model, ModelCard(model.config, words, "short", "pad", "voco"), tmp_path / "run", "orbax")
    assert Assistant.from_run(tmp_path / "run").model.config.voco.init == "pool"
