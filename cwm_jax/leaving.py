"""When a run leaves before its end: SIGTERM or `stop_after`, and all its processes together."""

from __future__ import annotations

import signal
import threading
import time

import jax

from cwm_jax import processes

_AGREE_EVERY = 10  # steps between the processes' questions to each other


class Leaving:
  """A context in which SIGTERM is noted instead of obeyed; says when to leave early, and why."""

  def __init__(self):
    self.why = ""
    self._began = time.monotonic()
    self._seconds = self._last_step = float("inf")
    self._signalled = False

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
    late = time.monotonic() - self._began > self._seconds
    if step >= self._last_step or agreed(self._signalled or late, step):
      self.why = "SIGTERM" if self._signalled else "stop_after"
      return True
    return False


def agreed(flag: bool, step: int) -> bool:
  """Whether any process raised its flag; with several processes asked every few steps only."""
  if jax.process_count() == 1:
    return flag
  if step % _AGREE_EVERY:
    return False
  return processes.any_process(flag)
