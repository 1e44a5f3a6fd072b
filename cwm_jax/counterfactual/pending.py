"""What an engine hands back before the device is done."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cwm_jax.types import PointFlow


class Passes(NamedTuple):
  """Passes of the predictor; padding and skipped steps do not count."""

  marked: int
  clean: int


class Pending(NamedTuple):
  """Answers that the device may still be working on.

  parts: (positions in the result, padded PointFlow on the device) of each group of points.
  count: how many points were asked about.
  """

  parts: list[tuple[np.ndarray, PointFlow]]
  count: int

  def fetch(self) -> PointFlow:
    """Waits, and returns NumPy arrays: xy [n, 2], visible [n], confidence [n]."""
    out = PointFlow(
      np.zeros((self.count, 2), np.float32),
      np.zeros(self.count, bool),
      np.zeros(self.count, np.float32),
    )
    for where, part in self.parts:
      for mine, theirs in zip(out, part):
        mine[where] = np.asarray(theirs)[: len(where)]
    return out
