"""Recipes that change where VoCo tokens stand, what they see, and what text reads of them; and the mask that closes."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from vocojax.config import ConfigError, ModelConfig
from vocojax.data.conversation import template
from vocojax.errors import ConvertError, InputError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.fingerprint import fingerprint
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import answer_many
from vocojax.inference.prompts import whole_rows
from vocojax.inference.requests import Request
from vocojax.layout import Role, Span, UnitShape, lay_out_sample, lay_out_unit, unit_shape
from vocojax.models import two_stage
from vocojax.models.parameters import parameters_of, with_parameters
from vocojax.pretrained.loading import save_model
from vocojax.runs.card import ModelCard
from vocojax.testing import tiny_model as make_model
from vocojax.training.plan import hidden_states

IMAGES = list(np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8))


def with_voco(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, voco=dataclasses.replace(config.voco, **changes))


def seen(view):
    """Who sees whom, by the definition of the two vectors."""
    i, j = np.arange(len(view.start))[:, None], np.arange(len(view.stop))
    return (view.start[:, None] <= j) & (j <= i) & (i < view.stop)


def test_bands_of_a_unit(words):
    """Three vision tokens, three VoCo tokens; the picture in `SampleLayout._place_vocos`."""
    view = lay_out_unit("unit", words, UnitShape(3, 3, sees="band")).view("voco")
    vocos = ["".join(".x"[int(cell)] for cell in row) for row in seen(view)[-3:]]
    assert vocos == ["...xxx..",
                     "..x.xxx.",
                     "xx..xxxx"]
    assert (np.tril(np.ones((5, 5), bool)) == seen(view)[:5, :5]).all()  # the others see all before them


@given(tokens=st.integers(1, 9), vocos=st.integers(1, 9), units=st.integers(0, 3))
def test_bands_share_out_the_vision_tokens(words, tokens, vocos, units):
    """Each vision token is seen by one VoCo token of its own unit. All else is as without bands."""
    vocos = min(vocos, tokens)
    samples = [lay_out_sample("x", units, [[Span("red green")]], words, UnitShape(tokens, vocos, sees=sees), 200)
               for sees in ("band", "unit")]
    banded, whole = (seen(sample.view("voco")) for sample in samples)
    roles = samples[0].roles
    to_vision = np.ix_(roles == Role.VOCO, roles == Role.VISION)
    assert (banded[to_vision].sum(0) == 1).all() and (banded <= whole).all()
    assert banded[to_vision].sum(1).min(initial=tokens) >= tokens // vocos
    to_bos = np.ix_(roles == Role.VOCO, roles == Role.BOS)  # only a unit's last VoCo token sees BOS
    assert banded[to_bos].sum() == units
    banded[to_vision], banded[to_bos] = whole[to_vision], whole[to_bos]
    assert (banded == whole).all()
    causal = [sample.view("causal") for sample in samples]
    assert all((one == other).all() for one, other in zip(*causal, strict=True))


def test_one_voco_token_sees_its_whole_unit(words):
    views = [lay_out_unit("unit", words, UnitShape(5, 1, sees=sees)).view("voco") for sees in ("band", "unit")]
    assert all((one == other).all() for one, other in zip(*views, strict=True))


def test_positions_spread_over_the_unit(words):
    """Two units of BOS, eight vision tokens, a newline and two VoCo tokens, in the middle of each four."""
    sample = lay_out_sample("x", 2, [[Span("red")]], words, UnitShape(8, 2, places="spread"), 100)
    positions = sample.view("voco").positions.tolist()
    assert positions[:12] == [*range(10), 3, 7]
    assert positions[12:24] == [*range(2, 12), 5, 9]
    assert positions[24:26] == [14, 15]  # text, where it is without the recipe
    assert sample.view("causal").positions.tolist() == list(range(len(sample)))


def test_two_stages_answer_as_a_single_pass(tiny_config, words):
    model = make_model(with_voco(tiny_config, num_vocos=4, places="spread", sees="band"))
    request = Request("what color ?", tuple(IMAGES), SamplingConfig(max_new_tokens=3))
    (single,), (cached,) = (list(answer_many(Assistant(model, words, template("short")), [request], way=way,
                                             with_logits=True, progress=None)) for way in ("single pass", "caches"))
    is_token = np.isfinite(single.first_logits_V)
    np.testing.assert_allclose(cached.first_logits_V[is_token], single.first_logits_V[is_token], atol=1e-4)
    assert single.text == cached.text


def test_outputs_by_hand(tiny_config, words):
    """Layer i's kept keys and values are those that it makes of its own output; and the model's parameters stay."""
    config = with_voco(tiny_config, reads="output")
    model, unit = make_model(config), lay_out_unit("unit", words, unit_shape(config))
    rows = jax.tree.map(jnp.asarray, whole_rows([unit], [IMAGES[:1]], config, "voco", len(unit)))

    @jax.jit
    def both_ways(model, paper):
        x_BSE, rotation = model.embed(rows), model.decoder.rotation(rows.positions_BS)
        graphdef, state = nnx.split(model.decoder.blocks)
        by_hand = []
        for layer in range(config.decoder.depth):
            block = nnx.merge(graphdef, jax.tree.map(operator.itemgetter(layer), state))
            x_BSE, _ = block(x_BSE, rotation, rows.mask, None, "reference")
            by_hand.append([x_BSGD[:, -2:] for x_BSGD in block.keys_and_values(x_BSE, rotation)])
        return two_stage.compress(model, rows, 2), by_hand, two_stage.compress(paper, rows, 2)

    found, by_hand, paper = both_ways(model, with_parameters(make_model(tiny_config), parameters_of(model)))
    for layer, (k_BNGD, v_BNGD) in enumerate(by_hand):
        np.testing.assert_allclose(found.k_LBKGD[layer], k_BNGD, atol=1e-5)
        np.testing.assert_allclose(found.v_LBKGD[layer], v_BNGD, atol=1e-5)
    assert np.abs(np.asarray(found.v_LBKGD - paper.v_LBKGD)).max() > 1e-2


def test_outputs_are_read_from_caches_alone(tiny_config, words, stage):
    assistant = Assistant(make_model(with_voco(tiny_config, reads="output")), words, template("short"))
    request = Request("what color ?", (IMAGES[0],))
    with pytest.raises(InputError, match="reads images from caches alone"):
        list(answer_many(assistant, [request], way="single pass", progress=None))
    with pytest.raises(ConfigError, match=r"plan must be 'two_stage' for model\.voco\.reads 'output'"):
        dataclasses.replace(stage, model=assistant.model.config)


@pytest.mark.parametrize(("changes", "is_nested"), [
    ({"places": "spread"}, False), ({"sees": "band"}, False), ({"reads": "output"}, True)])
def test_fingerprints_and_exports(tiny_config, tiny_model, words, tmp_path, changes, is_nested):
    """A recipe is in the fingerprint, with the number of VoCo tokens if that changes them; exports refuse it."""
    (key, value), = changes.items()
    model = with_parameters(make_model(with_voco(tiny_config, **changes)), parameters_of(tiny_model))
    paper, ours = fingerprint(tiny_model, words), fingerprint(model, words)
    assert key not in paper.config and f'"{key}": "{value}"' in ours.config
    assert ('"num_vocos"' not in ours.config) == is_nested
    with pytest.raises(ConvertError, match=f"the layout 'huggingface' has no voco.{key} '{value}'; use 'orbax'"):
        save_model(model, ModelCard(model.config, words, "short", "pad", "voco"), tmp_path / "export", "huggingface")


def test_the_mask_closes_row_by_row(stage):
    """Four rows, eight steps, closing = 0.5: in steps 0 to 4 the mask is open in 4, 3, 2, 1 and 0 rows."""
    config = dataclasses.replace(stage, closing=0.5, steps=8, batch_size=4)
    closed, opened = np.zeros((4, 3), np.int32), np.ones((4, 3), np.int32)
    batch = {"row": np.arange(4), "ids": closed, "vision": closed, "images": closed}
    for name in ("positions", "start", "stop"):
        batch |= {name: closed, f"teacher_{name}": opened}
    model = lambda rows, **options: (rows,)
    for step, count in enumerate((4, 3, 2, 1, 0, 0)):
        rows = hidden_states(model, batch, config, step=jnp.int32(step))
        expected = [[1] * 3] * count + [[0] * 3] * (4 - count)
        for array in (rows.positions_BS, rows.start_BS, rows.stop_BK):
            assert array.tolist() == expected, step
    assert hidden_states(model, batch, dataclasses.replace(config, closing=0.0)).start_BS.tolist() == closed.tolist()


def test_only_a_single_pass_can_close(stage):
    with pytest.raises(ConfigError, match="closing must be 0 but for visibility 'voco' and plan 'single_pass'"):
        dataclasses.replace(stage, closing=0.5, plan="two_stage")
    with pytest.raises(ConfigError, match=r"closing must be in \[0, 1\]"):
        dataclasses.replace(stage, closing=1.5)
