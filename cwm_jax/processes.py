"""The processes of one job: what they agree on, and what each does when another one is lost.

A collective waits for ever for a process that is gone. So each process says in the job's common
store, every few seconds, that it is there, and leaves with one sentence when another has not been
heard of for a while or has said that it failed. JAX's own timeout stands behind this one; where the
process that keeps the store is lost, JAX ends the others by itself, and `supervision` says why.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

from cwm_jax import supervision

log = logging.getLogger(__name__)

_HERE, _FAILED = "cwm_jax/here", "cwm_jax/failed"
_DONE = "done"
_FINAL = (1, 2, 3)  # exit codes: a traceback, something given is of no use, the loss is not finite


def any_process(flag: bool) -> bool:
  """Whether any process raised its flag; all must ask at the same point of the program."""
  return bool(highest(flag)[0])


def highest(*values: float) -> tuple[float, ...]:
  """Each value at its highest in any process (float32); all must ask at the same point."""
  if jax.process_count() == 1:
    return values
  from jax.experimental import multihost_utils

  told = multihost_utils.process_allgather(np.array(values, np.float32))
  return tuple(np.max(told, axis=0).tolist())


def total(count: int) -> int:
  """The sum of all processes' counts; all must ask at the same point."""
  if jax.process_count() == 1:
    return count
  from jax.experimental import multihost_utils

  return int(multihost_utils.process_allgather(np.array(count, np.int32)).sum())


def everyone(value: bytes) -> list[bytes]:
  """One value of every process, in their order; all must ask at the same point.

  Args:
    value: this process's; they may differ in length.
  """
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  lengths = multihost_utils.process_allgather(np.array(len(value), np.int32)).reshape(-1)
  padded = np.zeros(max(1, int(lengths.max())), np.uint8)
  padded[: len(value)] = np.frombuffer(value, np.uint8)
  told = multihost_utils.process_allgather(padded)
  return [row[:length].tobytes() for row, length in zip(told, lengths)]


def of_first_process(value: bytes) -> bytes:
  """What the first process holds, on every process; all must ask at the same point."""
  return everyone(value)[0]


def meet() -> None:
  """Returns once all processes are at this point."""
  any_process(False)


def watch_others(*, lost_after: float) -> Watch:
  """A `Watch` of this job's processes, which `jax.distributed.initialize` has joined."""
  # JAX hands its store out by no public name; Orbax takes it from the same place.
  from jax._src import distributed

  return Watch(
    distributed.global_state.client,
    process=jax.process_index(),
    count=jax.process_count(),
    lost_after=lost_after,
  )


class Watch:
  """A thread that watches the other processes; one in each process, from joining to leaving.

  Args:
    client: the job's store, as JAX keeps it: `key_value_set` and `key_value_dir_get`.
    process, count: this process's number, and how many there are.
    lost_after: seconds without a sign of life after which a process is lost.
  """

  def __init__(self, client: Any, *, process: int, count: int, lost_after: float):
    self.process = process
    self._client, self._count = client, count
    self._lost_after = lost_after
    self._every = lost_after / 10
    self._heard = dict.fromkeys(range(count), ("", time.monotonic()))
    self._asked = time.monotonic()  # when the store last answered
    self._ended = threading.Event()
    self._threads = [
      threading.Thread(target=work, daemon=True) for work in (self._exchange, self._judge)
    ]
    for thread in self._threads:
      thread.start()

  def failed(self, sentence: str, code: int) -> None:
    """Tells the others that this process leaves, with which exit code, and why; they leave too.

    What a new start does not cure (1, 2 and 3) they leave for with the same code, so that the job
    ends whichever process its launcher asks; for anything else, to be started again.
    """
    self._ended.set()
    self._say(_FAILED, f"{code} {sentence}")

  def blame(self) -> None:
    """Waits until a lost process is known, for which this one leaves; returns if none is lost.

    For use where a collective failed: that may be the other end's death, or an error of our own.
    """
    # Beside the silence itself there are a beat, an exchange and a judgement, on a busy machine.
    if self._ended.wait(1.5 * self._lost_after):
      # One of these is about to end the process, and says why; nothing is to be said beside it.
      for thread in self._threads:
        thread.join()

  def close(self) -> None:
    """Ends watching; the others will not miss this process."""
    self._ended.set()
    self._say(_HERE, _DONE)

  def _say(self, place: str, words: str) -> None:
    try:
      self._client.key_value_set(f"{place}/{self.process}", words, allow_overwrite=True)
    # The store itself may be what is gone.
    except Exception as error:
      log.debug("could not tell the others: %s", error)

  def _exchange(self) -> None:
    """Says that this process is there, and notes what the others say."""
    beat = 0
    while not self._ended.wait(self._every):
      beat += 1
      try:
        self._client.key_value_set(f"{_HERE}/{self.process}", str(beat), allow_overwrite=True)
        here = dict(self._client.key_value_dir_get(_HERE))
        failed = dict(self._client.key_value_dir_get(_FAILED))
      # Whatever the store raises, it did not answer; `_judge` decides when that is for good.
      except Exception as error:
        log.debug("the store of the job does not answer: %s", error)
        continue
      self._asked = now = time.monotonic()
      for process in range(self._count):
        said = here.get(f"{_HERE}/{process}", "")
        if said != self._heard[process][0]:
          self._heard[process] = (said, now)
      for key, said in failed.items():
        code, _, sentence = said.partition(" ")
        who = f"process {key.rpartition('/')[2]} of {self._count}"
        final = int(code) in _FINAL
        self._leave(f"{who} left: {sentence}", int(code) if final else supervision.START_AGAIN)

  def _judge(self) -> None:
    """Leaves when a process, or the store, has been silent for too long."""
    while not self._ended.wait(self._every):
      now = time.monotonic()
      if now - self._asked > self._lost_after:
        self._leave_silent(0, now - self._asked)
        continue
      # Silence counts up to the store's last answer: without one, nobody can be heard.
      for process, (said, heard) in self._heard.items():
        if said != _DONE and self._asked - heard > self._lost_after:
          self._leave_silent(process, self._asked - heard)

  def _leave_silent(self, process: int, seconds: float) -> None:
    self._leave(
      f"process {process} of {self._count} has not been heard of for {seconds:.0f} s; leaving, so "
      "that all can be started again: they go on from the last checkpoint",
      supervision.START_AGAIN,
    )

  def _leave(self, sentence: str, code: int) -> None:
    if not self._ended.is_set():
      self._ended.set()
      print(f"error: {sentence}", file=sys.stderr, flush=True)
      # Not `sys.exit`: the main thread hangs in a collective, and JAX would wait for the lost one.
      os._exit(code)
