"""When a run leaves before its end: SIGTERM or `stop_after`, and all its processes together."""

from __future__ import annotations

import signal
import threading
import time

import jax

from cwm_jax import processes

# Between the processes' questions to each other: seconds, a small part of the time that a cluster
# gives between SIGTERM and the end, and steps, a question being nothing beside so many of them.
_ASK_EVERY_S, _ASK_EVERY_STEPS = 10.0, 10
_LATE, _SIGNALLED = 1.0, 2.0  # what a process raises; the highest one is heard


class Leaving:
  """A context in which SIGTERM is noted instead of obeyed; says when to leave early, and why."""

  def __init__(self):
    self.why = ""
    self.told = False  # whether SIGTERM, to whichever process, is why; the same in every process
    self._began = time.monotonic()
    self._seconds = self._last_step = float("inf")
    self._signalled = False
    self._asked: tuple[int, float] | None = None  # the last question's step, and when it was
    self._ask_at = 0  # the next one's step; the same in every process

  def __enter__(self) -> Leaving:
    # Only the main thread may set handlers; a run in another one is stopped by other means.
    self._handles = threading.current_thread() is threading.main_thread()
    if self._handles:
      self._previous = signal.signal(signal.SIGTERM, self._hear)
    return self

  def __exit__(self, *_) -> None:
    if self._handles:
      signal.signal(signal.SIGTERM, self._previous)

  def _hear(self, *_) -> None:
    self._signalled = True

  @property
  def signalled(self) -> bool:
    """Whether SIGTERM reached this process; of the others it says nothing."""
    return self._signalled

  def limit(self, *, seconds: float = float("inf"), step: float = float("inf")) -> None:
    """Leave after `seconds` since the context was made, or at `step`."""
    self._seconds, self._last_step = seconds, step

  def now(self, step: int) -> bool:
    """Whether to leave at this step; the same answer in every process."""
    if step >= self._last_step:
      self.why = "stop_after"
      return True
    late = time.monotonic() - self._began > self._seconds
    mine = _SIGNALLED if self._signalled else _LATE * late
    raised = self._highest(mine, step)
    if not raised:
      return False
    self.told = raised == _SIGNALLED
    self.why = {0.0: "another process leaves", _LATE: "stop_after", _SIGNALLED: "SIGTERM"}[mine]
    return True

  def agreed(self, flag: bool, step: int) -> bool:
    """Whether any process raised its flag; all must ask at the same steps."""
    return bool(self._highest(float(flag), step))

  def _highest(self, value: float, step: int) -> float:
    """The highest value of any process, or 0 between two questions.

    A question waits for the slowest process. Several processes therefore ask only every few steps,
    or at every step where steps are slow. Which steps these are follows from what all were told at
    the last one, never from a clock of their own.
    """
    if jax.process_count() == 1:
      return value
    # What came before the first question says nothing of how long a step takes.
    last, when = self._asked or (step, self._began)
    if last < step < self._ask_at:
      return 0.0
    now = time.monotonic()
    raised, seconds = processes.highest(value, now - when)
    if last < step or self._asked is None:
      steps = int(_ASK_EVERY_S * (step - last) / max(seconds, 1e-6))
      self._asked, self._ask_at = (step, now), step + min(max(steps, 1), _ASK_EVERY_STEPS)
    return raised
