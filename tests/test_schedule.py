"""Durations in any unit."""

import pytest

from cwm_jax import schedule


@pytest.mark.parametrize(
  ("duration", "steps"),
  [(10, 10), ("10", 10), ("7 steps", 7), ("100 examples", 4), ("1e3 pairs", 32), ("2 epochs", 20)],
)
def test_durations_become_steps_rounded_up(duration, steps):
  assert schedule.to_steps(duration, batch_size=32, epoch_examples=320) == steps


def test_wall_clock_durations_are_seconds():
  assert schedule.parse_duration("8 minutes") == (480.0, "seconds")
  assert schedule.parse_duration("1.5 hours") == (5400.0, "seconds")


@pytest.mark.parametrize(
  "duration, amount, unit",
  [
    ("1 second", 1.0, "seconds"),
    ("1 minute", 60.0, "seconds"),
    ("1 hour", 3600.0, "seconds"),
    ("1 step", 1.0, "steps"),
    ("1 epoch", 1.0, "epochs"),
    ("1 example", 1.0, "examples"),
    ("1 pair", 1.0, "examples"),
  ],
)
def test_one_of_a_unit_may_be_written_without_its_s(duration, amount, unit):
  assert schedule.parse_duration(duration) == (amount, unit)


@pytest.mark.parametrize(
  "duration", ["", "ten steps", "3 fortnights", "1 s", "-4 steps", "1.2.3 steps"]
)
def test_nonsense_is_refused_with_the_known_units(duration):
  with pytest.raises(ValueError, match="epochs"):
    schedule.parse_duration(duration)


def test_an_endless_source_has_no_epochs_and_minutes_are_not_steps():
  with pytest.raises(ValueError, match="endless"):
    schedule.to_steps("3 epochs", batch_size=8)
  with pytest.raises(ValueError, match="wall-clock"):
    schedule.to_steps("3 minutes", batch_size=8)


def test_something_is_due_at_multiples_and_at_the_last_step_but_not_at_zero():
  due = [step for step in range(8) if schedule.is_due(step, 3, last=7)]
  assert due == [3, 6, 7]
  assert not any(schedule.is_due(step, 0) for step in range(8))
