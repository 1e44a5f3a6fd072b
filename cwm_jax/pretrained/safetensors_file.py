"""Reads any safetensors file, ours or another project's, without trusting a number in it.

The format is read by the few lines below rather than by a general library, so that a broken or
hostile file ends in a sentence: every length and offset is checked against the file's size before
anything is allocated.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cwm_jax.data.pickle_machine import shown
from cwm_jax.types import InputError

FLOATS = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPES = FLOATS | {
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 32  # numpy 1.x's limit; no parameter comes near it


class TensorInfo(NamedTuple):
  """One stored array: its safetensors dtype code, shape, and byte range in the file."""

  dtype: str
  shape: tuple[int, ...]
  start: int
  stop: int


class Table(NamedTuple):
  """What a safetensors file holds, numbers apart.

  metadata: the text entries stored beside the tensors; whatever the file says, so check it.
  tensors:  name -> TensorInfo, in the file's order.
  """

  metadata: Any
  tensors: dict[str, TensorInfo]


def read_table(
  path: str | os.PathLike, *, where: str, dtypes: Mapping[str, np.dtype] = DTYPES
) -> Table:
  """Reads and checks everything but the numbers; touches no more of the file than its header.

  Args:
    path: the file.
    where: names it in error messages.
    dtypes: the codes that may occur.

  Raises:
    InputError: not a safetensors file, cut short, or inconsistent.
  """
  try:
    size = os.stat(path).st_size
    if os.path.isdir(path):
      raise InputError(f"{path} is a folder; give the .safetensors file itself")
    with open(path, "rb") as file:
      first = file.read(8)
      length = int.from_bytes(first, "little")
      if len(first) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise InputError(f"{where} is not a safetensors file, or it is cut short")
      raw = file.read(length)
  except OSError as error:
    raise InputError(f"{where} cannot be read: {error.strerror}") from None
  table = _parse(raw, where)
  metadata = table.pop("__metadata__", {})
  return Table(metadata, _check_tensors(table, 8 + length, size, where, dtypes))


def read_arrays(
  path: str | os.PathLike, tensors: Mapping[str, TensorInfo]
) -> dict[str, np.ndarray]:
  """The arrays of a checked table, as read-only views of the mapped file: nothing is copied."""
  stored = np.memmap(path, mode="r")
  return {
    name: np.asarray(stored[info.start : info.stop].view(DTYPES[info.dtype]).reshape(info.shape))
    for name, info in tensors.items()
  }


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads anyone's safetensors file.

  Returns:
    name -> array of the stored dtype, a read-only view of the mapped file.

  Raises:
    InputError: as `read_table`.
  """
  return read_arrays(path, read_table(path, where=f"safetensors file {path}").tensors)


def _parse(raw: bytes, where: str) -> dict[str, Any]:
  """The header's JSON object; a key given twice is refused, since readers would disagree on it."""

  def unique(pairs):
    table = dict(pairs)
    if len(table) != len(pairs):
      raise InputError(f"{where} names the same tensor twice")
    return table

  try:
    table = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
  except InputError:
    raise
  except (ValueError, RecursionError):
    raise InputError(f"{where} is not a safetensors file: its header is not JSON") from None
  if not isinstance(table, dict):
    raise InputError(f"{where} is not a safetensors file: its header is not a table")
  return table


def _check_tensors(
  table: dict[str, Any], begin: int, size: int, where: str, dtypes: Mapping[str, np.dtype]
) -> dict[str, TensorInfo]:
  """Turns header entries into absolute byte ranges, inside the file and without overlap."""
  tensors = {}
  for name, entry in table.items():
    try:
      code, shape = entry["dtype"], tuple(entry["shape"])
      start, stop = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
      raise InputError(f"{where}: the entry of {shown(name)} is malformed") from None
    if not isinstance(code, str) or code not in dtypes:
      raise InputError(
        f"{where}: {shown(name)} has dtype {shown(str(code))}; parameters are {', '.join(dtypes)}"
      )
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
      raise InputError(f"{where}: the entry of {shown(name)} is malformed")
    if len(shape) > _MAX_DIMENSIONS or math.prod(shape) * dtypes[code].itemsize != stop - start:
      raise InputError(f"{where}: the shape of {shown(name)} does not fit its length in the file")
    if begin + stop > size:
      raise InputError(f"{where} is cut short: {shown(name)} ends beyond the file")
    # An axis of 0 makes any other fit a length of 0, also those that no array can have.
    if math.prod(n or 1 for n in shape) > size:
      raise InputError(f"{where}: the shape of {shown(name)} does not fit its length in the file")
    tensors[name] = TensorInfo(code, shape, begin + start, begin + stop)
  if not tensors:
    raise InputError(f"{where} holds no parameters")
  end = begin
  for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
    if info.start < end:
      raise InputError(f"{where}: the bytes of {shown(name)} overlap another tensor's")
    end = info.stop
  return tensors
