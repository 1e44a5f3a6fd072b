"""What the command line is given: clips, points, output folders; each checked before any work."""

from __future__ import annotations

import contextlib
import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cwm_jax import whole_files, workdirs
from cwm_jax.data import flowfiles, images, video
from cwm_jax.types import InputError

_FOLDER_FPS = 12.0  # a folder of frames has no rate of its own


class Reading(NamedTuple):
  """How motion is to be read: the options that every command which reads it has.

  weights: file, or None for the shipped one.
  mark:    file of a learned one, or None for the one that the weights recommend.
  masks:   how many are averaged, or "adaptive".
  readout: as in `Tracker.load`.
  seed:    of the masks.
  """

  weights: str | None
  mark: str | None
  masks: int | str
  readout: str
  seed: int


class Clip(NamedTuple):
  """A video that can be read more than once.

  name:    for titles; can be printed, whatever bytes the file's own has.
  size_hw: pixels.
  fps:     mean frames a second.
  length:  how many frames to expect, or None; damaged files hold fewer than they claim.
  timed:   starts reading: an iterator of (time in seconds, uint8 [H, W, 3]).
  """

  name: str
  size_hw: tuple[int, int]
  fps: float
  length: int | None
  timed: Callable[[], Iterator[tuple[float, np.ndarray]]]

  def frames(self) -> Iterator[np.ndarray]:
    """Starts reading: the frames alone."""
    return (frame for _, frame in self.timed())


def open_clip(path: str) -> Clip:
  """Opens a video file or a folder of frames.

  Raises:
    InputError: nothing that can be read as a video.
  """
  if not os.path.isdir(path):
    info = video.probe(path)
    return Clip(
      images.shown(Path(path).name),
      (info.height, info.width),
      info.fps or _FOLDER_FPS,
      round(info.duration_s * info.fps) or None,
      lambda: _read_video(path),
    )
  paths = images.list_images(path)
  if not paths:
    raise InputError(f"the folder {images.shown(path)} holds no images")
  size_hw = images.read_image(paths[0]).shape[:2]
  name = images.shown(Path(path).resolve().name)
  return Clip(name, size_hw, _FOLDER_FPS, len(paths), lambda: _read_folder(paths))


def _read_video(path: str) -> Iterator[tuple[float, np.ndarray]]:
  with video.VideoFile(path, thread_type="AUTO") as opened:
    yield from opened.timed()


def _read_folder(paths: list[str]) -> Iterator[tuple[float, np.ndarray]]:
  """The images one by one; InputError at the first that is not of the first one's size."""
  first = None
  for count, path in enumerate(paths):
    frame = images.read_image(path)
    first = frame.shape if first is None else first
    if frame.shape != first:
      raise InputError(
        f"{images.shown(path)} is {frame.shape[1]} x {frame.shape[0]}, the frames before it "
        f"{first[1]} x {first[0]}; frames need one size"
      )
    yield count / _FOLDER_FPS, frame


def grid_points_xy(count: int, size_hw: tuple[int, int]) -> np.ndarray:
  """The centres of count x count equal cells: float32 [count * count, 2], (x, y), row by row."""
  h, w = size_hw
  centres = (np.arange(count, dtype=np.float32) + 0.5) / count
  x, y = np.meshgrid(centres * w, centres * h)
  return np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32)


def masked_points_xy(path: str, count: int, size_hw: tuple[int, int]) -> np.ndarray:
  """The bright part of a picture, on a grid of count x count cells over its bounding box.

  Args:
    path: an image file of the frames' size, or of their proportions.
    count: cells a side; a cell whose centre is dark has no point.
    size_hw: the frames' size.

  Returns:
    float32 [N, 2], (x, y) in pixels of the frames, row by row.

  Raises:
    InputError: no picture, other proportions, or nothing bright where the cells' centres are.
  """
  name = images.shown(path)
  picture = images.read_image(path)
  (h, w), (mask_h, mask_w) = size_hw, picture.shape[:2]
  if abs(mask_h * w - mask_w * h) > max(mask_h * w, mask_w * h) * 0.02:
    raise InputError(f"{name} is {mask_w} x {mask_h}, the frames are {w} x {h}: other proportions")
  bright = picture.mean(axis=-1) > 127
  if not bright.any():
    raise InputError(f"{name} has nothing bright; points are asked for where the picture is white")
  rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
  box_hw = (int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1)
  points = grid_points_xy(count, box_hw) + np.array([columns[0], rows[0]])
  column, row = points.astype(int).T
  chosen = points[bright[row, column]]
  if not len(chosen):
    raise InputError(
      f"{name}: no centre of {count} x {count} cells is bright; take a larger --grid"
    )
  return (chosen * np.array([w / mask_w, h / mask_h])).astype(np.float32)


def read_points(path: str, size_hw: tuple[int, int], *, with_time: bool = True) -> np.ndarray:
  """Reads a CSV of points.

  Args:
    path: UTF-8 text; the header names the columns t, y and x in any order.
    size_hw: every point must lie within.
    with_time: the column t is needed; otherwise it may be missing, and must be 0 where given.

  Returns:
    float32 [N, 3], (t, y, x).

  Raises:
    InputError: names the line that cannot be used.
  """
  name = images.shown(path)
  images.check_not_url(path)
  try:
    with open(path, encoding="utf-8-sig", newline="") as file:
      rows = list(csv.reader(file))
  except OSError as error:
    raise InputError(f"{name} cannot be read: {error.strerror}") from None
  except (UnicodeDecodeError, csv.Error):
    raise InputError(f"{name} is not a CSV text file") from None
  wanted = ["t", "y", "x"]
  header = [cell.strip() for cell in rows[0]] if rows else []
  if sorted(header) != sorted(wanted) and (with_time or sorted(header) != ["x", "y"]):
    raise InputError(f"{name} must begin with the header t,y,x, not {','.join(header)[:60]!r}")
  points = []
  for number, row in enumerate(rows[1:], start=2):
    if not row:
      continue
    try:
      values = {"t": 0.0} | dict(zip(header, map(float, row), strict=True))
    except ValueError:
      raise InputError(f"{name}, line {number}: {','.join(row)[:60]!r} is not a point") from None
    t, y, x = (values[key] for key in wanted)
    if not (math.isfinite(t) and t >= 0 and t == int(t) and (with_time or t == 0)):
      raise InputError(f"{name}, line {number}: t is {t:g}, which is no frame to ask in")
    if not (0 <= y < size_hw[0] and 0 <= x < size_hw[1]):
      raise InputError(
        f"{name}, line {number}: y = {y:g}, x = {x:g} lies outside the frame of "
        f"{size_hw[1]} x {size_hw[0]} pixels"
      )
    points.append((t, y, x))
  if not points:
    raise InputError(f"{name} holds no points")
  return np.array(points, np.float32)


def output_folder(path: str) -> Path:
  """Makes the folder for what is written, and sees that it can be written to.

  Raises:
    InputError: it cannot.
  """
  folder = Path(path)
  try:
    workdirs.make(folder)
  except OSError as error:
    raise InputError(f"cannot write into {images.shown(path)}: {error.strerror}") from None
  return folder


def remove_old(paths: Iterable[Path], *, given: str) -> None:
  """Removes what an earlier run left, so that it is not taken for a part of this one's.

  Args:
    paths: which need not be there.
    given: the file that is read, which stays where it is one of them.

  Raises:
    InputError: one cannot be removed.
  """
  for path in paths:
    try:
      if not (path.exists() and path.samefile(given)):
        path.unlink(missing_ok=True)
    except OSError as error:
      raise InputError(f"cannot remove {images.shown(path)}: {error.strerror}") from None


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
  """`whole_files.writing`, whose failure is a sentence.

  Raises:
    InputError: the path cannot be written.
  """
  try:
    with whole_files.writing(path) as partial:
      yield partial
  except OSError as error:
    raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def save_arrays(path: Path, **arrays: np.ndarray) -> Path:
  """Writes an `.npz`, whole or not at all.

  Raises:
    InputError: the path cannot be written.
  """
  with whole(path) as partial, open(partial, "wb") as file:
    np.savez_compressed(file, **arrays)
  return path


def save_flow(path: Path, flow_xy: np.ndarray, *, form: str) -> Path:
  """Writes a flow field, whole or not at all.

  Args:
    flow_xy: [h, w, 2], pixels.
    form: "flo" (Middlebury), or "png" (KITTI), where a vector too long for the format (512 pixels)
      is marked as not valid.

  Raises:
    InputError: the path cannot be written.
  """
  with whole(path) as partial:
    if form == "png":
      flowfiles.write_kitti(partial, flow_xy, flowfiles.fits_kitti(flow_xy))
    else:
      flowfiles.write_flo(partial, flow_xy)
  return path
