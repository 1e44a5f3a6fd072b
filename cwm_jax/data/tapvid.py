"""Annotated clips (TAP-Vid's contents) in the folder form, and the questions asked about them.

A clip is a folder with `video/`, its frames as images, and `points.npz`: points_xy float [N, T, 2]
(pixels), occluded bool [N, T], hw [2] (the frames' size the points refer to).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from cwm_jax.data.images import natural_key, read_frames, shown
from cwm_jax.types import InputError

_POINTS, _VIDEO = "points.npz", "video"


class TapVidClip(NamedTuple):
  """One annotated clip.

  name:      of its folder.
  video:     uint8 [T, H, W, 3], RGB.
  points_xy: float32 [N, T, 2], (x, y) pixels, continuous: a pixel's centre is index + 0.5.
             Meaningless where occluded.
  occluded:  bool [N, T].
  """

  name: str
  video: np.ndarray
  points_xy: np.ndarray
  occluded: np.ndarray


class PointQuestions(NamedTuple):
  """Q questions "where is this point of frame `start` in frame `stop`?", in the points' order.

  point: int32 [Q], row of `TapVidClip.points_xy`. start, stop: int32 [Q], frames.
  start_xy: float32 [Q, 2], where the point is in frame `start`.
  """

  point: np.ndarray
  start: np.ndarray
  stop: np.ndarray
  start_xy: np.ndarray


def list_clips(root: str | os.PathLike[str]) -> list[str]:
  """Clip folders: `root` itself, or those directly in it, in natural order.

  Raises:
    InputError: there is none.
  """
  if os.path.isfile(os.path.join(root, _POINTS)):
    return [os.fspath(root)]
  names = sorted(os.listdir(root), key=natural_key) if os.path.isdir(root) else []
  found = [os.path.join(root, n) for n in names if os.path.isfile(os.path.join(root, n, _POINTS))]
  if not found:
    raise InputError(f"{shown(root)} holds no clips (folders with {_POINTS} and {_VIDEO}/)")
  return found


def read_clip(folder: str | os.PathLike[str]) -> TapVidClip:
  """Reads one clip folder.

  Raises:
    InputError: something is missing, damaged, or does not fit together.
  """
  path = os.path.join(folder, _POINTS)
  points_xy, occluded, hw = read_points(path)
  video = read_frames(os.path.join(folder, _VIDEO))
  if video.shape[:3] != (points_xy.shape[1], *hw):
    raise InputError(
      f"{shown(path)} is about {points_xy.shape[1]} frames of {hw[1]}x{hw[0]}, the folder holds "
      f"{video.shape[0]} of {video.shape[2]}x{video.shape[1]}"
    )
  return TapVidClip(os.path.basename(os.path.abspath(folder)), video, points_xy, occluded)


def iter_clips(root: str | os.PathLike[str]) -> Iterator[TapVidClip]:
  """Reads the clips that `list_clips` finds, one at a time. Raises InputError as `read_clip`."""
  for folder in list_clips(root):
    yield read_clip(folder)


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
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {key: file[key] for key in ("points_xy", "occluded", "hw")}
  except KeyError as error:
    raise InputError(f"{name} lacks an array: {error.args[0]}") from error
  # Damaged archives raise errors of zip, zlib and NumPy's own reader; pickles are refused there.
  except Exception as error:
    raise InputError(f"{name} cannot be read as an .npz file of arrays: {error}") from error
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


def queries_first(clip: TapVidClip) -> PointQuestions:
  """From each point's first visible frame to every later frame (protocol First, or VFG).

  Later frames in which the point is occluded are asked about too. Points that are never visible are
  left out.
  """
  frames = clip.occluded.shape[1]
  asked = np.zeros((*clip.occluded.shape, frames), bool)
  for point in np.flatnonzero(~clip.occluded.all(axis=1)):
    start = int(np.argmin(clip.occluded[point]))
    asked[point, start, start + 1 :] = True
  return _questions(clip, *np.nonzero(asked))


def queries_cfg(clip: TapVidClip, *, gap: int = 5) -> PointQuestions:
  """From every frame in which a point is visible to the one `gap` frames later (protocol CFG).

  The later frame must exist; the point may be occluded in it.

  Raises:
    InputError: a gap below 1.
  """
  if gap < 1:
    raise InputError(f"the frame gap is {gap}; it must be 1 or more")
  frames = clip.occluded.shape[1]
  point, start = np.nonzero(~clip.occluded[:, : max(0, frames - gap)])
  return _questions(clip, point, start, start + gap)


def queries_tyx(questions: PointQuestions) -> Float32[np.ndarray, "q 3"]:
  """The (frame, y, x) that a tracker is asked with."""
  start = questions.start.astype(np.float32)[:, None]
  return np.concatenate([start, questions.start_xy[:, ::-1]], axis=1)


def _questions(clip: TapVidClip, point, start, stop) -> PointQuestions:
  index: list[Int32[np.ndarray, " q"]] = [np.asarray(i, np.int32) for i in (point, start, stop)]
  return PointQuestions(*index, clip.points_xy[point, start])
