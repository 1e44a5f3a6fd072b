"""The questions that TAP-Vid's protocols ask about an annotated clip, and the size it is seen at.

A question is a point, the frame in which the tracker is shown it, and the frames in which the
answer is compared with the truth.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from cwm_jax import geometry
from cwm_jax.data.tapvid import TapVidClip
from cwm_jax.types import InputError

NATIVE, NEAREST_16 = "native", "nearest_16"
_FRAMES_AT_ONCE = 16  # resized together; bounds the memory that a long clip takes


class Questions(NamedTuple):
  """Q questions "the point of frame `start`: where is it in each of K frames?".

  point:  int32 [Q], row of `TapVidClip.points_xy`.
  start:  int32 [Q], the frame in which the tracker is shown the point.
  frames: int32 [Q, K], the frames asked about; `start` is among them.
  """

  point: np.ndarray
  start: np.ndarray
  frames: np.ndarray


def queries_first(clip: TapVidClip) -> Questions:
  """Each point from its first visible frame, about all frames (protocol First, or VFG).

  Points that are never visible are left out. What lies before the first visible frame is not
  measured.
  """
  point = np.flatnonzero(~clip.occluded.all(axis=1))
  return _whole(clip, point, np.argmin(clip.occluded[point], axis=1))


def queries_strided(clip: TapVidClip, *, stride: int = 5) -> Questions:
  """Each point from every `stride`-th frame in which it is visible, about all frames.

  Raises:
    InputError: a stride below 1.
  """
  if stride < 1:
    raise InputError(f"the stride of the queries is {stride} frames; it must be 1 or more")
  step, point = np.nonzero(~clip.occluded[:, ::stride].T)
  return _whole(clip, point, step * stride)


def queries_cfg(clip: TapVidClip, *, gap: int = 5) -> Questions:
  """From every frame in which a point is visible, about it and the one `gap` later (protocol CFG).

  The later frame must exist; the point may be occluded in it.

  Raises:
    InputError: a gap below 1.
  """
  if gap < 1:
    raise InputError(f"the frame gap is {gap}; it must be 1 or more")
  point, start = np.nonzero(~clip.occluded[:, : max(0, clip.occluded.shape[1] - gap)])
  return _questions(point, start, start[:, None] + np.array([0, gap]))


def queries_tyx(
  clip: TapVidClip, questions: Questions, *, whole_pixels: bool = False
) -> Float32[np.ndarray, "q 3"]:
  """The (frame, y, x) that a tracker is asked with.

  Annotations just outside the frame are moved onto its border, where a tracker takes them.

  Args:
    whole_pixels: ask about the centre of the pixel that holds the point.
  """
  size_hw = clip.video.shape[1:3]
  points_xy = clip.points_xy[questions.point, questions.start]
  if whole_pixels:
    points_xy = np.clip(np.floor(points_xy), 0, np.array(size_hw[::-1]) - 1) + 0.5
  inside_xy = np.clip(points_xy, 0.0, np.array(size_hw[::-1], np.float32))
  return np.column_stack([questions.start, inside_xy[:, ::-1]]).astype(np.float32)


def resolution_hw(resolution: str, size_hw: tuple[int, int]) -> tuple[int, int]:
  """The size that a clip of `size_hw` is seen at.

  Args:
    resolution: "native"; "nearest_16" (each side down to a multiple of 16); or "HEIGHTxWIDTH".

  Raises:
    InputError: anything else, or a clip too small for it.
  """
  h, w = size_hw
  if resolution == NATIVE:
    return h, w
  if resolution == NEAREST_16:
    if min(h, w) < 16:
      raise InputError(f"frames of {w} x {h} have no multiple of 16 pixels on each side")
    return h // 16 * 16, w // 16 * 16
  fixed = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", resolution)
  if not fixed:
    raise InputError(
      f"the resolution is {resolution!r}; choose {NATIVE}, {NEAREST_16}, or HEIGHTxWIDTH"
    )
  return int(fixed[1]), int(fixed[2])


def at_resolution(clip: TapVidClip, resolution: str) -> TapVidClip:
  """The clip as a tracker sees it: frames resized (see `resize_video`), points moved along.

  Frames are rounded to whole grey levels, as trackers take them. The public evaluation resizes
  normalised floats: where sizes differ, its trackers see values up to half a level away.

  Raises:
    InputError: see `resolution_hw`.
  """
  from_hw = clip.video.shape[1:3]
  to_hw = resolution_hw(resolution, from_hw)
  if to_hw == from_hw:
    return clip
  return clip._replace(
    video=np.round(resize_video(clip.video, to_hw)).astype(np.uint8),
    points_xy=clip.points_xy * np.divide(to_hw, from_hw)[::-1].astype(np.float32),
  )


def resize_video(
  video: UInt8[np.ndarray, "t h w 3"], size_hw: tuple[int, int]
) -> Float32[np.ndarray, "t h2 w2 3"]:
  """Frames resized as the public evaluation does it: bilinear, no averaging; still 0 to 255."""
  parts = [
    geometry.resize_on_host(video[first : first + _FRAMES_AT_ONCE], size_hw)
    for first in range(0, len(video), _FRAMES_AT_ONCE)
  ]
  return np.concatenate(parts)


def _whole(clip: TapVidClip, point: np.ndarray, start: np.ndarray) -> Questions:
  """Questions about every frame."""
  frames = np.arange(clip.occluded.shape[1])
  return _questions(point, start, np.broadcast_to(frames, (len(point), len(frames))))


def _questions(point: np.ndarray, start: np.ndarray, frames: np.ndarray) -> Questions:
  return Questions(*(np.ascontiguousarray(part, np.int32) for part in (point, start, frames)))
