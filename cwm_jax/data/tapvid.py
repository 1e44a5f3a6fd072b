"""Annotated clips, TAP-Vid's contents, in the folder form; the pickles are in `tapvid_pickles`.

A clip is a folder with `video/`, its frames as images, and `points.npz`: points_xy float [N, T, 2]
(pixels), occluded bool [N, T], hw [2] (the frames' size the points refer to).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from cwm_jax.data import npz
from cwm_jax.data.images import natural_key, read_frames, shown
from cwm_jax.types import InputError

POINTS, VIDEO = "points.npz", "video"


class TapVidClip(NamedTuple):
  """One annotated clip.

  name:      of its folder, or what the set calls it.
  video:     uint8 [T, H, W, 3], RGB.
  points_xy: float32 [N, T, 2], (x, y) pixels, continuous: a pixel's centre is index + 0.5.
             Meaningless where occluded.
  occluded:  bool [N, T].
  """

  name: str
  video: np.ndarray
  points_xy: np.ndarray
  occluded: np.ndarray


class ClipSource(ABC):
  """A set of clips that are read one at a time.

  names: one a clip, all different; fit for file names.
  """

  names: Sequence[str]

  @abstractmethod
  def read(self, index: int) -> TapVidClip:
    """The clip called `names[index]`. Raises InputError where it is broken; the others are not."""


class ClipFolders(ClipSource):
  """The clips that `list_clips` finds."""

  def __init__(self, root: str | os.PathLike[str]):
    self._folders = list_clips(root)
    self.names = [os.path.basename(os.path.abspath(folder)) for folder in self._folders]

  def read(self, index: int) -> TapVidClip:
    return read_clip(self._folders[index])


def list_clips(root: str | os.PathLike[str]) -> list[str]:
  """Clip folders: `root` itself, or those directly in it, in natural order.

  Raises:
    InputError: there is none.
  """
  if os.path.isfile(os.path.join(root, POINTS)):
    return [os.fspath(root)]
  names = sorted(os.listdir(root), key=natural_key) if os.path.isdir(root) else []
  found = [os.path.join(root, n) for n in names if os.path.isfile(os.path.join(root, n, POINTS))]
  if not found:
    raise InputError(f"{shown(root)} holds no clips (folders with {POINTS} and {VIDEO}/)")
  return found


def read_clip(folder: str | os.PathLike[str]) -> TapVidClip:
  """Reads one clip folder.

  Raises:
    InputError: something is missing, damaged, or does not fit together.
  """
  path = os.path.join(folder, POINTS)
  points_xy, occluded, hw = read_points(path)
  video = read_frames(os.path.join(folder, VIDEO))
  if video.shape[:3] != (points_xy.shape[1], *hw):
    raise InputError(
      f"{shown(path)} is about {points_xy.shape[1]} frames of {hw[1]}x{hw[0]}, the folder holds "
      f"{video.shape[0]} of {video.shape[2]}x{video.shape[1]}"
    )
  return TapVidClip(os.path.basename(os.path.abspath(folder)), video, points_xy, occluded)


def read_points(
  path: str | os.PathLike[str],
) -> tuple[Float32[np.ndarray, "n t 2"], Bool[np.ndarray, "n t"], tuple[int, int]]:
  """Reads a `points.npz`: points_xy, occluded, (height, width). Never unpickles.

  Raises:
    InputError: missing, damaged, without one of its arrays, or of wrong shapes or types.
  """
  name = shown(path)
  if not os.path.isfile(path):
    raise InputError(f"{name} does not exist; it should hold points_xy, occluded and hw")
  arrays = npz.load_arrays(path, ("points_xy", "occluded", "hw"))
  points_xy, occluded, hw = arrays.values()
  fits = (
    points_xy.ndim == 3
    and points_xy.shape[-1] == 2
    and points_xy.dtype.kind in "fiu"
    and occluded.shape == points_xy.shape[:2]
    and occluded.dtype == np.bool_
    and hw.shape == (2,)
    and hw.dtype.kind in "iu"
  )
  if not fits:
    found = ", ".join(f"{key} {a.dtype} {list(a.shape)}" for key, a in arrays.items())
    raise InputError(
      f"{name} should hold points_xy float [N, T, 2], occluded bool [N, T] and hw int [2]; "
      f"it holds {found}"
    )
  if not np.all(np.isfinite(points_xy[~occluded])):
    raise InputError(f"{name} has visible points without a finite place")
  return points_xy.astype(np.float32), occluded, (int(hw[0]), int(hw[1]))
