"""The frames that the viewer shows: a part of a clip, held in memory, or the rendered demo clip."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cwm_jax import demo, inputs, viz
from cwm_jax.types import InputError, Tracks

_LONGEST = 960  # longer side of the frames that are kept, pixels
_BYTES = 2**28  # of all frames together
_UNKNOWN = 240  # frames to expect of a clip that does not say how many it has

Truth = Callable[[int, np.ndarray], Tracks]


class Footage(NamedTuple):
  """What the viewer shows.

  name:    for the page's title.
  frames:  uint8 [T, h, w, 3]; smaller than the clip's where that would take too much memory.
  size_hw: pixels of the clip as given, in which points are told.
  first:   the clip's index of frame 0.
  fps:     frames a second.
  truth:   (frame, points_xy [N, 2] in pixels as given) -> their true Tracks, or None if unknown.
  """

  name: str
  frames: np.ndarray
  size_hw: tuple[int, int]
  first: int
  fps: float
  truth: Truth | None

  def to_frames(self, point_xy: np.ndarray) -> np.ndarray:
    """A point (x, y) of the clip in pixels of `frames`."""
    return (np.asarray(point_xy) * self._scale()).astype(np.float32)

  def to_clip(self, point_xy: np.ndarray) -> np.ndarray:
    """A point (x, y) of `frames` in pixels of the clip."""
    return (np.asarray(point_xy) / self._scale()).astype(np.float32)

  def _scale(self) -> np.ndarray:
    return np.array(self.frames.shape[2:0:-1]) / np.array(self.size_hw[::-1])


def read(path: str, *, start: int, count: int) -> Footage:
  """At most `count` frames of a video or of a folder of frames, from frame `start` on.

  Raises:
    InputError: no video, or fewer than two frames from there on.
  """
  clip = inputs.open_clip(path)
  expected = _UNKNOWN if clip.length is None else max(2, clip.length - start)
  expected = min(count, expected)
  size_hw = kept_size(clip.size_hw, expected)
  frames: list[np.ndarray] = []
  for frame in itertools.islice(clip.frames(), start, start + count):
    if len(frames) == expected:  # a file may hold more than it claims
      expected = min(count, 2 * expected)
      size_hw = kept_size(clip.size_hw, expected)
      frames = [viz.resized(kept, size_hw) for kept in frames]
    frames.append(viz.resized(frame, size_hw))
  if len(frames) < 2:
    where = f" from frame {start} on" if start else ""
    raise InputError(f"{path} has {len(frames)} frames{where}; motion needs two or more")
  return Footage(clip.name, np.stack(frames), clip.size_hw, start, clip.fps, None)


def kept_size(size_hw: tuple[int, int], count: int) -> tuple[int, int]:
  """The size (height, width) at which so many frames of a clip are kept."""
  h, w = size_hw
  factor = min(1.0, _LONGEST / max(h, w), (_BYTES / (3 * h * w * count)) ** 0.5)
  return max(1, int(h * factor)), max(1, int(w * factor))


def rendered() -> Footage:
  """The demo's clip, whose truth is known."""
  from cwm_jax.data import rendering

  scene, frames = demo.rendered_scene()
  size_hw = frames.shape[1:3]

  def truth(t: int, points_xy: np.ndarray) -> Tracks:
    traced = rendering.trace(scene, t, np.asarray(points_xy, np.float32), size_hw=size_hw)
    return Tracks(*(np.asarray(values) for values in traced))

  return Footage("rendered clip", frames, size_hw, 0, demo.FPS, truth)
