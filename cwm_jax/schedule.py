"""Durations in any unit, and "is it time?". Called by the loop and by configs' readers."""

from __future__ import annotations

import math
import re

_UNITS = {
  "steps": "steps",
  "examples": "examples",
  "pairs": "examples",
  "epochs": "epochs",
  "seconds": "seconds",
  "minutes": "seconds",
  "min": "seconds",
  "hours": "seconds",
}
_SECONDS = {"minutes": 60.0, "min": 60.0, "hours": 3600.0}


def parse_duration(duration: int | str) -> tuple[float, str]:
  """Splits a duration into an amount and one of `steps`, `examples`, `epochs`, `seconds`.

  Args:
    duration: a bare number (steps) or a string such as "800 epochs", "3e6 examples", "8 minutes",
      "1 hour".

  Raises:
    ValueError: the text is not a number followed by a known unit.
  """
  if isinstance(duration, (int, float)):
    return float(duration), "steps"
  match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", duration)
  unit = (match and match[2]) or "steps"
  # One of a thing has no s.
  unit = unit if unit in _UNITS else f"{unit}s"
  if not match or unit not in _UNITS:
    raise ValueError(
      f"duration {duration!r} is not understood: write a number and one of {', '.join(_UNITS)}"
    )
  return float(match[1]) * _SECONDS.get(unit, 1.0), _UNITS[unit]


def to_steps(duration: int | str, *, batch_size: int, epoch_examples: int | None = None) -> int:
  """Converts a duration to optimizer steps, rounding up.

  Raises:
    ValueError: wall-clock durations have no step count; epochs need `epoch_examples`.
  """
  amount, unit = parse_duration(duration)
  if unit == "seconds":
    raise ValueError(f"{duration!r} is a wall-clock duration and has no fixed number of steps")
  if unit == "epochs":
    if not epoch_examples:
      raise ValueError(f"{duration!r} needs the size of an epoch, and this source is endless")
    amount, unit = amount * epoch_examples, "examples"
  if unit == "examples":
    amount /= batch_size
  return max(0, math.ceil(amount - 1e-9))


def is_due(step: int, every: int, *, last: int | None = None) -> bool:
  """True at every multiple of `every` (never when `every` is 0) and at step `last`."""
  return (every > 0 and step > 0 and step % every == 0) or step == last
