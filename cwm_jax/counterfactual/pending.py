"""What an engine hands back before the device is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
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


def begin(parts: Iterable[tuple[np.ndarray, PointFlow]], count: int) -> Pending:
  """Takes each part as it is put to the device, and has its answers copied once they are there.

  So the copy of one question runs while the next one is put, and `fetch` only waits for its end.
  """
  taken = []
  for where, answer in parts:
    jax.tree.map(lambda leaf: leaf.copy_to_host_async(), answer)
    taken.append((where, answer))
  return Pending(taken, count)
