"""Questions of what moves along with a point, of random pictures."""

from __future__ import annotations

import numpy as np

from cwm_jax.evals import segments


def make(count: int) -> list[segments.SegmentQuestion]:
  """`count` questions, the same ones each time."""
  rng = np.random.default_rng(0)
  return [
    segments.SegmentQuestion(
      rng.integers(0, 256, (24, 32, 3)), rng.uniform(0, 24, 2), rng.random((24, 32)) > 0.6
    )
    for _ in range(count)
  ]
