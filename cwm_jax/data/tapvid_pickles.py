"""TAP-Vid's annotation pickles, read without running anything that is in them.

Where to obtain them (none is shipped; each carries its own licence):

  DAVIS         storage.googleapis.com/dm-tapnet/tapvid_davis.zip: tapvid_davis.pkl, with frames.
  RGB-stacking  storage.googleapis.com/dm-tapnet/tapvid_rgb_stacking.zip: tapvid_rgb_stacking.pkl,
                with frames.
  Kinetics      storage.googleapis.com/dm-tapnet/tapvid_kinetics.zip holds the annotations; the
                script generate_tapvid.py of google-deepmind/tapnet adds the frames of your copy of
                Kinetics-700-2020 (val) and writes 0000_of_0010.pkl to 0009_of_0010.pkl.
  Kubric        no file is published: the point-tracking challenge of google-research/kubric draws
                tracks on MOVi-E; pickle its elements as a list or a dict.

A file is a dict {name: entry} or a list of entries. An entry has `video` (uint8 [T, H, W, 3], or
one encoded image a frame), `points` (float [N, T, 2], (x, y) with the frame's width and height as
1) and `occluded` (bool [N, T]). Kubric's elements have `target_points` in pixels instead, and
frames as floats in [-1, 1]. Places are taken as they stand: Kinetics' lie half a pixel up and left
of DAVIS's, because its script takes that off, and every published number is measured so.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cwm_jax import geometry, whole_files
from cwm_jax.data.images import MAX_PIXELS, list_images, natural_key, shown
from cwm_jax.data.tapvid import POINTS, VIDEO, ClipFolders, ClipSource, TapVidClip, list_clips
from cwm_jax.data.unpickle import load_pickle
from cwm_jax.types import InputError

_SUFFIX = ".pkl"


class PickledClips(ClipSource):
  """The clips of one pickle, or of all pickles (shards) in a folder.

  One shard is in memory at a time. To learn the names each is read once at the beginning. Safe to
  use from several threads.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """
    Raises:
      InputError: no pickle there, or one that cannot be read or holds no entries.
    """
    self._lock = threading.Lock()
    self._loaded: tuple[str, list[tuple[str, Any]]] | None = None
    self._places: list[tuple[str, int]] = []
    self.names: list[str] = []
    for shard in _shards(path):
      for number, (name, _) in enumerate(self._entries(shard)):
        self._places.append((shard, number))
        self.names.append(name)
    if len(set(self.names)) < len(self.names):
      # Kinetics has several clips of one video; a number keeps their answers apart.
      self.names = [f"{name}-{i:04d}" for i, name in enumerate(self.names)]

  def read(self, index: int) -> TapVidClip:
    """One clip, its frames decoded.

    Raises:
      InputError: the entry lacks something or does not fit together.
    """
    shard, number = self._places[index]
    with self._lock:
      _, entry = self._entries(shard)[number]
    return read_entry(entry, self.names[index], where=f"{shown(shard)}, {self.names[index]}")

  def _entries(self, shard: str) -> list[tuple[str, Any]]:
    if self._loaded is None or self._loaded[0] != shard:
      self._loaded = None  # lets go of the last shard before the next is read
      self._loaded = shard, _named_entries(load_pickle(shard), shard)
    return self._loaded[1]


def open_clips(path: str | os.PathLike[str]) -> ClipSource:
  """The clips at `path`: a pickle, a folder of pickles, or a folder of clip folders.

  Raises:
    InputError: there are none.
  """
  return PickledClips(path) if _is_pickled(path) else ClipFolders(path)


def digest(path: str | os.PathLike[str]) -> str:
  """Tells the clips at `path` from others: SHA-256 of annotations, names and sizes of frames.

  Where they lie is no part of it.

  Raises:
    InputError: there are none, or annotations cannot be read.
  """
  found = hashlib.sha256()
  try:
    for shard in _shards(path) if _is_pickled(path) else ():
      found.update(whole_files.sha256(shard).encode())
    for folder in () if _is_pickled(path) else list_clips(path):
      found.update(whole_files.sha256(os.path.join(folder, POINTS)).encode())
      video = os.path.join(folder, VIDEO)
      # A clip without frames is left out by whoever reads it.
      for frame in list_images(video) if os.path.isdir(video) else ():
        found.update(f"{os.path.basename(frame)} {os.path.getsize(frame)}".encode())
  except OSError as error:
    raise InputError(f"{shown(path)} cannot be read: {error.strerror}") from None
  return found.hexdigest()


def _is_pickled(path: str | os.PathLike[str]) -> bool:
  return os.path.isfile(path) or (os.path.isdir(path) and any(Path(path).glob(f"*{_SUFFIX}")))


def read_entry(entry: Any, name: str, *, where: str) -> TapVidClip:
  """One entry of a pickle as a clip.

  Args:
    where: begins the sentence about what is wrong with it.

  Raises:
    InputError: something is missing or of a wrong kind, a frame cannot be decoded, or the parts do
      not fit together.
  """
  if not isinstance(entry, Mapping):
    raise InputError(f"{where} is no dict of video, points and occluded")
  in_pixels = "points" not in entry and "target_points" in entry
  parts = {"video": "video", "points": "target_points" if in_pixels else "points"}
  parts["occluded"] = "occluded"
  lacking = [key for key in parts.values() if key not in entry]
  if lacking:
    raise InputError(f"{where} lacks {' and '.join(lacking)}")
  video = _read_video(entry["video"], where)
  try:
    points_xy, occluded = (np.asarray(entry[parts[key]]) for key in ("points", "occluded"))
  except ValueError:
    raise InputError(f"{where} has {parts['points']} or occluded of uneven rows") from None
  # Elements of a batch of one keep its axis.
  points_xy = points_xy[0] if points_xy.ndim == 4 and len(points_xy) == 1 else points_xy
  occluded = occluded[0] if occluded.ndim == 3 and len(occluded) == 1 else occluded
  fits = (
    points_xy.ndim == 3
    and points_xy.dtype.kind == "f"
    and points_xy.shape[1:] == (len(video), 2)
    and occluded.shape == points_xy.shape[:2]
    and (occluded.dtype.kind == "b" or np.isin(occluded, (0, 1)).all())
  )
  if not fits:
    raise InputError(
      f"{where} should have points float [N, {len(video)}, 2] and occluded bool [N, {len(video)}]; "
      f"they are {points_xy.dtype} {list(points_xy.shape)} and {occluded.dtype} "
      f"{list(occluded.shape)}"
    )
  occluded = occluded.astype(bool)
  if not np.isfinite(points_xy[~occluded]).all():
    raise InputError(f"{where} has visible points without a finite place")
  points_xy = points_xy.astype(np.float32)
  if not in_pixels:
    raster = jnp.asarray(points_xy)
    points_xy = np.asarray(geometry.scale_points_xy(raster, (1, 1), video.shape[1:3]))
  return TapVidClip(name, video, points_xy, occluded)


def _read_video(frames: Any, where: str) -> UInt8[np.ndarray, "t h w 3"]:
  """Frames as arrays or as encoded images."""
  if isinstance(frames, np.ndarray) and frames.dtype.kind in "uf":
    video = frames[0] if frames.ndim == 5 and len(frames) == 1 else frames
    if video.dtype.kind == "f" and video.size and np.abs(video).max() <= 1.0:
      video = np.round((video + 1.0) * 127.5).astype(np.uint8)
  elif isinstance(frames, list | tuple | np.ndarray):
    decoded = [_decode(frame, f"{where}, frame {t}") for t, frame in enumerate(frames)]
    if len({frame.shape for frame in decoded}) > 1:
      raise InputError(f"{where} has frames of different sizes")
    video = np.stack(decoded) if decoded else np.zeros(0)
  else:
    raise InputError(f"{where} has a video that is neither an array nor a list of images")
  if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
    raise InputError(
      f"{where} should have frames uint8 [T, H, W, 3]; they are {video.dtype} {list(video.shape)}"
    )
  return video


def _decode(frame: Any, where: str) -> UInt8[np.ndarray, "h w 3"]:
  if isinstance(frame, np.ndarray) and frame.ndim == 3:
    return frame
  if not isinstance(frame, bytes | bytearray):
    raise InputError(f"{where} is neither an image file nor an array")
  try:
    # Pillow warns of large images; the limit below refuses those that are too large.
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with Image.open(io.BytesIO(frame)) as image:
        if image.width * image.height > MAX_PIXELS:
          raise InputError(f"{where} claims {image.width} x {image.height} pixels: too large")
        return np.array(image.convert("RGB"))
  except InputError:
    raise
  # Pillow's decoders raise almost anything on damaged files.
  except Exception as error:
    raise InputError(f"{where} cannot be decoded: {error}") from error


def _shards(path: str | os.PathLike[str]) -> list[str]:
  if os.path.isdir(path):
    found = sorted(map(os.fspath, Path(path).glob(f"*{_SUFFIX}")), key=natural_key)
    if not found:
      raise InputError(f"{shown(path)} holds no {_SUFFIX} files")
    return found
  return [os.fspath(path)]


def _named_entries(content: Any, shard: str) -> list[tuple[str, Any]]:
  """(name, entry) of a file: a dict's in the order of its keys, a list's in its own."""
  if isinstance(content, Mapping):
    named = sorted(content.items(), key=lambda item: str(item[0]))
  elif isinstance(content, list | tuple):
    stem = Path(shard).stem
    named = [(f"{stem}-{i:04d}", entry) for i, entry in enumerate(content)]
  else:
    raise InputError(f"{shown(shard)} is neither a dict nor a list of annotated clips")
  if not named:
    raise InputError(f"{shown(shard)} holds no clips")
  return [(_file_name(_own_name(entry, key)), entry) for key, entry in named]


def _own_name(entry: Any, otherwise: Any) -> str:
  own = entry.get("video_id") if isinstance(entry, Mapping) else None
  return str(otherwise if own is None else own)


def _file_name(name: str) -> str:
  """What a set calls a clip, with everything that a file name cannot hold replaced."""
  kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:100]
  return kept.lstrip(".") or "clip"
