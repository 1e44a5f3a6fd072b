"""Writes `.pt` files by hand, so that tests need no PyTorch and can be wrong in one exact way."""

from __future__ import annotations

import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
  np.dtype(np.float64): "DoubleStorage",
  np.dtype(np.float32): "FloatStorage",
  np.dtype(np.float16): "HalfStorage",
  np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
  np.dtype(np.int64): "LongStorage",
  np.dtype(np.uint8): "ByteStorage",
  np.dtype(np.bool_): "BoolStorage",
  np.dtype(np.complex64): "ComplexFloatStorage",
}


class Tensor(NamedTuple):
  """A tensor as it is stored; by default the whole of `array`, row by row.

  count, size, stride and offset may say something else than the truth.
  """

  array: np.ndarray
  size: tuple | None = None
  stride: tuple | None = None
  offset: int = 0
  count: int | None = None
  parameter: bool = False
  key: str | None = None


class Global(NamedTuple):
  """An instance of a class: made by calling it with `arguments`, then given `state`."""

  module: str
  name: str
  arguments: tuple = ()
  state: Any = None


def write(path, value: Any, *, members=None, byteorder="little", compress=False, folder="archive"):
  """Writes value, a nest of dicts, lists, tuples, text, numbers, Tensors and Globals; the path.

  Args:
    members: name -> bytes that are added to, or put in the place of, what belongs into the file;
      None as a member's bytes leaves it out.
    byteorder: "little", "big" or None (older files have no such record).
  """
  storages: dict[str, bytes] = {}
  program = b"\x80\x02" + _emit(value, storages, "<" if byteorder != "big" else ">") + b"."
  content = {"data.pkl": program, "version": b"3\n"}
  if byteorder is not None:
    content["byteorder"] = byteorder.encode()
  content |= {f"data/{key}": raw for key, raw in storages.items()} | (members or {})
  kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
  with zipfile.ZipFile(path, "w", kind) as archive:
    for name, raw in content.items():
      if raw is not None:
        archive.writestr(f"{folder}/{name}", raw)
  return path


def _emit(value: Any, storages: dict[str, bytes], order: str) -> bytes:
  def emit(inner):
    return _emit(inner, storages, order)

  if isinstance(value, Tensor):
    return _emit_tensor(value, storages, order)
  if isinstance(value, Global):
    made = _global(value.module, value.name) + emit(value.arguments) + b"R"
    return made if value.state is None else made + emit(value.state) + b"b"
  if isinstance(value, dict):
    return b"}(" + b"".join(emit(k) + emit(v) for k, v in value.items()) + b"u"
  if isinstance(value, list):
    return b"](" + b"".join(map(emit, value)) + b"e"
  if isinstance(value, tuple):
    return b"(" + b"".join(map(emit, value)) + b"t"
  if isinstance(value, str):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
  if isinstance(value, bool) or value is None:
    return {True: b"\x88", False: b"\x89", None: b"N"}[value]
  if isinstance(value, int):
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw
  return b"G" + struct.pack(">d", value)


def _global(module: str, name: str) -> bytes:
  return f"c{module}\n{name}\n".encode()


def _emit_tensor(tensor: Tensor, storages: dict[str, bytes], order: str) -> bytes:
  def emit(inner):
    return _emit(inner, storages, order)

  array = np.ascontiguousarray(tensor.array)
  key = str(len(storages)) if tensor.key is None else tensor.key
  raw = array.tobytes()
  if order == ">" and array.itemsize > 1:
    unit = array.itemsize // (2 if array.dtype.kind == "c" else 1)
    raw = np.frombuffer(raw, f"<u{unit}").astype(f">u{unit}").tobytes()
  storages[key] = raw
  size = tensor.array.shape if tensor.size is None else tensor.size
  stride = tensor.stride
  if stride is None:
    stride = tuple(step // array.itemsize for step in array.strides)
  reference = (
    b"("
    + emit("storage")
    + _global("torch", STORAGES[array.dtype])
    + emit(key)
    + emit("cpu")
    + emit(array.size if tensor.count is None else tensor.count)
    + b"tQ"
  )
  hooks = _global("collections", "OrderedDict") + b")R"
  made = (
    _global("torch._utils", "_rebuild_tensor_v2")
    + b"("
    + reference
    + emit(tensor.offset)
    + emit(tuple(size))
    + emit(tuple(stride))
    + emit(False)
    + hooks
    + b"tR"
  )
  if not tensor.parameter:
    return made
  return _global("torch._utils", "_rebuild_parameter") + b"(" + made + emit(True) + hooks + b"tR"
