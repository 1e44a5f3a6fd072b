"""Several processes leave at the same step, soon after one of them was told to."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from cwm_jax import leaving

COUNT = 2


class Job:
  """Processes played by threads, each with a clock of its own; a question waits for all of them."""

  def __init__(self, monkeypatch):
    self._mine = threading.local()
    # A process that asks where another does not breaks it, as it would wait for ever in a job.
    self._meeting = threading.Barrier(COUNT, timeout=20)
    self._told: dict[int, tuple[float, ...]] = {}
    monkeypatch.setattr(leaving.jax, "process_count", lambda: COUNT)
    monkeypatch.setattr(leaving, "time", SimpleNamespace(monotonic=lambda: self._mine.clock))
    monkeypatch.setattr(leaving.processes, "highest", self._highest)

  def _highest(self, *values):
    self._told[self._mine.process] = values
    self._meeting.wait()
    told = tuple(max(column) for column in zip(*self._told.values(), strict=True))
    self._meeting.wait()
    self._mine.questions += 1
    return told

  def run(self, pace, told_at=None, late_after=float("inf")):
    """Steps that last `pace(process, step)` seconds; process 1 is told to leave at a step, or late.

    Returns:
      Of each process (the step at which it left, those at which it saved, its questions, whether
      the job was told to leave).
    """

    def work(process):
      self._mine.process, self._mine.clock, self._mine.questions = process, 100.0 * process, 0
      leave, saved = leaving.Leaving(), []
      if process == 1:
        leave.limit(seconds=late_after)
      self._mine.clock += 60.0  # until the first step
      for step in range(200):
        if process == 1 and step == told_at:
          leave._hear()
        if leave.now(step):
          return step, saved, self._mine.questions, leave.told
        # Only process 1 finds its last save old, and that from time to time.
        if leave.agreed(process == 1 and step % 3 == 0, step):
          saved.append(step)
        self._mine.clock += pace(process, step)
      return None

    with ThreadPoolExecutor(COUNT) as threads:
      return list(threads.map(work, range(COUNT)))


@pytest.mark.parametrize(
  "pace, told_at, left_at, questions",
  [
    # Quick steps: a question in ten, and one more about saving.
    (lambda process, step: 0.01 + 0.02 * process, 115, 121, 27),
    # Slow ones, were it in one process only: at each step.
    (lambda process, step: (0.01, 30.0)[process], 23, 23, 47),
    (lambda process, step: (12.0, 0.01)[process], 21, 21, 43),
    # Between: in no more than ten seconds.
    (lambda process, step: 2.5, 19, 21, None),
    # Quick at first and slow from some step on.
    (lambda process, step: 0.01 if step < 95 else 15.0, 103, 103, None),
  ],
)
def test_all_leave_and_save_at_the_same_steps_soon_after_one_is_told(
  monkeypatch, pace, told_at, left_at, questions
):
  one, other = Job(monkeypatch).run(pace, told_at)
  assert one == other
  left, saved, asked, told = one
  assert left == left_at and told
  assert saved and all(step % 3 == 0 for step in saved)
  assert questions in (None, asked)


def test_a_process_whose_time_is_over_has_all_leave_who_were_not_told_to(monkeypatch):
  one, other = Job(monkeypatch).run(lambda process, step: 1.0, late_after=90.0)
  assert one == other
  left, *_, told = one
  assert 30 < left <= 41 and not told


def test_one_process_needs_no_question_and_leaves_at_once():
  leave = leaving.Leaving()
  assert not leave.now(7)
  assert leave.agreed(True, 8)
  leave._hear()
  assert leave.now(9) and leave.told and leave.why == "SIGTERM"


def test_a_last_step_is_no_signal():
  leave = leaving.Leaving()
  leave.limit(step=9)
  assert not leave.now(8)
  assert leave.now(9) and not leave.told and leave.why == "stop_after"
