"""Labels of points in ArrayRecord shards: what the labelling job writes and training reads.

A shard `labels-00003-of-00050.arrayrecord` holds the pairs of one stretch of a source, one record
a pair; it is there whole or not at all.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from cwm_jax.configs import base
from cwm_jax.data import npz
from cwm_jax.data.sources import first_usable
from cwm_jax.types import InputError

# Of each record, without the axis of pairs: see `types.PointLabels`; pair is uint8 [2, H, W, 3] and
# index int64 [], the pair's place in what was labelled. In a shard, round_trip is NaN where nobody
# asked for the way back; shards of older versions hold 0 there.
FIELDS = ("index", "pair", "points_xy", "flow_xy", "confidence", "visible", "round_trip")
_NAME = re.compile(r"labels-(\d+)-of-(\d+)\.arrayrecord")


def shard_name(number: int, count: int) -> str:
  """The file name of shard `number` of `count`."""
  return f"labels-{number:05d}-of-{count:05d}.arrayrecord"


def find_shards(folder: str | os.PathLike[str]) -> list[Path]:
  """The shards in a folder, by number.

  Raises:
    InputError: there are none, or they are not of one job.
  """
  found = {path: _NAME.fullmatch(path.name) for path in sorted(Path(folder).glob("*.arrayrecord"))}
  shards = {path: match for path, match in found.items() if match}
  if not shards:
    raise InputError(f"{folder} holds no labels; make some with: cwm-jax label --out {folder}")
  if len({match[2] for match in shards.values()}) > 1:
    raise InputError(f"{folder} holds labels of more than one job")
  return list(shards)


def count_records(path: Path) -> int:
  """How many records a shard holds.

  Raises:
    InputError: it is damaged.
  """
  from grain.python import ArrayRecordDataSource

  try:
    return len(ArrayRecordDataSource(os.fspath(path)))
  # The reader's kinds of errors are its own affair.
  except Exception as error:
    reason = str(error).split(";")[0] or "it is damaged"
    raise InputError(
      f"{path} cannot be read: {reason}; delete it and give the labelling command again"
    ) from None


def encode(record: Mapping[str, Any]) -> bytes:
  """One record, with the arrays of `FIELDS`, as the bytes of an `.npz` file."""
  stream = io.BytesIO()
  np.savez(stream, **{name: np.asarray(record[name]) for name in FIELDS})
  return stream.getvalue()


def decode(data: bytes, *, where: str = "a record of labels") -> dict[str, np.ndarray]:
  """The arrays of a record.

  Raises:
    InputError: it is damaged.
  """
  return npz.load_arrays(io.BytesIO(data), FIELDS, where=where)


def asked_back(record: Mapping[str, Any]) -> bool:
  """Whether a record's points were asked for the way back."""
  return not np.isnan(record["round_trip"]).any()


def check_round_trip_limit(limit: float, *, asked: bool) -> None:
  """Refuses a filter that labels say nothing about.

  Args:
    limit: `label.max_round_trip`, pixels; the config's default filters nothing where nobody asked.
    asked: whether the labels were asked for the way back.

  Raises:
    InputError: another limit than the default, on labels that were not.
  """
  if not asked and limit != base.get_config().label.max_round_trip:
    raise InputError(
      f"label.max_round_trip is {limit}, and the labels were not asked for the way back; leave it "
      "out, or make labels with label.round_trip set to True"
    )


class LabelsSource:
  """The labelled pairs of a folder; see `sources.Source`.

  Examples hold "frames" uint8 [2, H, W, 3] and "labels/<name>" of the other fields. A damaged
  record is replaced by another one.

  Args:
    folder: with shards of the labelling job. Where some are missing, the others are read: pairs
      then come in another order than when all are there.
    image_hw: pixels that the pairs must have.

  Attributes:
    asked_back: whether the points were asked for the way back.

  Raises:
    InputError: no shards, a shard or all records that cannot be read, or pairs of another size.
  """

  def __init__(self, folder: str | os.PathLike[str], *, image_hw: tuple[int, int]):
    paths = find_shards(folder)
    wanted = int(_NAME.fullmatch(paths[0].name)[2])
    if len(paths) < wanted:
      logging.warning("%s holds %d of its job's %d shards of labels", folder, len(paths), wanted)
    self._folder = str(folder)
    self._records = _open(paths)
    self.items = len(self._records)
    record, _ = self._usable(0, np.random.default_rng(0))
    self.asked_back = asked_back(record)
    size_hw = tuple(record["pair"].shape[1:3])
    if size_hw != tuple(image_hw):
      raise InputError(
        f"the labelled pairs in {folder} have {size_hw[0]} x {size_hw[1]} pixels, and those asked "
        f"for {image_hw[0]} x {image_hw[1]}"
      )

  def example(self, position: int, item: int) -> dict[str, np.ndarray | np.generic]:
    """As `sources.Source.example`."""
    record, skipped = self._usable(item, np.random.default_rng(position))
    frames = record.pop("pair")
    del record["index"]
    # A training that stops at NaNs would stop at these, which every limit passes as 0.
    record["round_trip"] = np.nan_to_num(record["round_trip"], nan=0.0, posinf=np.inf)
    labels = {f"labels/{name}": values for name, values in record.items()}
    return {"index": np.int64(position), "skipped": np.int32(skipped), "frames": frames, **labels}

  def _usable(self, item: int, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], int]:
    return first_usable(self.items, item, rng, lambda item, _: self._read(item), self._name)

  def _read(self, item: int) -> dict[str, np.ndarray]:
    try:
      data = self._records[item]
    except Exception as error:  # as in `count_records`
      raise InputError(f"{self._name(item)} cannot be read: {error}") from None
    return decode(data, where=self._name(item))

  def _name(self, item: int) -> str:
    return f"record {item} of {self._folder}"


def _open(paths: list[Path]) -> Any:
  """Random access to the records of all shards; InputError names one that cannot be read."""
  from grain.python import ArrayRecordDataSource

  for path in paths:
    count_records(path)
  return ArrayRecordDataSource([os.fspath(path) for path in paths])
