"""The prompt layout: a literal golden sample of the released code's layout, and who may see whom by brute force."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vocojax.data.conversation import Turn, template
from vocojax.layout import (
    IGNORE,
    Encoded,
    LayoutError,
    Role,
    Span,
    UnitShape,
    lay_out_sample,
    lay_out_unit,
    require_targets,
)


class Letters:
    """One token per character: 'a' is 97; <voco> is 1000, BOS 1."""

    bos_id, voco_id, voco_token = 1, 1000, "<voco>"

    def encode(self, text):
        ids, ends, at = [], [], 0
        while at < len(text):
            size = 6 if text.startswith("<voco>", at) else 1
            ids.append(1000 if size == 6 else ord(text[at]))
            at += size
            ends.append(at)
        return Encoded(ids, ends)


def pairs(view):
    """Visible (query, key) pairs of a view, by the rule alone."""
    n = len(view.start)
    return {(i, j) for i, j in itertools.product(range(n), repeat=2)
            if view.start[i] <= j <= i and i < view.stop[j]}


def test_released_layout_golden(llama_tokenizer):
    """One image of 4 vision tokens, N = 2, the released code's template; tokens by a LLaMA-style tokenizer."""
    conversation = (Turn("user", "<image>\nWhat is the color of the\nbus?"), Turn("assistant", "The bus is red."))
    spans = template("released").spans(conversation, "</s>")
    assert "".join(span.text for span in spans).endswith(
        "questions. USER: What is the color of thebus? ASSISTANT: The bus is red.</s>")
    spans = [Span("A chat."), *spans[1:]]  # the system prompt cut short, so that the literals below can be read
    sample = lay_out_sample("golden", 1, [spans], llama_tokenizer, UnitShape(4, 2), 100)
    assert llama_tokenizer.huggingface.convert_ids_to_tokens(sample.ids[5:].tolist()) == [
        "▁", "<0x0A>", "<voco>", "<voco>", "<0x0A>", "A", "▁c", "hat", ".", "▁US", "ER", ":", "▁W", "hat", "▁is",
        "▁the", "▁co", "lor", "▁of", "▁the", "b", "us", "?", "▁A", "SS", "IST", "ANT", ":",
        "▁The", "▁bus", "▁is", "▁r", "ed", ".", "</s>",
    ]
    assert sample.ids.tolist() == [
        1, 1, 1, 1, 1, 335, 13, 370, 370, 13, 352, 269, 280, 351, 329, 292, 356, 317, 280, 281, 270, 330, 328, 333,
        270, 353, 261, 361, 278, 294, 321, 320, 356, 284, 287, 281, 319, 272, 351, 2,
    ]
    assert sample.labels.tolist() == [IGNORE] * 33 + [284, 287, 281, 319, 272, 351, 2]
    assert sample.roles.tolist() == [Role.BOS] + [Role.VISION] * 4 + [Role.NEWLINE] * 2 + [Role.VOCO] * 2 + [
        Role.TEXT] * 31
    view = sample.view("voco")
    assert view.positions.tolist() == list(range(40))
    unit = {(i, j) for i in range(9) for j in range(i + 1)}
    text = {(i, j) for i in range(9, 40) for j in range(7, i + 1)}
    assert pairs(view) == unit | text
    assert pairs(sample.view("causal")) == {(i, j) for i in range(40) for j in range(i + 1)}


def test_prompt_string_tokenised_whole_gives_the_same_ids(llama_tokenizer):
    """The layout's pieces are what the released code gets from tokenising its prompt string in one go."""
    conversation = (Turn("user", "a\nb"), Turn("assistant", "Red."), Turn("user", "bus?"), Turn("assistant", "Yes"))
    spans = template("released").spans(conversation, "</s>")
    sample = lay_out_sample("x", 1, [spans], llama_tokenizer, UnitShape(3, 5), 10_000)
    prompt = "\n" + "<voco>" * 5 + "\n" + "".join(span.text for span in spans)
    whole = llama_tokenizer.huggingface(prompt, add_special_tokens=False).input_ids
    assert sample.ids[sample.roles != Role.VISION].tolist() == [1, *whole]


def test_default_template_keeps_newlines():
    turns = (Turn("user", "<image>\nIs it red?\nAnswer shortly."), Turn("assistant", "yes"))
    default = "".join(span.text for span in template("vicuna_v1").spans(turns, "</s>"))
    assert default.endswith(" USER: Is it red?\nAnswer shortly. ASSISTANT: yes</s>")
    released = "".join(span.text for span in template("released").spans(turns, "</s>"))
    assert released.endswith(" USER: Is it red?Answer shortly. ASSISTANT: yes</s>")


def test_two_units_and_two_threads_literally():
    threads = [[Span("q"), Span("A", True)], [Span("r"), Span("BC", True)]]
    sample = lay_out_sample("x", 2, threads, Letters(), UnitShape(2, 1), 100)
    #                    unit 0            unit 1            thread 0      thread 1
    assert sample.ids.tolist() == [1, 1, 1, 10, 1000, 1, 1, 1, 10, 1000, 10, 113, 65, 10, 114, 66, 67]
    assert sample.labels.tolist() == [IGNORE] * 12 + [65, IGNORE, IGNORE, 66, 67]
    view = sample.view("voco")
    assert view.positions.tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9]
    assert view.start.tolist() == [0] * 5 + [5] * 5 + [0] * 7
    assert view.stop.tolist() == [5, 5, 5, 5, 17, 10, 10, 10, 10, 17, 13, 13, 13, 17, 17, 17, 17]
    causal = sample.view("causal")
    assert causal.positions.tolist() == [*range(10), 10, 11, 12, 10, 11, 12, 13]
    assert causal.start.tolist() == [0] * 17
    assert causal.stop.tolist() == [17] * 10 + [13] * 3 + [17] * 4


def test_sequential_positions_literally():
    """As if nothing were compressed; nothing else differs from compact positions."""
    threads = [[Span("q"), Span("A", True)], [Span("r")]]
    lay_out = lambda unit: lay_out_sample("x", 2, threads, Letters(), unit, 100)
    compact, sequential = lay_out(UnitShape(2, 1)), lay_out(UnitShape(2, 1, "sequential"))
    view = sequential.view("voco")
    assert view.positions.tolist() == [*range(10), 10, 11, 12, 10, 11]
    assert (view.start == compact.view("voco").start).all() and (view.stop == compact.view("voco").stop).all()
    assert sequential.view_after_prefix("voco", 2).positions.tolist() == [10, 11, 12, 10, 11]


def test_a_text_that_reads_fewer_vocos_literally():
    """Two units of three VoCo tokens of which text reads one: its positions are those after a cache of one each."""
    whole = lay_out_sample("x", 2, [[Span("q")]], Letters(), UnitShape(1, 3), 100)
    sample = dataclasses.replace(whole, unread=2)
    #                 BOS V \n C C C         BOS V \n C C C          \n q
    assert sample.view("voco").positions.tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 5, 6]
    assert sample.view("voco").start.tolist() == whole.view("voco").start.tolist()
    assert sample.view("voco").stop.tolist() == [6, 6, 6, 14, 6, 6, 12, 12, 12, 14, 12, 12, 14, 14]
    behind = sample.view_after_prefix("voco", 7)
    assert (behind.positions.tolist(), behind.stop.tolist()) == ([5, 6], [9, 1, 2, 9, 4, 5, 6, 9, 9])
    for ours, theirs in zip(sample.view("causal"), whole.view("causal"), strict=True):
        assert np.array_equal(ours, theirs)  # a teacher sees everything, as before
    cached = lay_out_sample("x", 2, [[Span("q")]], Letters(), UnitShape(1, 1), 100)
    assert cached.view_after_prefix("voco", 2).positions.tolist() == [5, 6]
    sequential = dataclasses.replace(sample, unit=UnitShape(1, 3, "sequential"))
    assert sequential.view("voco").positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 8, 9]


def brute_force(sample, visibility):
    """Who may see whom, token by token, from the words of the method."""
    allowed = set()
    for i, j in itertools.product(range(len(sample)), repeat=2):
        unit_of = lambda t: t // sample.unit_length if t < sample.text_start else None
        in_unit_i, in_unit_j = unit_of(i) is not None, unit_of(j) is not None
        if j > i:
            continue
        if visibility == "causal":
            same_thread = in_unit_j or sample.threads[i] == sample.threads[j]
            if same_thread:
                allowed.add((i, j))
        elif in_unit_i:
            if unit_of(i) == unit_of(j):
                allowed.add((i, j))
        elif in_unit_j:
            if sample.roles[j] == Role.VOCO:
                allowed.add((i, j))
        elif sample.threads[i] == sample.threads[j]:
            allowed.add((i, j))
    return allowed


SPANS = st.lists(st.tuples(st.text("abc ", max_size=4), st.booleans()).map(lambda t: Span(*t)), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    units=st.integers(0, 3), threads=st.lists(SPANS, min_size=1, max_size=3), tokens=st.integers(1, 4),
    vocos=st.integers(0, 3), cut=st.integers(0, 6),
)
def test_views_are_the_method_by_brute_force(units, threads, tokens, vocos, cut):
    threads = threads if units else threads[:1]
    assume(vocos or not any(thread[0].is_target for thread in threads[1:]))
    full = lay_out_sample("x", units, threads, Letters(), UnitShape(tokens, vocos), 1000)
    length = max(full.text_start + 1, len(full) - cut)
    sample = lay_out_sample("x", units, threads, Letters(), UnitShape(tokens, vocos), length)
    assert len(sample) == min(len(full), length) and sample.dropped == len(full) - len(sample)
    assert (sample.ids == full.ids[: len(sample)]).all()  # only the end of the text is ever dropped
    for visibility in ("voco", "causal"):
        assert pairs(sample.view(visibility)) == brute_force(sample, visibility)
    compact = sample.view("voco").positions
    is_voco = sample.roles == Role.VOCO
    prefix = 2 + tokens  # BOS, vision tokens, newline
    assert compact[is_voco].tolist() == list(range(prefix, prefix + units * vocos))
    for thread in range(sample.threads.max() + 1):
        own = compact[sample.threads == thread]
        first = prefix + units * vocos if units else 0
        assert own.tolist() == list(range(first, first + len(own)))


def pairs_after_prefix(view, prefix):
    """Visible (query, key) pairs of a view after a prefix, by the rule alone; queries are counted from 0."""
    return {(r, j) for r, j in itertools.product(range(len(view.start)), range(len(view.stop)))
            if view.start[r] <= j <= prefix + r and prefix + r < view.stop[j]}


@settings(max_examples=150, deadline=None)
@given(
    units=st.integers(0, 3), threads=st.lists(SPANS, min_size=1, max_size=3), tokens=st.integers(1, 3),
    vocos=st.integers(1, 3), padding=st.integers(0, 4), visibility=st.sampled_from(["voco", "causal"]),
)
def test_text_after_a_prefix_sees_what_it_sees_in_the_whole_sample(units, threads, tokens, vocos, padding, visibility):
    """The prefix's keys are the unit tokens that text sees, in their order; its padding is seen by nobody."""
    threads = threads if units else threads[:1]
    sample = lay_out_sample("x", units, threads, Letters(), UnitShape(tokens, vocos), 1000)
    whole, text_start = brute_force(sample, visibility), sample.text_start
    seen = [j for j in range(text_start) if sample.roles[j] == Role.VOCO or visibility == "causal"]
    assert np.flatnonzero(sample.seen_by_text(visibility)).tolist() == seen
    prefix = len(seen) + padding
    place = dict(zip(seen, range(len(seen)), strict=True)) | {
        j: prefix + j - text_start for j in range(text_start, len(sample))}
    view = sample.view_after_prefix(visibility, prefix)
    assert pairs_after_prefix(view, prefix) == {(i - text_start, place[j]) for i, j in whole if i >= text_start}
    assert np.array_equal(view.positions, sample.view(visibility).positions[text_start:])


@settings(max_examples=80, deadline=None)
@given(
    units=st.integers(0, 3), question=st.text("abc ", min_size=1, max_size=5), answer=st.integers(1, 3),
    vocos=st.integers(1, 3), padding=st.integers(0, 3), visibility=st.sampled_from(["voco", "causal"]),
)
def test_an_answer_sees_what_its_tokens_see_in_the_longer_sample(units, question, answer, vocos, padding, visibility):
    """The answer written after the question is a longer sample: its tokens see of the prompt what `answer` says."""
    lay_out = lambda *texts: lay_out_sample("x", units, [[Span(t) for t in texts]], Letters(), UnitShape(2, vocos), 99)
    prompt, longer = lay_out(question), lay_out(question, "A" * answer)
    whole, position = prompt.view(visibility).answer().sees, prompt.view(visibility).answer().position
    seen_in_longer, end = brute_force(longer, visibility), len(prompt)
    for index in range(end, len(longer)):
        assert {j for i, j in seen_in_longer if i == index} == {*np.flatnonzero(whole), *range(end, index + 1)}
        assert longer.view(visibility).positions[index] == position + index - end
    cached = int(prompt.seen_by_text(visibility).sum())
    after = prompt.view_after_prefix(visibility, cached + padding).answer()
    text = len(prompt) - prompt.text_start
    assert after.position == position
    assert after.sees.tolist() == [True] * cached + [False] * padding + [True] * text


def test_a_unit_alone_is_the_unit_of_a_sample():
    unit = lay_out_unit("x", Letters(), UnitShape(3, 2))
    sample = lay_out_sample("x", 1, [[Span("q")]], Letters(), UnitShape(3, 2), 100)
    assert unit.ids.tolist() == sample.ids[:7].tolist() == [1, 1, 1, 1, 10, 1000, 1000]
    assert unit.view("voco").positions.tolist() == list(range(7))
    assert pairs(unit.view("voco")) == {(i, j) for i in range(7) for j in range(i + 1)}


def test_targets_come_from_spans_even_where_the_text_repeats(llama_tokenizer):
    """The question spells the answer; only the answer's tokens and its end are targets."""
    turns = (Turn("user", "The bus is red."), Turn("assistant", "The bus is red."))
    sample = lay_out_sample("x", 1, [template("short").spans(turns, "</s>")], llama_tokenizer, UnitShape(2, 1), 100)
    targets = sample.labels[sample.labels != IGNORE]
    assert llama_tokenizer.huggingface.convert_ids_to_tokens(targets.tolist()) == [
        "▁The", "▁bus", "▁is", "▁r", "ed", ".", "</s>"]
    assert (sample.labels[-7:] == targets).all()


@pytest.mark.parametrize(
    ("units", "threads", "length", "message", "reason"),
    [
        (1, [[Span("q<voco>")]], 100, "record 'r7': its text contains the reserved token '<voco>'", "reserved token"),
        (3, [[Span("q")]], 12, "its 3 units have 15 tokens, which leaves no room for text", "units too long"),
        (0, [[Span("q")], [Span("r")]], 100, "has several threads without an image", "threads without unit"),
        (1, [[Span("q")], [Span("A", True)]], 100, "begins with a target", "target first"),
        (1, [], 100, "record 'r7': has no text", "no text"),
    ],
)
def test_samples_that_cannot_be_laid_out(units, threads, length, message, reason):
    shape = UnitShape(2, 0 if reason == "target first" else 1)
    with pytest.raises(LayoutError, match=message) as error:
        lay_out_sample("r7", units, threads, Letters(), shape, length)
    assert error.value.reason == reason


def test_a_sample_without_target_is_an_error_that_names_the_record():
    cut = lay_out_sample("r7", 1, [[Span("question"), Span("A", True)]], Letters(), UnitShape(2, 1), 10)
    with pytest.raises(LayoutError, match=r"record 'r7': truncation dropped 5 text tokens and all targets with them"):
        require_targets(cut)
    with pytest.raises(LayoutError, match="record 'r8': no answer in its conversation has a target"):
        require_targets(lay_out_sample("r8", 0, [[Span("text")]], Letters(), UnitShape(2, 1), 10))


def test_text_without_images_opens_with_bos_and_is_causal():
    sample = lay_out_sample("x", 0, [[Span("ab", True)]], Letters(), UnitShape(2, 1), 10)
    assert sample.ids.tolist() == [1, 97, 98] and sample.labels.tolist() == [IGNORE, 97, 98]
    assert pairs(sample.view("voco")) == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
    assert np.array_equal(sample.view("voco").positions, [0, 1, 2])
