"""Model FLOPs against figures worked out by hand, visible pairs against the mask's definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vocojax.config import LoraConfig, VisionConfig, preset
from vocojax.costs.kernels.layouts import layouts
from vocojax.models.lora import add_lora
from vocojax.models.parameters import abstract, variables_of
from vocojax.models.voco import VocoLlama
from vocojax.training import flops
from vocojax.training.flops import Composition, StepFlops, visible_pairs
from vocojax.training.optimizer import matches
from vocojax.training.step import TrainState

CONFIG = preset("clip_l_336_vicuna_7b")
LAYERS = 6_476_005_376  # 32 x (4 x 4096^2 + 3 x 4096 x 11008)
VISION = 366_033_858_560  # of an image, forwards; in the two lines below
assert VISION == 2 * 577 * 23 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 576 * 588 * 1024 + 4 * 577**2 * 1024 * 23
LINEAR_IN, LINEAR_OUT = 576 * 1024 * 4096, 576 * 4096 * 4096


def counted(*train: str, config=CONFIG, lora=None, teacher=False) -> StepFlops:
    def make():
        model = VocoLlama(config, nnx.Rngs(0))
        add_lora(model, lora or LoraConfig(), nnx.Rngs(0))
        return model

    leaves = {name: jax.ShapeDtypeStruct(v.shape, jnp.float32) for name, v in variables_of(abstract(make)).items()}
    trained = {name: leaf for name, leaf in leaves.items() if matches(name, train)}
    frozen = {name: leaf for name, leaf in leaves.items() if name not in trained}
    return StepFlops(config, TrainState(jnp.int32(0), trained, frozen, (), frozen | trained if teacher else {}))


def test_the_voco_stage_of_the_7b():
    """Everything but the vision tower trains; the projector's first layer passes no gradient on."""
    found = counted("projector/.*", "decoder/.*")
    assert found.per_token == 6 * LAYERS
    assert found.per_target == 6 * 4096 * 32001, "rows of the vocabulary that stand for no token are no work"
    assert found.per_pair == 12 * 32 * 128 * 32 and found.per_teacher_pair == 0
    assert found.per_image == VISION + 4 * LINEAR_IN + 6 * LINEAR_OUT == 433_679_593_472
    assert found.total(10, 3, 2, 100) == 10 * 38_856_032_256 + 3 * 786_456_576 + 2 * 433_679_593_472 + 100 * 1_572_864


def test_evas_patch_embedding_is_counted():
    """Its kernel is that of a linear layer with a bias; CLIP's is a parameter of its own."""
    tower = VisionConfig("eva", 28, 7, 176, 3, 2, 200, -1, 1e-6)  # 16 patches of 147 values, 3 layers
    vision = 2 * 17 * 3 * (4 * 176**2 + 2 * 176 * 200) + 2 * 16 * 147 * 176 + 4 * 17**2 * 176 * 3
    found = counted("projector/.*", config=dataclasses.replace(CONFIG, vision=tower))
    assert found.per_image == vision + 4 * 16 * 176 * 4096 + 4 * 16 * 4096**2 + 2 * 16 * 4096**2


def test_the_alignment_stage_trains_the_projector_alone():
    found = counted("projector/.*")
    assert (found.per_token, found.per_target) == (4 * LAYERS, 4 * 4096 * 32001)
    assert found.per_image == VISION + 4 * LINEAR_IN + 6 * LINEAR_OUT


def test_a_vision_tower_that_trains_costs_three_times_as_much():
    """But for its patches, whose pixels want no gradient."""
    assert counted(".*").per_image == 3 * VISION - 2 * 576 * 588 * 1024 + 6 * LINEAR_IN + 6 * LINEAR_OUT


def test_lora_adds_its_factors_to_frozen_kernels():
    """Rank 8 on the queries: factors of 32 x (4096 x 8 + 8 x 4096)."""
    lora = LoraConfig(rank=8, targets=("decoder/blocks/query/kernel",))
    found = counted("projector/.*", ".*/lora/[ab]", lora=lora)
    assert found.per_token == 4 * LAYERS + 6 * 32 * 2 * 4096 * 8 and found.per_target == 4 * 4096 * 32001


def test_a_tied_head_is_the_embedding():
    tied = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tie_embeddings=True))
    assert counted("projector/.*", "decoder/.*", config=tied).per_target == 6 * 4096 * 32001
    assert counted("projector/.*", config=tied).per_target == 4 * 4096 * 32001


def test_a_teacher_runs_forwards():
    found = counted("projector/.*", "decoder/.*", teacher=True)
    assert (found.per_token, found.per_target) == (8 * LAYERS, 8 * 4096 * 32001)
    assert found.per_image == 2 * VISION + (4 + 2) * LINEAR_IN + (6 + 2) * LINEAR_OUT
    assert (found.per_pair, found.per_teacher_pair) == (12 * 32 * 128 * 32, 4 * 32 * 128 * 32)


@pytest.mark.parametrize("name", ["a", "b"])
def test_visible_pairs_are_those_of_the_mask(name):
    layout = layouts()[name]
    index = np.arange(layout.length)
    seen = [((start[:, None] <= index) & (index <= index[:, None]) & (index[:, None] < stop)).sum()
            for start, stop in zip(layout.start, layout.stop, strict=True)]
    assert visible_pairs(layout.start, layout.stop) == sum(seen) > 0


def test_visible_pairs_of_one_sample():
    """Two vision tokens and a VoCo token as a unit, which see 1 + 2 + 3; two tokens of text, which see the VoCo token
    and the text: 2 + 3. One token of padding sees nothing."""
    start, stop = np.array([[0, 0, 0, 0, 0, 5]]), np.array([[3, 3, 5, 5, 5, 5]])
    assert visible_pairs(start, stop) == 1 + 2 + 3 + 2 + 3


def test_a_run_s_utilisation_counts_images_and_pairs(monkeypatch):
    """Of twice the tokens of the one batch seen: 10 tokens, 2 images and 22 pairs."""
    monkeypatch.setattr(flops, "peak_flops", lambda kind: 1e12)
    composition, found = Composition(unit_tokens=2), counted("projector/.*", "decoder/.*")
    assert composition.utilisation(found, 10, 3, 1.0) is None, "nothing was seen"
    composition.see({"num_tokens": np.array([5]), "vision": np.array([[0, 1, -1, -1, -1, -1]]),
                     "start": np.array([[0, 0, 0, 0, 0, 5]]), "stop": np.array([[3, 3, 5, 5, 5, 5]])})
    want = found.total(10, 3, 2, 22) / (4.0 * 1e12 * jax.device_count())
    assert composition.utilisation(found, 10, 3, 4.0) == pytest.approx(want)


def test_a_run_in_two_stages_counts_units_and_texts(monkeypatch):
    """A unit of 3 tokens after one of padding sees 1 + 2 + 3; a text of 2 sees one key of the prefix and 1 + 2."""
    monkeypatch.setattr(flops, "peak_flops", lambda kind: 1e12)
    composition, found = Composition(unit_tokens=2), counted("projector/.*", "decoder/.*")
    composition.see({"num_tokens": np.array([2]), "unit_slot": np.array([[1, -1]]),
                     "unit_start": np.array([[0, 1, 1, 1]]), "unit_stop": np.array([[0, 4, 4, 4]]),
                     "start": np.array([[1, 1, 4]]), "stop": np.array([[0, 4, 4, 4, 4]])})
    want = found.total(2 + 3, 3, 1, 6 + 2 + 3) / (4.0 * 1e12 * jax.device_count())
    assert composition.utilisation(found, 2, 3, 4.0) == pytest.approx(want)
