"""Short clips cut from videos, and records of them as TFDS reads them, without TensorFlow.

A record holds its frames as JPEG files of their own, so that reading a pair decodes two pictures
and not a video. Called by `prepare`, in processes that never start a JAX backend.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cwm_jax import whole_files
from cwm_jax.data.transforms import View, apply_view
from cwm_jax.data.video import VideoFile
from cwm_jax.types import InputError

NAME, VERSION, SPLIT = "clips", "1.0.0", "train"
# Of the frames of a clip, how many must be frames of the video and not the one before again.
_FRESH = 0.9
_SAME_INSTANT_S = 1e-5


class Cut(NamedTuple):
  """How clips are cut.

  seconds: length of a clip. fps: frames a second, at even times. short_side: pixels; smaller videos
  keep their size. quality: of JPEG, 1 to 95. limit: clips of a video, evenly spread; 0 takes all.
  """

  seconds: float
  fps: float
  short_side: int
  quality: int
  limit: int

  @property
  def frames(self) -> int:
    """Frames of a clip."""
    return round(self.seconds * self.fps)


class Clip(NamedTuple):
  """frames: JPEG files. start_s: time of the first one. size_hw: pixels."""

  frames: list[bytes]
  start_s: float
  size_hw: tuple[int, int]


def cut(path: str, how: Cut) -> Iterator[Clip]:
  """The clips of a video, in order.

  Raises:
    InputError: it cannot be read (after the clips that came before), or is too short or too slow
      for a single clip.
  """
  found = 0
  with VideoFile(path, thread_type="NONE", thread_count=1) as video:
    latest = video.duration_s() - how.seconds
    count = max(0, int((latest + _SAME_INSTANT_S) / how.seconds) + 1) if latest >= 0 else 0
    if not count:
      raise InputError(f"lasts {latest + how.seconds:.2f} s, a clip {how.seconds:g} s")
    starts = [i * how.seconds for i in range(count)]
    passes = [starts]
    if how.limit and how.limit < count:
      passes = [[start] for start in np.linspace(0, latest, how.limit).tolist()]
    for some in passes:
      # One frame longer: what comes on display next ends the last one.
      stop = some[-1] + how.seconds + 2 / how.fps
      for clip in _clips(video.timed(start_s=some[0], stop_s=stop), some, how):
        found += 1
        yield clip
  if not found:
    raise InputError(f"has fewer than {how.fps:g} frames a second")


def _clips(
  timed: Iterable[tuple[float, np.ndarray]], starts: list[float], how: Cut
) -> Iterator[Clip]:
  """Clips at ascending starts, of frames that come with the times from which on they are shown."""
  wanted = ((start, start + i / how.fps) for start in starts for i in range(how.frames))
  start, at = next(wanted)
  frames, fresh, size_hw = [], 0, (0, 0)
  shown, encoded, previous_s, period = None, None, 0.0, 1 / how.fps
  for time_s, image in itertools.chain(timed, [(None, None)]):
    until = previous_s + 1.5 * period if time_s is None else time_s
    while shown is not None and at < until - _SAME_INSTANT_S:
      fresh += encoded is None
      encoded, size_hw = (encoded, size_hw) if encoded else _encode(shown, how)
      frames.append(encoded)
      if len(frames) == how.frames:
        if fresh >= _FRESH * how.frames:
          yield Clip(frames, start, size_hw)
        frames, fresh = [], 0
        encoded = None  # the next clip's first frame is fresh to it
      start, at = next(wanted, (start, np.inf))
    if time_s is not None:
      period = time_s - previous_s if shown is not None else period
      shown, encoded, previous_s = image, None, time_s


def _encode(image: np.ndarray, how: Cut) -> tuple[bytes, tuple[int, int]]:
  height, width = image.shape[:2]
  scale = min(1.0, how.short_side / min(height, width))
  size_hw = (round(height * scale), round(width * scale))
  view = View((0.0, 0.0, float(width), float(height)), False, size_hw)
  data = io.BytesIO()
  Image.fromarray(apply_view(image[None], view)[0]).save(data, "JPEG", quality=how.quality)
  return data.getvalue(), size_hw


def features() -> Any:
  """What a record holds, as TFDS describes it."""
  import tensorflow_datasets as tfds

  kinds = tfds.features
  return kinds.FeaturesDict(
    {
      "frames": kinds.Sequence(kinds.Text()),  # JPEG files; as `Image`, all would be decoded
      "source": kinds.Text(),  # path of the video, relative to the folder of videos
      "start_s": kinds.Scalar(np.float32),
      "size_hw": kinds.Tensor(shape=(2,), dtype=np.int64),
    }
  )


def serialise(described: Any, clip: Clip, source: str) -> bytes:
  """A record of a clip; `described` is `features()`."""
  record = dict(frames=clip.frames, source=source, start_s=clip.start_s)
  record["size_hw"] = np.array(clip.size_hw, np.int64)
  from tensorflow_datasets.proto import tf_example_pb2

  written = described.serialize_example(described.encode_example(record))
  # The fields come in an order that changes from one process to the next: the same clips are to be
  # the same bytes.
  return tf_example_pb2.Example.FromString(written).SerializeToString(deterministic=True)


def shard_name(index: int, count: int) -> str:
  """The file name that TFDS expects of a shard."""
  return f"{NAME}-{SPLIT}.array_record-{index:05d}-of-{count:05d}"


def describe(folder: Path, shard_lengths: list[int], num_bytes: int) -> None:
  """Writes features.json and, last, dataset_info.json, which makes a folder a dataset."""
  features().save_config(os.fspath(folder))
  split = dict(
    name=SPLIT,
    filepathTemplate="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    numBytes=str(num_bytes),
    shardLengths=[str(length) for length in shard_lengths],
  )
  info = dict(fileFormat="array_record", name=NAME, version=VERSION, splits=[split])
  whole_files.write_json(folder / "dataset_info.json", info)
