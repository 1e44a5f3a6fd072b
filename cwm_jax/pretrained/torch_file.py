"""Reads PyTorch's checkpoint files without PyTorch, and without running anything in them.

A `.pt` or `.pth` file is an uncompressed zip archive: a pickle that describes tensors, and one
member for each storage that they look into. The pickle goes through the restricted reader; each
tensor becomes a read-only view of the mapped file after its size, strides and offset were compared
with its storage, so a file of 1 GB costs no memory until somebody copies.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cwm_jax.data.pickle_machine import Constructor, DamagedError, Opaque, run, shown
from cwm_jax.data.unpickle import ArrayDialect, map_file
from cwm_jax.types import InputError

_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
  "ComplexDoubleStorage": np.complex128,
  "ComplexFloatStorage": np.complex64,
  "UntypedStorage": np.uint8,
}
_NEWER_TYPES = {  # have no storage class of their own
  "torch.uint16": np.uint16,
  "torch.uint32": np.uint32,
  "torch.uint64": np.uint64,
  "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
  "torch.float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
  "torch.float8_e5m2": ml_dtypes.float8_e5m2,
  "torch.float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
# A checkpoint may mention classes of its training code; these it mentions only to do harm.
_NEVER = {
  *("os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "ctypes", "importlib", "runpy"),
  *("pty", "commands", "code", "codeop", "pickle", "_pickle", "marshal", "operator", "webbrowser"),
}
_HARMLESS_BUILTINS = {"set", "frozenset", "slice", "range", "object", "int", "float", "str", "list"}
_HARMLESS_BUILTINS |= {"dict", "tuple", "bool", "type"}
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_TOTAL_PER_BYTE = 8  # tensors may share a storage, as tied weights do
_SPARE = 1 << 20
_MAX_DIMENSIONS = 32


class _Member(NamedTuple):
  start: int
  size: int


class _Storage(NamedTuple):
  """A run of bytes in the file, and the type of its numbers."""

  start: int
  size: int
  dtype: np.dtype


class _TorchDialect(ArrayDialect):
  """Plain data, arrays and tensors; what else is named becomes `Opaque`."""

  def __init__(self, data: mmap.mmap, members: Mapping[str, _Member], *, swapped: bool):
    super().__init__()
    self._data = data
    self._members = members
    self._swapped = swapped
    self._total = 0
    rebuild = {
      "_rebuild_tensor": self._tensor,
      "_rebuild_tensor_v2": self._tensor,
      "_rebuild_tensor_v3": self._tensor_of_newer_type,
      "_rebuild_parameter": lambda data, *_: _as_array(data),
      "_rebuild_parameter_with_state": lambda data, *_: _as_array(data),
    }
    self.globals |= {("torch._utils", name): Constructor(call) for name, call in rebuild.items()}
    self.globals["torch", "Size"] = Constructor(lambda sizes=(): tuple(sizes))

  def find(self, module: str, name: str) -> Constructor | Opaque:
    if found := self.globals.get((module, name)):
      return found
    builtin = module in ("builtins", "__builtin__") and name not in _HARMLESS_BUILTINS
    if builtin or module.split(".")[0] in _NEVER:
      raise DamagedError(f"asks for {shown(f'{module}.{name}')}, which weights have no use for")
    return Opaque(f"{module}.{name}"[:200])

  def persistent(self, identifier: Any) -> _Storage:
    kind, storage, key, _, count = identifier[:5]
    module, _, name = storage.name.rpartition(".")
    if kind != "storage" or module not in ("torch", "torch.storage") or name not in _STORAGES:
      raise DamagedError(f"holds a storage of the unknown type {shown(storage.name)}")
    member = self._members.get(f"data/{key}")
    if member is None:
      raise DamagedError(f"lacks the numbers of the storage {shown(str(key))}")
    dtype = np.dtype(_STORAGES[name])
    if type(count) is not int or not 0 <= count * dtype.itemsize <= member.size:
      raise DamagedError(f"is damaged: the storage {shown(key)} is shorter than it claims to be")
    return _Storage(member.start, count * dtype.itemsize, dtype)

  def weigh(self, value: Any) -> int:
    return super().weigh(value) if isinstance(value, (np.ndarray, np.generic)) else 8

  def _tensor_of_newer_type(
    self, storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, kind: Any, *_
  ) -> np.ndarray:
    if not isinstance(kind, Opaque) or kind.name not in _NEWER_TYPES:
      raise DamagedError(f"holds a tensor of the unknown type {shown(repr(kind))}")
    return self._tensor(
      storage._replace(dtype=np.dtype(_NEWER_TYPES[kind.name])), offset, size, stride
    )

  def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A view of the file; nothing outside of the storage can be seen through it."""
    if not isinstance(storage, _Storage):
      raise DamagedError("is damaged: a tensor has no storage")
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
      raise DamagedError("is damaged: a tensor's size, strides or offset are not whole numbers")
    item, count = storage.dtype.itemsize, math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else offset - 1
    if (last + 1) * item > storage.size or len(size) > _MAX_DIMENSIONS:
      raise DamagedError(f"is damaged: a tensor {list(size)} reaches beyond its storage")
    if count * item > storage.size or max(size, default=0) > len(self._data):
      raise DamagedError(
        f"holds a tensor {list(size)} that repeats its few numbers; clone it first"
      )
    self._total += count * item
    if self._total > _MAX_TOTAL_PER_BYTE * len(self._data) + _SPARE:
      raise DamagedError("is damaged: its tensors together are far larger than the file")
    if not count:
      return np.empty(size, storage.dtype)
    swap = self._swapped and item > 1
    # Types that NumPy does not know itself cannot be byte-swapped; their bits can.
    dtype = np.dtype(f">u{item}") if swap and storage.dtype.kind != "c" else storage.dtype
    if swap and storage.dtype.kind == "c":
      dtype = storage.dtype.newbyteorder(">")
    view = np.ndarray(
      size,
      dtype,
      buffer=self._data,
      offset=storage.start + offset * item,
      strides=tuple(step * item for step in stride),
    )
    return view.astype(dtype.newbyteorder("=")).view(storage.dtype) if swap else view


def is_torch_file(path: str | os.PathLike) -> bool:
  """Whether a file begins as PyTorch's do, in the newer or the older form."""
  try:
    with open(path, "rb") as file:
      first = file.read(len(_OLD_MAGIC))
  except OSError:
    return False
  return first[:4] == b"PK\x03\x04" or first == _OLD_MAGIC


def read(path: str | os.PathLike) -> dict:
  """Reads a `.pt` or `.pth` file.

  Args:
    path: what `torch.save` of PyTorch 1.6 or newer wrote.

  Returns:
    The dict that was saved. Tensors and parameters are read-only NumPy views of the mapped file
    (bfloat16 by `ml_dtypes`), ordered dicts are dicts, objects of any other class are `Opaque`.

  Raises:
    InputError: no such file, or one that is damaged, of the older form, or hostile.
  """
  where = f"torch file {path}"
  data = map_file(path, where=where)
  if data[: len(_OLD_MAGIC)] == _OLD_MAGIC:
    raise InputError(
      f"{where} has the form of PyTorch before 1.6; write it anew there with "
      "torch.save(torch.load(FILE), FILE)"
    )
  try:
    members = _members(data)
    if "data.pkl" not in members:
      raise DamagedError("is a zip archive, but not one that torch.save wrote")
    order = members.get("byteorder", _Member(0, 0))
    order_text = data[order.start : order.start + min(order.size, 16)]
    if order_text not in (b"", b"little", b"big"):
      raise DamagedError(f"has the unknown byte order {order_text!r}")
    program = members["data.pkl"]
    content = data[program.start : program.start + program.size]
  except DamagedError as error:
    raise InputError(f"{where} {error}") from None
  dialect = _TorchDialect(data, members, swapped=order_text == b"big")
  value = run(content, dialect, where=where, file_size=len(data))
  if not isinstance(value, dict):
    raise InputError(f"{where} holds {_described(value)}; a dict of tensors is read")
  return value


def _members(data: mmap.mmap) -> dict[str, _Member]:
  """Where each member's bytes lie: stored plainly, inside the file, apart from one another.

  Names have the archive's own folder taken off; they are looked up, never used as paths.
  """
  try:
    with zipfile.ZipFile(data) as archive:
      entries = archive.infolist()
  except (zipfile.BadZipFile, ArithmeticError, LookupError, ValueError, OSError, struct.error):
    raise DamagedError("is not a torch file, or it is cut short") from None
  except NotImplementedError:
    raise DamagedError("uses a zip feature that torch.save never does") from None
  if any(entry.filename.endswith("/constants.pkl") for entry in entries):
    raise DamagedError("is a TorchScript program; save the module's state_dict instead")
  members: dict[str, _Member] = {}
  for entry in entries:
    name = entry.filename.partition("/")[2]
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
      raise DamagedError(f"holds the compressed member {shown(name)}; torch.save never compresses")
    if entry.flag_bits & 1:
      raise DamagedError("is encrypted")
    head = data[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
    if len(head) < _LOCAL_HEADER.size or head[:4] != b"PK\x03\x04":
      raise DamagedError(f"is damaged: the member {shown(name)} is not where it should be")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(head)
    start = entry.header_offset + len(head) + name_length + extra_length
    if start + entry.file_size > len(data):
      raise DamagedError("is cut short")
    if name in members:
      raise DamagedError(f"holds the member {shown(name)} twice")
    members[name] = _Member(start, entry.file_size)
  end = 0
  for name, member in sorted(members.items(), key=lambda item: item[1]):
    if member.size and member.start < end:
      raise DamagedError(f"is damaged: the member {shown(name)} overlaps another")
    end = max(end, member.start + member.size)
  return members


def _as_array(value: Any) -> np.ndarray:
  if not isinstance(value, np.ndarray):
    raise DamagedError("is damaged: a parameter has no tensor")
  return value


def _described(value: Any) -> str:
  if isinstance(value, Opaque):
    return f"an object of the class {shown(value.name)}"
  return f"a {type(value).__name__}"
