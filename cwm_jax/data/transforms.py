"""Crop, resize and mirror a clip, all its frames alike, points together with the pixels.

Points are continuous (x, y), the image's corner at (0, 0), a pixel's centre at index + 0.5. A
resize maps corners onto corners (half-pixel centres, torch's `align_corners=False`) and, when it
shrinks, averages over the pixels that are dropped (a triangle filter that widens with the factor).
NumPy and Pillow only: this runs in loader workers, which never start a JAX backend.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cwm_jax.types import InputError


class View(NamedTuple):
  """A part of an image and what is made of it.

  box: (left, top, right, bottom), pixels of the source, continuous. flip: mirrored left to right.
  size_hw: pixels of the result.
  """

  box: tuple[float, float, float, float]
  flip: bool
  size_hw: tuple[int, int]


def draw_view(
  rng: np.random.Generator | None,
  source_hw: tuple[int, int],
  size_hw: tuple[int, int],
  *,
  crop: str = "random",
  flip: bool = False,
) -> View:
  """Chooses the largest box of the result's aspect, at random or in the middle, and mirroring.

  Args:
    rng: draws place and mirroring; may be None for a centre crop without flips.
    crop: "random" (place along the longer side), "centre", or "none" (the whole frame, squeezed).
    flip: mirror with probability 1/2.

  Raises:
    InputError: an unknown `crop`.
  """
  height, width = source_hw
  if crop not in ("random", "centre", "none"):
    raise InputError(f"crop {crop!r} is not known; choose random, centre or none")
  box_h, box_w = float(height), float(width)
  if crop != "none":
    aspect = size_hw[1] / size_hw[0]
    box_h, box_w = min(height, width / aspect), min(width, height * aspect)
  across, down = rng.random(2) if crop == "random" else (0.5, 0.5)
  left, top = across * (width - box_w), down * (height - box_h)
  mirrored = bool(flip and rng.random() < 0.5)
  return View((left, top, left + box_w, top + box_h), mirrored, tuple(size_hw))


def apply_view(frames: UInt8[np.ndarray, "t h w 3"], view: View) -> UInt8[np.ndarray, "t h2 w2 3"]:
  """Crops, resizes and mirrors every frame in the same way."""
  height, width = view.size_hw
  out = np.empty((len(frames), height, width, 3), np.uint8)
  for frame, target in zip(frames, out):
    if view.box == (0.0, 0.0, frame.shape[1], frame.shape[0]) and frame.shape[:2] == view.size_hw:
      resized = frame
    else:
      image = Image.fromarray(np.ascontiguousarray(frame))
      resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=view.box))
    target[:] = resized[:, ::-1] if view.flip else resized
  return out


def to_view(points_xy: Float[np.ndarray, "*n 2"], view: View) -> Float[np.ndarray, "*n 2"]:
  """Moves (x, y) of the source image to (x, y) of the view."""
  left, top, right, bottom = view.box
  height, width = view.size_hw
  moved = (points_xy - (left, top)) * (width / (right - left), height / (bottom - top))
  if view.flip:
    moved = np.stack([width - moved[..., 0], moved[..., 1]], axis=-1)
  return moved.astype(points_xy.dtype)


def from_view(points_xy: Float[np.ndarray, "*n 2"], view: View) -> Float[np.ndarray, "*n 2"]:
  """Moves (x, y) of the view back to (x, y) of the source image; undoes `to_view`."""
  left, top, right, bottom = view.box
  height, width = view.size_hw
  if view.flip:
    points_xy = np.stack([width - points_xy[..., 0], points_xy[..., 1]], axis=-1)
  moved = points_xy * ((right - left) / width, (bottom - top) / height) + (left, top)
  return moved.astype(points_xy.dtype)
