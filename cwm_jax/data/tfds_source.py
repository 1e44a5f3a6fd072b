"""Videos of TensorFlow Datasets, read through `tfds.data_source`, without TensorFlow.

The data must have been prepared in a random-access file format (ArrayRecord). A record's video may
be an array of frames, a sequence of encoded images, or one encoded video file. Encoded ones are
turned upright as they say; an array of frames says nothing of it and is taken as it is.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cwm_jax.data.sources import PairSource, check_gap, pair_starts
from cwm_jax.types import InputError

_USUAL_FEATURES = ("video", "frames", "images")


class TfdsSource(PairSource):
  """Pairs `gap` frames apart from a dataset's videos; an epoch takes one pair from each record.

  Args:
    name: as for `tfds.data_source`, or "" when `data_dir` is the folder of one prepared version.
    split: such as "train" or "train[:50%]".
    data_dir: where prepared datasets are; "" for the usual place.
    feature: the record's field that holds the video; "" takes the first of video, frames, images.
    gap: frames from the first to the second.
    pair_options: as in `PairSource`.

  Raises:
    InputError: the dataset cannot be opened, is empty, has no such field, or a gap below 1.
  """

  def __init__(
    self,
    name: str,
    *,
    split: str = "train",
    data_dir: str = "",
    feature: str = "",
    gap: int = 1,
    **pair_options: Any,
  ):
    check_gap(gap)
    self._name = f"dataset {name or data_dir} ({split})"
    self._data = _open(name, split, data_dir, self._name)
    if not len(self._data):
      raise InputError(f"{self._name} is empty")
    fields = list(self._data.dataset_info.features)
    wanted = (feature,) if feature else _USUAL_FEATURES
    found = [field for field in wanted if field in fields]
    if not found:
      raise InputError(
        f"{self._name} has no field {' or '.join(wanted)}; it has {', '.join(sorted(fields))}"
      )
    self._feature, self._gap = found[0], gap
    super().__init__(len(self._data), **pair_options)

  def name(self, item: int) -> str:
    return f"{self._name}, record {item}"

  def read(self, item: int, rng: np.random.Generator) -> np.ndarray:
    share = rng.random()
    try:
      value = self._data[item][self._feature]
    # Decoders of records raise whatever they meet.
    except Exception as error:
      raise InputError(f"{self.name(item)} cannot be read: {error}") from error
    if np.ndim(value) == 0 and not isinstance(value, bytes):
      raise InputError(f"{self.name(item)}: the field {self._feature} is a number, not a video")
    frames = decode_video(value, self.name(item)) if isinstance(value, bytes) else value
    first = int(share * pair_starts(len(frames), self._gap, self.name(item)))
    pair = [as_image(frames[i], self.name(item)) for i in (first, first + self._gap)]
    if pair[0].shape != pair[1].shape:
      raise InputError(f"{self.name(item)} has frames of several sizes")
    return np.stack(pair)


def as_image(frame: Any, name: str) -> np.ndarray:
  """A record's frame, encoded or an array, as uint8 [H, W, 3].

  Raises:
    InputError: it is damaged, or no such array.
  """
  try:
    if isinstance(frame, bytes):
      frame = ImageOps.exif_transpose(Image.open(io.BytesIO(frame))).convert("RGB")
    frame = np.asarray(frame)
  except Exception as error:  # as in `images.read_image`
    raise InputError(f"{name} holds a damaged image: {error}") from error
  if frame.ndim == 3 and frame.shape[-1] == 1:
    frame = np.repeat(frame, 3, axis=-1)
  if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
    raise InputError(f"{name}: frames are {frame.dtype} {frame.shape}, uint8 [H, W, 3] is needed")
  return frame


def _open(name: str, split: str, data_dir: str, shown_name: str):
  # Here, not above: it takes seconds, and only this source needs it.
  import tensorflow_datasets as tfds

  try:
    if name:
      return tfds.data_source(name, split=split, data_dir=data_dir or None)
    return tfds.builder_from_directory(data_dir).as_data_source(split=split)
  except Exception as error:
    # The messages run over pages; the first line says what is wrong.
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    raise InputError(f"{shown_name} cannot be opened: {reason}") from error


def decode_video(data: bytes, name: str) -> list[np.ndarray]:
  """All frames of an encoded video file, uint8 [H, W, 3], turned upright.

  Raises:
    InputError: it cannot be decoded.
  """
  import av

  from cwm_jax.data import video

  try:
    with av.open(io.BytesIO(data), metadata_errors="replace") as container:
      return [video.upright(frame) for frame in container.decode(video=0)]
  except (av.FFmpegError, OSError, IndexError) as error:
    raise InputError(f"{name} holds a video that cannot be decoded: {error}") from error
