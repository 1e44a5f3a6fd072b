"""Turning pictures as a video's display matrix says. Called by `video`."""

from __future__ import annotations

import numpy as np


def turn_upright(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Applies a display matrix, to the nearest multiple of 90 degrees, with mirroring.

  Args:
    image: [H, W, 3].
    matrix: int32 [9], (a, b, u, c, d, v, x, y, w): (x, y) is shown at (a x + c y, b x + d y).
  """
  a, b, _, c, d = (int(value) for value in matrix[:5])
  if abs(b) + abs(c) > abs(a) + abs(d):
    image = image.transpose(1, 0, 2)
    flip_x, flip_y = c < 0, b < 0
  else:
    flip_x, flip_y = a < 0, d < 0
  image = image[:, ::-1] if flip_x else image
  return image[::-1] if flip_y else image
