"""Tests of what is due after a step, for every combination of intervals, stops and times."""

from hypothesis import given
from hypothesis import strategies as st

from vocojax.training.config import CheckpointConfig
from vocojax.training.schedule import Due, Schedule

EVERY = st.integers(1, 7)
MAYBE = st.integers(0, 7)


@given(st.integers(1, 40), EVERY, MAYBE, EVERY, MAYBE)
def test_everything_is_due_at_its_multiples_and_at_the_end(steps, log_every, validate_every, every, keep_every):
    schedule = Schedule(steps, log_every, validate_every, CheckpointConfig(every, 0.0, keep_every=keep_every))
    for step in range(1, steps + 1):
        last, multiples = step == steps, {n for n in (every, keep_every) if n and step % n == 0}
        assert schedule.validates(step, False) == bool(validate_every and (last or step % validate_every == 0))
        assert schedule.after(step, False) == Due(step % log_every == 0, bool(multiples) or last, last)


@given(st.integers(1, 40), st.data(), EVERY, MAYBE, EVERY)
def test_a_stop_saves_and_leaves_out_every_validation_but_the_last(steps, data, log_every, validate_every, every):
    step = data.draw(st.integers(1, steps))
    schedule = Schedule(steps, log_every, validate_every, CheckpointConfig(every))
    assert schedule.validates(step, True) == (validate_every > 0 and step == steps)
    assert schedule.after(step, True) == Due(step % log_every == 0, True, True)


def test_a_checkpoint_by_time_is_due_where_metrics_are_logged():
    """And counts from the last one, whatever that was due to."""
    now = [0.0]
    schedule = Schedule(1000, 2, 0, CheckpointConfig(every=100, minutes=2.0), clock=lambda: now[0])
    saved = []
    for step, now[0] in enumerate((60.0, 119.0, 121.0, 122.0, 123.0, 241.9, 242.0, 242.0), start=1):
        saved.append(schedule.after(step, False).save)
    assert saved == [False, False, False, True, False, False, False, True]
    now[0] = 361.0
    assert schedule.after(100, False).save
    now[0] = 480.0
    assert not schedule.after(102, False).save


def test_no_minutes_is_no_checkpoint_by_time():
    now = [0.0]
    schedule = Schedule(1000, 1, 0, CheckpointConfig(every=100, minutes=0.0), clock=lambda: now[0])
    now[0] = 1e9
    assert not schedule.after(1, False).save
