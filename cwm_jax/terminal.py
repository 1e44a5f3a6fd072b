"""What a person at a terminal sees while work goes on, and what is kept when they end it.

Progress goes to stderr and only where that is a terminal, so that logs and pipes stay clean.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from cwm_jax.progress import format_seconds
from cwm_jax.types import InputError

_Item = TypeVar("_Item")
_EVERY_S = 0.2
_savers: list[Callable[[], str]] = []


def progress(items: Iterable[_Item], *, total: int | None, unit: str) -> Iterator[_Item]:
  """Passes items on and shows how many there were, how fast, and how long the rest will take.

  Args:
    total: how many are expected, or None.
    unit: what they are, in the plural.
  """
  if not sys.stderr.isatty():
    yield from items
    return
  begun, told = time.monotonic(), 0.0
  try:
    for count, item in enumerate(items, start=1):
      yield item
      now = time.monotonic()
      if now - told > _EVERY_S:
        told = now
        _show(progress_line(count, total, now - begun, unit))
  finally:
    _show("")


def progress_line(count: int, total: int | None, seconds: float, unit: str) -> str:
  """Such as "120 of 480 frames, 3.1 a second, 1:56 left"."""
  rate = count / max(seconds, 1e-9)
  known = total is not None and total >= count
  line = f"{count} of {total} {unit}" if known else f"{count} {unit}"
  line += f", {rate:.1f} a second"
  return line + (f", {format_seconds((total - count) / rate)} left" if known else "")


def _show(line: str) -> None:
  sys.stderr.write(f"\r\033[K{line}")
  sys.stderr.flush()


@contextlib.contextmanager
def keeping(save: Callable[[], str]) -> Iterator[threading.Lock]:
  """A block of long work whose finished part is saved when it ends before its time.

  That is at Ctrl-C, whether it raises or ends the process (`save_all`), and at an InputError, such
  as a file that is damaged half-way; its sentence then says what was kept.

  Args:
    save: saves what is finished and says in a clause what that is, or "" where there is nothing.

  Yields:
    A lock that `save` runs under, for a block that saves the same files itself: Ctrl-C, which ends
    the process as soon as it has saved, then waits for that.
  """
  saving = threading.Lock()

  def save_alone() -> str:
    with saving:
      return save()

  _savers.append(save_alone)
  try:
    yield saving
  except InputError as error:
    kept = save_alone()
    if not kept:
      raise
    raise InputError(f"{error}; {kept}") from error
  except KeyboardInterrupt:
    save_all()
    raise
  finally:
    if save_alone in _savers:
      _savers.remove(save_alone)


def save_all() -> None:
  """Saves all work that is under way, once, and says on stderr what that was."""
  while _savers:
    try:
      kept = _savers.pop()()
    except InputError as error:
      kept = str(error)
    if kept:
      # From here on the process may end at once, so nothing is left in a buffer.
      print(f"\n{kept}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_shown() -> Iterator[None]:
  """A block in which the package's own log lines go to stderr, if that is a terminal."""
  logger = logging.getLogger("cwm_jax")
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
  level = logger.level
  if sys.stderr.isatty():
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
  try:
    yield
  finally:
    logger.removeHandler(handler)
    logger.setLevel(level)
