"""Random-access sources of frame pairs. The loader asks each for its example number `position`.

An example depends on nothing but (seed, position), so any number of workers and processes gives the
same stream, and a resumed one goes on exactly. NumPy only: a JAX backend is never started here.

A file that cannot be used is replaced by another one of the same source, chosen from (seed,
position); the example carries how many were passed over, and each is named in the log once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging

from cwm_jax.data import images, listing, procedural, transforms
from cwm_jax.data.video import VideoFile
from cwm_jax.types import InputError

# Examples of an endless source. Grain multiplies and adds to lengths, so stay below 2**63.
ENDLESS = 2**48

# How many files are tried for one example before the whole source is given up.
MAX_TRIES = 100

# Photographs handed to each scene; its layers take them in turn.
PHOTOS_PER_SCENE = 4

Example = dict[str, np.ndarray | np.generic]


@runtime_checkable
class Source(Protocol):
  """What the loader needs of a source.

  items: files, clips or records in an epoch; 0 when examples are endless and come in order.
  """

  items: int

  def example(self, position: int, item: int) -> Example:
    """The example at a place of the endless stream, whose turn it is for `item`.

    It holds "index" int64 [] (the position), "skipped" int32 [] (items passed over), and the data.
    """


class ScenesSource:
  """Parameters of procedural scenes; pixels are drawn on the device, by `rendering.render`.

  Examples hold "scene/<name>" for every array of `procedural.draw_scene` and, with `photos`,
  "scene/photos" uint8 [P, texture_size, texture_size, 3].

  Args:
    first_seed: scene i of the stream has seed first_seed + i.
    curriculum, fade: as in `procedural.preset_at`.
    max_objects: as in `procedural.draw_scene`; fixes the shapes.
    photos: a folder of photographs, walked recursively; "" for none.
    texture_size: side of the photographs handed out, pixels.

  Raises:
    InputError: a negative seed, a wrong curriculum, or a photo folder without image files.
  """

  items = 0

  def __init__(
    self,
    *,
    first_seed: int,
    curriculum: Sequence[Sequence[Any]],
    fade: int = 0,
    max_objects: int = 8,
    photos: str = "",
    texture_size: int = 256,
  ):
    if first_seed < 0:
      raise InputError(f"data.sources.scenes.first_seed is {first_seed}; it must be 0 or more")
    self._first_seed, self._max_objects = first_seed, max_objects
    self._curriculum, self._fade = tuple((start, what) for start, what in curriculum), fade
    self._texture_size = texture_size
    # A wrong stage should fail now, not hours later.
    for start in [0, *(start for start, _ in self._curriculum)]:
      procedural.preset_at(start, self._curriculum)
    self._photos = listing.list_photos(photos) if photos else []

  def example(self, position: int, item: int) -> Example:
    seed = self._first_seed + position
    preset = procedural.preset_at(position, self._curriculum, fade=self._fade, seed=seed)
    scene = procedural.draw_scene(seed, preset, max_objects=self._max_objects)
    example = {f"scene/{name}": value for name, value in scene.items()}
    skipped = 0
    if self._photos:
      rng = np.random.default_rng([seed, 2])
      photos = []
      for _ in range(PHOTOS_PER_SCENE):
        first = int(rng.integers(len(self._photos)))
        photo, passed = first_usable(
          len(self._photos), first, rng, self._photo, self._photos.__getitem__
        )
        photos.append(photo)
        skipped += passed
      example["scene/photos"] = np.stack(photos)
    return {**_header(position, skipped), **example}

  def _photo(self, item: int, rng: np.random.Generator) -> np.ndarray:
    photo = images.read_image(self._photos[item])
    size = (self._texture_size, self._texture_size)
    view = transforms.draw_view(rng, photo.shape[:2], size, crop="random", flip=True)
    return transforms.apply_view(photo[None], view)[0]


class PairSource:
  """Base of the sources of real frames: draws, crops, replaces what is broken.

  Examples hold "frames" uint8 [2, H, W, 3], RGB.

  Args:
    items: how many clips there are.
    image_hw: pixels of the frames handed out.
    seed: of every random choice.
    crop: "random" or "centre".
    flip: mirror pairs left to right at random.
  """

  def __init__(self, items: int, *, image_hw: tuple[int, int], seed: int, crop: str, flip: bool):
    self.items, self._image_hw, self._seed = items, tuple(image_hw), seed
    self._crop, self._flip = crop, flip
    transforms.draw_view(np.random.default_rng(0), (8, 8), self._image_hw, crop=crop)  # check

  def example(self, position: int, item: int) -> Example:
    rng = np.random.default_rng([self._seed, position])
    frames, skipped = first_usable(self.items, item, rng, self._pair, self.name)
    return {**_header(position, skipped), "frames": frames}

  def name(self, item: int) -> str:
    """What the log calls a clip."""
    raise NotImplementedError

  def read(self, item: int, rng: np.random.Generator) -> np.ndarray:
    """A pair uint8 [2, h, w, 3] from somewhere in a clip. Raises InputError if it is unusable."""
    raise NotImplementedError

  def _pair(self, item: int, rng: np.random.Generator) -> np.ndarray:
    pair = self.read(item, rng)
    view = transforms.draw_view(
      rng, pair.shape[1:3], self._image_hw, crop=self._crop, flip=self._flip
    )
    return transforms.apply_view(pair, view)


class VideoSource(PairSource):
  """Pairs `gap_ms` milliseconds apart from video files; an epoch takes one pair from each file.

  Args:
    paths: as in `listing.list_videos`.
    gap_ms: time from the first frame to the second.
    thread_type: FFmpeg's decoder threads; loaders gain more from workers than from these.
    pair_options: as in `PairSource`.

  Raises:
    InputError: no files, or a gap that is not positive.
  """

  def __init__(
    self,
    paths: str | os.PathLike[str],
    *,
    gap_ms: float,
    thread_type: str = "NONE",
    **pair_options: Any,
  ):
    if not gap_ms > 0:
      raise InputError(f"the gap between the frames of a pair is {gap_ms} ms; it must be above 0")
    self.paths = listing.list_videos(paths)
    self._gap_s, self._thread_type = gap_ms / 1000.0, thread_type
    super().__init__(len(self.paths), **pair_options)

  def name(self, item: int) -> str:
    return self.paths[item]

  def read(self, item: int, rng: np.random.Generator) -> np.ndarray:
    share = rng.random()
    with VideoFile(self.paths[item], thread_type=self._thread_type, thread_count=1) as video:
      return video.pair(share * video.latest_start_s(self._gap_s), self._gap_s).frames


class FrameFolderSource(PairSource):
  """Pairs `gap` frames apart from folders of frames (as DAVIS has them), one a folder an epoch.

  Args:
    paths: a folder of frames, or a folder of such folders at any depth.
    gap: frames from the first to the second, in natural order of the file names.
    pair_options: as in `PairSource`.

  Raises:
    InputError: no image files, or a gap below 1.
  """

  def __init__(self, paths: str | os.PathLike[str], *, gap: int, **pair_options: Any):
    check_gap(gap)
    self.paths, self._gap = listing.list_frame_folders(paths), gap
    super().__init__(len(self.paths), **pair_options)

  def name(self, item: int) -> str:
    return self.paths[item]

  def read(self, item: int, rng: np.random.Generator) -> np.ndarray:
    share = rng.random()
    frames = images.list_images(self.paths[item])
    starts = pair_starts(len(frames), self._gap, images.shown(self.paths[item]))
    first = int(share * starts)
    pair = [frames[first], frames[first + self._gap]]
    return images.stack_frames([images.read_image(path) for path in pair], pair)


def pair_starts(count: int, gap: int, name: str) -> int:
  """How many frames of a clip a pair can begin at; InputError when there is none."""
  if count <= gap:
    raise InputError(f"{name} is too short: {count} frames, a pair {gap} frames apart is wanted")
  return count - gap


def check_gap(gap: int) -> None:
  """Raises InputError for a gap in frames that is below 1."""
  if gap < 1:
    raise InputError(f"the gap between the frames of a pair is {gap} frames; it must be 1 or more")


def _header(position: int, skipped: int) -> Example:
  return {"index": np.int64(position), "skipped": np.int32(skipped)}


_named: set[str] = set()


def first_usable(
  count: int,
  first: int,
  rng: np.random.Generator,
  read: Callable[[int, np.random.Generator], Any],
  name: Callable[[int], str],
) -> tuple[Any, int]:
  """Reads item `first` of `count` or, where that cannot be used, others drawn by `rng`.

  Returns:
    What was read, and how many items were passed over.

  Raises:
    InputError: every item tried was unusable; all of them when there are at most MAX_TRIES.
  """
  try:
    return read(first, rng), 0
  except InputError as error:
    reason = _name_once(name(first), error)
  # A permutation meets every item once; of many, the first MAX_TRIES drawn are enough to judge.
  others = [item for item in rng.permutation(count).tolist() if item != first][: MAX_TRIES - 1]
  for passed, item in enumerate(others, start=1):
    try:
      return read(item, rng), passed
    except InputError as error:
      _name_once(name(item), error)
  tried = len(others) + 1
  raise InputError(f"none of the {tried} items tried can be used; the first one: {reason}")


def _name_once(name: str, error: InputError) -> str:
  if name not in _named:
    _named.add(name)
    logging.warning("passed over: %s", error)
  return str(error)
