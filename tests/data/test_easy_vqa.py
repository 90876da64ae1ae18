import pytest

from vocojax.data.sources.easy_vqa import COLOURS, SHAPES, EasyVqaCaptions, EasyVqaSource

pytest.importorskip("easy_vqa")


def test_splits_share_no_image_and_hold_all_questions():
    train, validation, test = (EasyVqaSource(split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (3600, 400, 1000)
    assert not set(train.images) & set(validation.images)
    count = lambda source: sum(map(len, source.questions))
    assert count(train) + count(validation) + count(test) == 48_248


def test_questions_of_an_image_are_grouped_evenly():
    whole, grouped = EasyVqaSource("test"), EasyVqaSource("test", threads_per_sample=3)
    sizes = [len(grouped[i].threads) for i in range(len(grouped))]
    assert max(sizes) == 3 and sum(sizes) == sum(len(whole[i].threads) for i in range(len(whole)))


def test_captions_agree_with_the_answers():
    captions = EasyVqaCaptions("validation")
    source = EasyVqaSource("validation")
    by_path = {path: questions for path, questions in zip(source.images, source.questions, strict=True)}
    assert len(captions) > 300
    for index in range(len(captions)):
        sample = captions[index]
        colour, shape = sample.threads[0][-1].text.split()
        assert colour in COLOURS and shape in SHAPES
        for question in by_path[sample.images[0]]:
            if question.kind == "colour":
                assert question.answer == colour
            if question.kind == "shape":
                assert question.answer == shape


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"data\.split must be 'train', 'validation' or 'test', got 'val'"):
        EasyVqaSource("val")
