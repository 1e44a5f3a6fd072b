"""Reads pickles of plain data and NumPy arrays, and nothing else: no file can make this run code.

TAP-Vid's annotation files come as pickles; the checkpoint reader in `pretrained` builds on the same
dialect.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax.data.pickle_machine import (
  Constructor,
  DamagedError,
  Dialect,
  Opaque,
  run,
  set_items,
  shown,
)
from cwm_jax.types import InputError

_DTYPE = re.compile(r"[<>=|]?(\?|b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|32)|[SUV][1-9]\d{0,8})")
_MAX_DIMENSIONS = 32
_MAX_EMPTY_AXIS = 1 << 24  # an array without elements may not pretend to have endless rows


class _Kind:
  """A dtype under construction: pickle makes it first and tells its byte order later."""

  __slots__ = ("dtype",)

  def __init__(self, name: Any, align: Any = False, copy: Any = True):
    if isinstance(name, bytes):
      name = name.decode("latin-1")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
      told = shown(name) if isinstance(name, str) else f"of {type(name).__name__}"
      raise DamagedError(f"holds an array of the type {told}; arrays of numbers and text are read")
    self.dtype = np.dtype(name)

  def set_state(self, state: Any) -> None:
    order, *fields = state[1:5]
    if order not in ("<", ">", "=", "|") or fields != [None, None, None]:
      raise DamagedError("holds an array of records; arrays of numbers and text are read")
    self.dtype = self.dtype.newbyteorder(order)


class ArrayDialect(Dialect):
  """Plain data and NumPy arrays (pickled by any NumPy since 1.0, under Python 2 or 3)."""

  def __init__(self) -> None:
    self._unfilled: dict[int, np.ndarray] = {}
    self._array_class = Constructor(self._refuse)
    arrays = {
      "_reconstruct": self._reconstruct,
      "scalar": self._scalar,
      "_frombuffer": self._from_buffer,
    }
    self.globals = {
      ("numpy", "ndarray"): self._array_class,
      ("numpy", "dtype"): Constructor(_Kind),
      ("_codecs", "encode"): Constructor(_encode),
      ("collections", "OrderedDict"): Constructor(_dict),
    }
    for core in ("numpy.core", "numpy._core"):
      for name, call in arrays.items():
        module = "numeric" if name == "_frombuffer" else "multiarray"
        self.globals[f"{core}.{module}", name] = Constructor(call)
    for builtins in ("builtins", "__builtin__"):
      self.globals[builtins, "bytes"] = Constructor(_bytes)
      self.globals[builtins, "bytearray"] = Constructor(lambda *a: bytearray(_bytes(*a)))
      self.globals[builtins, "complex"] = Constructor(_complex)

  def find(self, module: str, name: str) -> Constructor | Opaque:
    found = self.globals.get((module, name))
    return super().find(module, name) if found is None else found

  def build(self, target: Any, state: Any) -> None:
    if isinstance(target, _Kind):
      target.set_state(state)
    elif isinstance(target, np.ndarray) and self._unfilled.pop(id(target), None) is not None:
      _, shape, kind, fortran, raw = state
      raw = raw.encode("latin-1") if isinstance(raw, str) else raw
      if type(raw) is not bytes:
        raise DamagedError("holds an array of objects; arrays of numbers and text are read")
      dtype = _checked(kind, shape, raw)
      # In place, since the memo may hold the array already; it keeps `raw` and copies nothing.
      target.__setstate__((1, shape, dtype, bool(fortran), raw))
    else:
      super().build(target, state)

  def weigh(self, value: Any) -> int:
    if isinstance(value, np.ndarray) and id(value) not in self._unfilled:
      return value.nbytes
    return value.nbytes if isinstance(value, np.generic) else super().weigh(value)

  def _reconstruct(self, kind: Any, shape: Any, code: Any) -> np.ndarray:
    if kind is not self._array_class:
      raise DamagedError("holds a special kind of array; plain arrays are read")
    array = np.empty(0, np.uint8)
    self._unfilled[id(array)] = array
    return array

  def _scalar(self, kind: Any, raw: Any = b"") -> Any:
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, _checked(kind, (), raw))[0]

  def _from_buffer(self, raw: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    dtype = _checked(kind, shape, raw)
    if order not in ("C", "F"):
      raise DamagedError("is damaged: an array has no order")
    return np.frombuffer(raw, dtype).reshape(shape, order=order)

  def _refuse(self, *_: Any) -> Any:
    raise DamagedError("makes an array in a way that is not known")


def load_pickle(path: str | os.PathLike) -> Any:
  """Reads a pickle of plain data without executing anything.

  Args:
    path: a pickle of protocol 2 to 5.

  Returns:
    dicts, lists, tuples, str, bytes, numbers, bool, None and NumPy arrays (read-only where the file
    stored them as bytes). Text of Python 2 is decoded as latin-1. Memory stays below 128 times the
    file's size whatever is in it; for files of arrays it is about twice.

  Raises:
    InputError: not such a file, cut short, damaged, or one that asks for anything else.
  """
  where = f"pickle file {Path(path)}"
  with map_file(path, where=where) as data:
    return run(data, ArrayDialect(), where=where)


def map_file(path: str | os.PathLike, *, where: str) -> mmap.mmap:
  """A file's bytes, read as they are asked for.

  Raises:
    InputError: no such file, not a regular one, or an empty one.
  """
  try:
    with open(path, "rb", opener=_open_now) as file:
      status = os.fstat(file.fileno())
      if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{where} is not a file")
      if not status.st_size:
        raise InputError(f"{where} is empty")
      return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error:
    raise InputError(f"{where} cannot be read: {error.strerror}") from None


def _open_now(path: Any, flags: int) -> int:
  """Opens without waiting for the other end of a pipe."""
  return os.open(path, flags | os.O_NONBLOCK)


def _checked(kind: Any, shape: Any, raw: Any) -> np.dtype:
  """The dtype of an array whose shape fits its bytes exactly."""
  if not isinstance(kind, _Kind) or type(raw) not in (bytes, bytearray):
    raise DamagedError("is damaged: an array lacks its type or its bytes")
  if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
    raise DamagedError("is damaged: an array's shape is no tuple of whole numbers")
  fits = len(shape) <= _MAX_DIMENSIONS and math.prod(shape) * kind.dtype.itemsize == len(raw)
  if not fits or (not raw and any(n > _MAX_EMPTY_AXIS for n in shape)):
    raise DamagedError(f"is damaged: an array's shape does not fit its {len(raw):,} bytes")
  return kind.dtype


def _encode(text: Any, encoding: Any) -> bytes:
  """Protocol 2 has no bytes; Python 3 writes them as text of the same numbers."""
  if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
    raise DamagedError("asks to encode text in a way that pickle does not")
  return text.encode("latin-1")


def _bytes(*arguments: Any) -> bytes:
  if not arguments:
    return b""
  if isinstance(arguments[0], (bytes, bytearray)) and len(arguments) == 1:
    return bytes(arguments[0])
  return _encode(*arguments)


def _complex(real: Any, imaginary: Any) -> complex:
  if not (type(real) is float and type(imaginary) is float):
    raise DamagedError("is damaged: a complex number lacks its parts")
  return complex(real, imaginary)


def _dict(*arguments: Any) -> dict:
  """An OrderedDict becomes a dict; its items come as pairs, or later one by one."""
  made: dict = {}
  if arguments:
    (pairs,) = arguments
    if type(pairs) is not list:
      raise DamagedError("is damaged: an ordered dict has no items")
    keys, values = zip(*pairs) if pairs else ((), ())
    set_items(made, keys, values)
  return made
