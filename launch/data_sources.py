"""What `launch/bench data` reads: a source of every kind, made of a folder of videos."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cwm_jax import prepare
from cwm_jax.data import clips, labels, listing
from cwm_jax.data.video import VideoFile
from cwm_jax.types import InputError

NAMES = ("scenes", "video", "frames", "tfds", "labels")
_FRAMES = 12  # of a folder
_RECORDS, _POINTS = 32, 64  # pairs with labels, and points of each
_CLIPS = clips.Cut(seconds=0.5, fps=10.0, short_side=288, quality=90, limit=4)


def make(name: str, videos: str, folder: Path, *, image_hw: tuple[int, int]) -> dict[str, Any]:
  """Settings of `data.sources` for a source, whose files are made where they are not the videos.

  Args:
    name: one of NAMES.
    videos: as in `listing.list_videos`.
    folder: where files are made.
    image_hw: pixels of labelled pairs.

  Raises:
    InputError: no videos, or none that can be read.
  """
  if name == "video":
    listing.list_videos(videos)
    return dict(paths=videos)
  if name == "frames":
    return dict(paths=_frame_folders(listing.list_videos(videos), folder / "frames"))
  if name == "tfds":
    return dict(data_dir=str(prepare.prepare(videos, folder / "clips", how=_CLIPS)))
  if name == "labels":
    return dict(paths=_labels(folder / "labels", image_hw))
  return {}


def _frame_folders(paths: list[str], folder: Path) -> str:
  """The first frames of each video as JPEG files."""
  for number, path in enumerate(paths):
    try:
      with VideoFile(path, thread_type="NONE", thread_count=1) as video:
        frames = [image for _, image in itertools.islice(video.timed(), _FRAMES)]
    except InputError:
      continue  # the source of videos counts it
    own = folder / f"{number:03d}"
    own.mkdir(parents=True)
    for place, frame in enumerate(frames):
      Image.fromarray(frame).save(own / f"{place:03d}.jpg", quality=90)
  return str(folder)


def _labels(folder: Path, image_hw: tuple[int, int]) -> str:
  """A shard of noise: what reading it takes does not depend on what it says."""
  from array_record.python.array_record_module import ArrayRecordWriter

  rng = np.random.default_rng(0)
  folder.mkdir(parents=True)
  writer = ArrayRecordWriter(str(folder / labels.shard_name(0, 1)), "group_size:1")
  for index in range(_RECORDS):
    record = dict(
      index=np.int64(index),
      pair=rng.integers(0, 256, (2, *image_hw, 3), dtype=np.uint8),
      points_xy=rng.uniform(0, min(image_hw), (_POINTS, 2)).astype(np.float32),
      flow_xy=rng.normal(size=(_POINTS, 2)).astype(np.float32),
      confidence=rng.random(_POINTS, np.float32),
      visible=np.ones(_POINTS, bool),
      round_trip=rng.random(_POINTS, np.float32),
    )
    writer.write(labels.encode(record))
  writer.close()
  return str(folder)
