"""Mosaics: canvases, splits and questions against literal values, and answers against a count by hand."""

import numpy as np
import pytest

from vocojax.data.sources.mosaic import MosaicSource, Tile, ask, bits_per_image, place_names

pytest.importorskip("easy_vqa")


@pytest.fixture(scope="module")
def validation():
    return MosaicSource("validation", threads_per_sample=8, grid=3)


def test_a_canvas_and_its_questions(validation):
    assert validation.caption(1) == ("red rectangle blue circle yellow circle blue rectangle yellow rectangle "
                                     "gray circle black triangle teal triangle green triangle")
    questions = validation.questions(1)
    assert [(q.text, q.answer, q.kind) for q in questions[:8]] == [
        ("middle center color ?", "yellow", "binding"),
        ("bottom center shape ?", "triangle", "binding"),
        ("green triangle where ?", "bottom right", "position"),
        ("gray circle where ?", "middle right", "position"),
        ("any green triangle ?", "yes", "existence"),
        ("how many triangle ?", "3", "counting"),
        ("how many rectangle ?", "3", "counting"),
        ("more circle than rectangle ?", "no", "comparison"),
    ]
    assert len(questions) == 16


def test_the_pixels_show_the_tiles(validation):
    """The centre of a cut-out is inside its shape, so its colour is the tile's."""
    colours = {"black": (0, 0, 0), "blue": (0, 0, 255), "red": (255, 0, 0), "yellow": (255, 255, 0),
               "green": (0, 255, 0), "teal": (0, 128, 128), "brown": (165, 42, 42), "gray": (128, 128, 128)}
    for canvas in range(20):
        pixels = validation.pixels(canvas).astype(int)
        assert pixels.shape == (96, 96, 3)
        tiles = pixels.reshape(3, 32, 3, 32, 3).swapaxes(1, 2).reshape(9, 32, 32, 3)
        for tile, shown in zip(validation.tiles[canvas], tiles, strict=True):
            distance = {name: np.abs(shown - colour).sum(-1).min() for name, colour in colours.items()}
            assert distance[tile.colour] < 40


def test_samples_share_out_a_canvas_questions(validation):
    asked = [q.text for q in validation.questions(1)]
    first, second = validation[2], validation[3]
    assert len(validation) == 500
    assert [thread[0].text for thread in first.threads] == asked[::2]
    assert [thread[0].text for thread in second.threads] == asked[1::2]
    assert first.images == second.images


def test_captions_come_first():
    source = MosaicSource("validation", threads_per_sample=8, captions=True, grid=3)
    assert [turn.text for turn in source[2].threads[0]] == ["describe ?", source.caption(1)]
    assert len(source[2].threads) == 9


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_right(seed):
    """Every answer is counted again from the words of the question."""
    tiles = [Tile(*text.split()) for text in ("red circle", "blue circle", "red triangle", "red circle")]
    places = dict(zip(place_names(2), tiles, strict=True))
    for question in ask(tiles, np.random.default_rng(seed)):
        words = question.text.removesuffix(" ?").split()
        if words[-1] in ("color", "shape"):
            expected = places[" ".join(words[:2])][words[-1] == "shape"]
        elif words[-1] == "where":
            expected = next(place for place, tile in places.items() if tile == tuple(words[:2]))
            assert tiles.count(Tile(*words[:2])) == 1
        elif words[0] == "any":
            expected = "yes" if tuple(words[1:]) in tiles else "no"
        elif words[0] == "how":
            expected = str(sum(words[2] in tile for tile in tiles))
        else:
            first, second = (sum(word in tile for tile in tiles) for word in (words[1], words[3]))
            expected = "yes" if first > second else "no"
        assert question.answer == expected, question.text


def test_bits():
    assert bits_per_image(2) == pytest.approx(4 * np.log2(24))
    assert bits_per_image(3) == pytest.approx(41.2647, abs=1e-4)


def test_splits_draw_other_canvases(validation):
    assert validation.tiles[:50] != MosaicSource("test", grid=3).tiles[:50]
