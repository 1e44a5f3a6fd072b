"""From decoded frames to pictures: RGB, on black, turned as a video's display matrix says."""

from __future__ import annotations

import functools

import av
import numpy as np
from jaxtyping import Int32, UInt8

from cwm_jax.data.images import on_black


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


def upright(frame: av.VideoFrame) -> np.ndarray:
  """A decoded frame as RGB on black, turned and mirrored as its display matrix says."""
  return turned(frame, display_matrix(frame))


def display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
  """How a frame is to be turned, as `turn_upright` takes it; None where it is upright.

  To ask makes the frame part of a cycle, which is freed late: ask one frame of a stream only.
  """
  try:
    matrix = frame.side_data.get("DISPLAYMATRIX")
  except ValueError:
    # PyAV lists all that comes with a frame or nothing, and stumbles over kinds that are newer than
    # itself, such as EXIF. The angle it tells all the same; of mirroring nothing is known then.
    return _rotation_matrix(frame.rotation)
  return None if matrix is None else np.frombuffer(matrix, np.int32).copy()


def _rotation_matrix(degrees: int) -> np.ndarray | None:
  """The display matrix of a counterclockwise turn; None for none."""
  if not degrees:
    return None
  cos, sin = (round(f(np.deg2rad(degrees)) * 2**16) for f in (np.cos, np.sin))
  return np.array([cos, -sin, 0, sin, cos, 0, 0, 0, 2**30], np.int32)


def turned(frame: av.VideoFrame, matrix: np.ndarray | None) -> np.ndarray:
  """A decoded frame as RGB on black, turned as a display matrix says."""
  if _has_alpha(frame.format.name):
    image = on_black(frame.to_ndarray(format="rgba"))
  else:
    image = frame.to_ndarray(format="rgb24")
  return image if matrix is None else turn_upright(image, matrix)


@functools.cache
def _has_alpha(pixel_format: str) -> bool:
  return any(component.is_alpha for component in av.VideoFormat(pixel_format).components)
