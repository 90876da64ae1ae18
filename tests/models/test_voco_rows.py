"""`voco.rows = "own"`: every VoCo token of a unit has an offset of its own; without it nothing changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from vocojax.config import ModelConfig, preset
from vocojax.data.conversation import template
from vocojax.errors import ConvertError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.fingerprint import fingerprint
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import answer_many
from vocojax.inference.prompts import whole_rows
from vocojax.inference.requests import Request
from vocojax.layout import Role, Span, lay_out_sample, unit_shape
from vocojax.models.parameters import abstract, parameters_of, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.parallel.mesh import AXES
from vocojax.parallel.shardings import parameter_shardings
from vocojax.pretrained.loading import save_model
from vocojax.runs.card import ModelCard
from vocojax.runs.parameters import CheckpointError, load_model
from vocojax.testing import tiny_model as make_model
from vocojax.training.stage import train

IMAGES = list(np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8))
OFFSETS = "decoder/voco_offsets"


def with_voco(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, voco=dataclasses.replace(config.voco, **changes))


@pytest.fixture(scope="module")
def own(tiny_config) -> VocoLlama:
    """Three VoCo tokens with rows of their own."""
    return make_model(with_voco(tiny_config, num_vocos=3, rows="own"))


def packed(model, words):
    """A row of two samples, the first with two units; and the places of its VoCo tokens."""
    unit = unit_shape(model.config)
    samples = [lay_out_sample("x", 2, [[Span("red green")], [Span("blue")]], words, unit, 100),
               lay_out_sample("y", 1, [[Span("yes")]], words, unit, 100)]
    rows = whole_rows(samples, [IMAGES[:2], IMAGES[2:]], model.config, "voco", 60)
    return jax.tree.map(jnp.asarray, rows), samples


def test_only_the_parameter_is_new(own, tiny_config):
    """All other random parameters are those of a model that shares the row."""
    shared = parameters_of(make_model(with_voco(tiny_config, num_vocos=3)))
    parameters = parameters_of(own)
    assert parameters.pop(OFFSETS).shape == (3, 32)
    assert parameters.keys() == shared.keys()
    assert all(np.array_equal(parameters[name], shared[name]) for name in shared)


def test_embeddings_by_hand(own, words):
    """VoCo token n of every unit, also of the second unit of a sample, differs by offset n; nothing else differs."""
    rows, samples = packed(own, words)
    offsets_NE = np.arange(96, dtype=np.float32).reshape(3, 32)
    found_BSE = np.asarray(with_parameters(own, {**parameters_of(own), OFFSETS: offsets_NE}).embed(rows))
    expected_BSE = np.array(with_parameters(own, {**parameters_of(own), OFFSETS: 0 * offsets_NE}).embed(rows))
    is_voco_BS = np.asarray(rows.ids_BS) == own.config.voco.token_id
    places = [np.flatnonzero(is_voco_S) for is_voco_S in is_voco_BS]
    assert [len(p) for p in places] == [6, 3] == [int((s.roles == Role.VOCO).sum()) for s in samples]
    for row, own_places in enumerate(places):
        for number, place in enumerate(own_places):
            expected_BSE[row, place] += offsets_NE[number % 3]
    np.testing.assert_allclose(found_BSE, expected_BSE, rtol=1e-6, atol=1e-6)


def test_offsets_of_zero_are_the_shared_row(own, words, tiny_config):
    rows, _ = packed(own, words)
    zero = with_parameters(own, {**parameters_of(own), OFFSETS: np.zeros((3, 32), np.float32)})
    shared = make_model(with_voco(tiny_config, num_vocos=3))
    assert np.array_equal(zero.embed(rows), shared.embed(rows))


def test_two_stages_answer_as_a_single_pass(own, words):
    assistant = Assistant(own, words, template("short"))
    request = Request("what color ?", tuple(IMAGES), SamplingConfig(max_new_tokens=3))
    (single,), (cached,) = (list(answer_many(assistant, [request], way=way, with_logits=True, progress=None))
                            for way in ("single pass", "caches"))
    is_token = np.isfinite(single.first_logits_V)
    np.testing.assert_allclose(cached.first_logits_V[is_token], single.first_logits_V[is_token], atol=1e-4)
    assert single.text == cached.text


def test_fewer_of_the_tokens_are_those_of_a_model_with_fewer(own, words):
    """The first two of three VoCo tokens do not depend on the third, so a cache can be cut."""
    two = with_parameters(make_model(with_voco(own.config, num_vocos=2)),
                          {**parameters_of(own), OFFSETS: parameters_of(own)[OFFSETS][:2]})
    caches = [Assistant(model, words, template("short")).compress(IMAGES[:1]) for model in (own, two)]
    cut = caches[0].truncate(2)
    np.testing.assert_allclose(cut.k_LUNGD, caches[1].k_LUNGD, atol=1e-5)
    np.testing.assert_allclose(cut.v_LUNGD, caches[1].v_LUNGD, atol=1e-5)


def test_fingerprints(own, tiny_model, words):
    shared, with_rows = fingerprint(tiny_model, words), fingerprint(own, words)
    assert '"rows"' not in shared.config
    assert shared.differences(with_rows) == "voco.rows is 'own' there, 'shared' here"


def test_its_part_on_a_mesh():
    """The rows are whole, and their width is cut like the embedding's."""
    config = with_voco(preset("clip_l_336_vicuna_7b"), num_vocos=8, rows="own")
    model = abstract(lambda: VocoLlama(config, nnx.Rngs(0)))
    sharding = parameter_shardings(model, AbstractMesh((1, 1, 64, 1), AXES))[OFFSETS]
    assert sharding.shard_shape((8, 4096)) == (8, 64)


def test_the_original_layout_refuses_own_rows(own, words, tmp_path):
    with pytest.raises(ConvertError, match=r"the layout 'llava' has no voco.rows 'own'; use 'huggingface' or 'orbax', "
                                           r"or train with voco.rows 'shared'"):
        save_model(own, ModelCard(own.config, words, "short", "pad", "voco"), tmp_path / "export", "llava")
    assert not (tmp_path / "export").exists()


def test_a_stage_starts_from_a_model_that_shares_the_row(stage, tiny_model, words, tmp_path):
    """The offsets are new, and the stage must say so; they train, and the run keeps them."""
    save_model(tiny_model, ModelCard(tiny_model.config, words, "short", "pad", "causal"), tmp_path / "first", "orbax")
    second = dataclasses.replace(stage, model=with_voco(tiny_model.config, rows="own"), steps=1,
                                 init_from=str(tmp_path / "first"))
    with pytest.raises(CheckpointError, match=f"{OFFSETS} is missing; set config.model as in its config.json, or list "
                                              "in init_new what the stage does not take from it"):
        train(second, tmp_path / "refused")
    train(dataclasses.replace(second, init_new=(OFFSETS,)), tmp_path / "second")
    trained = load_model(tmp_path / "second")
    assert trained.config.voco.rows == "own"
    assert trained.decoder.voco_offsets.shape == (2, 32)
    assert Assistant.from_run(tmp_path / "second").compress(IMAGES[:1]).tokens_per_unit == 2
