"""Turning pictures as a video's display matrix says. Called by `video`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, UInt8


def turn_upright(
  image: UInt8[np.ndarray, "h w 3"], matrix: Int32[np.ndarray, " 9"]
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Applies a display matrix, to the nearest multiple of 90 degrees, with mirroring.

  Args:
    image: RGB.
    matrix: (a, b, u, c, d, v, x, y, w): (x, y) is shown at (a x + c y, b x + d y).
  """
  a, b, _, c, d = (int(value) for value in matrix[:5])
  if abs(b) + abs(c) > abs(a) + abs(d):
    image = image.transpose(1, 0, 2)
    flip_x, flip_y = c < 0, b < 0
  else:
    flip_x, flip_y = a < 0, d < 0
  image = image[:, ::-1] if flip_x else image
  return image[::-1] if flip_y else image
