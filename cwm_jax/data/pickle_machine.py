"""Pickle's stack machine, rebuilt so that a file can only make plain data.

Python's own unpickler imports and calls whatever a file names. This one has no import and calls
nothing but the constructors that its `Dialect` offers, each of which makes one plain value. Every
length is compared with what is left of the file before anything is allocated, so what is built
stays below `MAX_BYTES_PER_BYTE` times the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from cwm_jax.types import InputError

MAX_PROTOCOL = 5
MAX_BYTES_PER_BYTE = 128  # the worst of one opcode: a byte that makes an empty dict on the stack
_MAX_STEPS = 10_000_000  # bounds time; the bulk of real data lies in arrays, one step each
_MAX_DEPTH = 100  # of containers in containers; more would overflow whoever walks the result
_MAX_ELEMENTS_PER_BYTE = 16
_MAX_PAYLOAD_PER_BYTE = 1024
_SPARE = 10_000  # small files may repeat themselves more
_KEYS = (str, bytes, int, float, bool, type(None))
_LEAVES = (str, bytes, bytearray, int, float, complex, bool, type(None))


class DamagedError(Exception):
  """The bytes are no pickle of plain data; the text completes "FILE ..."."""


class Opaque:
  """Stands for an object whose class is not known here; never executed, its content dropped."""

  __slots__ = ("name",)

  def __init__(self, name: str):
    self.name = name

  def __repr__(self) -> str:
    return f"Opaque({self.name!r})"


class Constructor:
  """A global that a file may name: `call(*args)` makes a plain value from plain values."""

  __slots__ = ("call",)

  def __init__(self, call: Callable[..., Any]):
    self.call = call


class Dialect:
  """What a machine may make beyond Python's own plain types; the base offers nothing."""

  def find(self, module: str, name: str) -> Constructor | Opaque:
    """The stand-in for a global; raises DamagedError where the file may not name it."""
    raise DamagedError(f"asks for {shown(f'{module}.{name}')}; only plain data is read")

  def persistent(self, identifier: Any) -> Any:
    """The value of a reference to something outside the pickle."""
    raise DamagedError("refers to something outside the file")

  def build(self, target: Any, state: Any) -> None:
    """Gives a value its state, in place; plain dicts and opaque objects have none worth keeping."""
    if not isinstance(target, (dict, Opaque)):
      raise DamagedError(f"sets the state of a {type(target).__name__}")

  def weigh(self, value: Any) -> int:
    """Bytes held by a value that is no plain Python one; raises DamagedError if it may not stay."""
    raise DamagedError("holds something that is not plain data")


def shown(text: str) -> str:
  """A name out of a file, fit for a sentence."""
  return repr(text if len(text) <= 60 else f"{text[:57]}...")


def run(data: Any, dialect: Dialect, *, where: str, file_size: int | None = None) -> Any:
  """Executes a whole pickle.

  Args:
    data: bytes or a memory map, from the pickle's first byte on.
    dialect: what may be made; fresh for each call.
    where: names the file in error messages.
    file_size: of the file around the pickle, where there is one that holds the arrays' bytes.

  Returns:
    The value, checked: no cycles, at most 100 levels deep.

  Raises:
    InputError: not a pickle, cut short, or one that asks for more than plain data.
  """
  try:
    value = _Machine(data, dialect).run()
    _check(value, dialect, file_size or len(data))
  except DamagedError as error:
    raise InputError(f"{where} {error}") from None
  except (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
  ):
    # A wrong order or kind of values on the stack; which one tells a reader nothing.
    raise InputError(f"{where} is damaged, or not a pickle") from None
  return value


class _Machine:
  """One run: a stack, the stacks set aside by marks, and the memo."""

  def __init__(self, data: Any, dialect: Dialect):
    self._data = data
    self._at = 0
    self._stack: list[Any] = []
    self._marks: list[list[Any]] = []
    self._memo: dict[int, Any] = {}
    self._dialect = dialect

  def run(self) -> Any:
    if len(self._data) < 2 or self._data[0] != 0x80:
      raise DamagedError("is not a pickle of protocol 2 to 5")
    for _ in range(_MAX_STEPS):
      code = self._take(1)
      if code == b".":
        (value,) = self._stack
        return value
      operation = _OPERATIONS.get(code)
      if operation is None:
        raise DamagedError(f"uses the pickle operation {code!r}, which makes no plain data")
      operation(self)
    raise DamagedError(f"has more than {_MAX_STEPS:,} pickle operations")

  def _take(self, count: int) -> bytes:
    stop = self._at + count
    if stop > len(self._data):
      raise DamagedError("is cut short")
    piece = self._data[self._at : stop]
    self._at = stop
    return piece

  def _line(self) -> str:
    stop = self._data.find(b"\n", self._at)
    if stop < 0:
      raise DamagedError("is cut short")
    return self._take(stop + 1 - self._at)[:-1].decode()

  def _number(self, layout: str) -> Any:
    return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

  def _sized(self, layout: str) -> bytes:
    return self._take(self._number(layout))

  def _push(self, value: Any) -> None:
    self._stack.append(value)

  def _pop(self) -> Any:
    return self._stack.pop()

  def _since_mark(self) -> list[Any]:
    items, self._stack = self._stack, self._marks.pop()
    return items

  def protocol(self) -> None:
    if (version := self._number("<B")) > MAX_PROTOCOL:
      raise DamagedError(f"is a pickle of protocol {version}; protocols 2 to 5 are read")

  def frame(self) -> None:
    if self._number("<Q") > len(self._data) - self._at:
      raise DamagedError("is cut short")

  def mark(self) -> None:
    self._marks.append(self._stack)
    self._stack = []

  def tuple_of(self, count: int) -> None:
    if len(self._stack) < count:
      raise DamagedError("is damaged: a tuple lacks items")
    items = tuple(self._stack[-count:])
    del self._stack[-count:]
    self._push(items)

  def extend(self, items: list[Any]) -> None:
    target = self._stack[-1]
    if type(target) is list:
      target.extend(items)
    elif not isinstance(target, Opaque):
      raise DamagedError(f"appends to a {type(target).__name__}")

  def append(self) -> None:
    self.extend([self._pop()])

  def update(self, items: list[Any]) -> None:
    target = self._stack[-1]
    if type(target) is dict:
      set_items(target, items[::2], items[1::2])
    elif not isinstance(target, Opaque):
      raise DamagedError(f"sets items of a {type(target).__name__}")

  def set_item(self) -> None:
    value, key = self._pop(), self._pop()
    self.update([key, value])

  def put(self, layout: str) -> None:
    self._memo[self._number(layout)] = self._stack[-1]

  def memoize(self) -> None:
    self._memo[len(self._memo)] = self._stack[-1]

  def get(self, layout: str) -> None:
    self._push(self._memo[self._number(layout)])

  def find(self) -> None:
    module = self._line()
    self._push(self._dialect.find(module, self._line()))

  def find_on_stack(self) -> None:
    name, module = self._pop(), self._pop()
    if not (isinstance(name, str) and isinstance(module, str)):
      raise DamagedError("is damaged: a global's name is no text")
    self._push(self._dialect.find(module, name))

  def call(self, *, named: bool = False) -> None:
    if named and self._pop():
      raise DamagedError("calls a constructor with named arguments")
    arguments, target = self._pop(), self._pop()
    if isinstance(target, Opaque):
      self._push(Opaque(target.name))
    elif isinstance(target, Constructor) and type(arguments) is tuple:
      self._push(target.call(*arguments))
    else:
      raise DamagedError("calls something that is no constructor")

  def build(self) -> None:
    state = self._pop()
    self._dialect.build(self._stack[-1], state)

  def refer(self) -> None:
    self._push(self._dialect.persistent(self._pop()))


def set_items(target: dict, keys: Any, values: Any) -> None:
  """Stores items under keys whose hash is quick: one of nested tuples takes exponential time."""
  for key, value in zip(keys, values, strict=True):
    parts = key if type(key) is tuple else (key,)
    if not all(type(part) in _KEYS or isinstance(part, Opaque) for part in parts):
      raise DamagedError("has a dict key that is neither text nor a number")
    target[key] = value


def _constant(value: Any) -> Callable[[_Machine], None]:
  return lambda m: m._push(value)


_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
  b"\x80": _Machine.protocol,
  b"\x95": _Machine.frame,
  b"(": _Machine.mark,
  b"0": lambda m: m._stack.pop(),
  b"1": lambda m: m._since_mark(),
  b"2": lambda m: m._push(m._stack[-1]),
  b"N": _constant(None),
  b"\x88": _constant(True),
  b"\x89": _constant(False),
  b"J": lambda m: m._push(m._number("<i")),
  b"K": lambda m: m._push(m._number("<B")),
  b"M": lambda m: m._push(m._number("<H")),
  b"\x8a": lambda m: m._push(int.from_bytes(m._sized("<B"), "little", signed=True)),
  b"\x8b": lambda m: m._push(int.from_bytes(m._sized("<I"), "little", signed=True)),
  b"G": lambda m: m._push(m._number(">d")),
  # Text of Python 2, which knew no encoding; latin-1 keeps every byte.
  b"U": lambda m: m._push(m._sized("<B").decode("latin-1")),
  b"T": lambda m: m._push(m._sized("<I").decode("latin-1")),
  b"\x8c": lambda m: m._push(m._sized("<B").decode("utf-8", "surrogatepass")),
  b"X": lambda m: m._push(m._sized("<I").decode("utf-8", "surrogatepass")),
  b"\x8d": lambda m: m._push(m._sized("<Q").decode("utf-8", "surrogatepass")),
  b"C": lambda m: m._push(m._sized("<B")),
  b"B": lambda m: m._push(m._sized("<I")),
  b"\x8e": lambda m: m._push(m._sized("<Q")),
  b"\x96": lambda m: m._push(bytearray(m._sized("<Q"))),
  b"]": lambda m: m._push([]),
  b"a": _Machine.append,
  b"e": lambda m: m.extend(m._since_mark()),
  b")": _constant(()),
  b"t": lambda m: m._push(tuple(m._since_mark())),
  b"\x85": lambda m: m.tuple_of(1),
  b"\x86": lambda m: m.tuple_of(2),
  b"\x87": lambda m: m.tuple_of(3),
  b"}": lambda m: m._push({}),
  b"s": _Machine.set_item,
  b"u": lambda m: m.update(m._since_mark()),
  b"q": lambda m: m.put("<B"),
  b"r": lambda m: m.put("<I"),
  b"\x94": _Machine.memoize,
  b"h": lambda m: m.get("<B"),
  b"j": lambda m: m.get("<I"),
  b"c": _Machine.find,
  b"\x93": _Machine.find_on_stack,
  b"R": _Machine.call,
  b"\x81": _Machine.call,
  b"\x92": lambda m: m.call(named=True),
  b"b": _Machine.build,
  b"Q": _Machine.refer,
}


def _check(value: Any, dialect: Dialect, size: int) -> None:
  """Refuses what is small as stored but endless or huge for whoever walks or copies the result.

  A container may be referred to many times; each reference counts with all that it holds.
  """
  done: dict[int, tuple[int, int, int]] = {}  # id -> depth, elements, bytes, references counted
  open_now: set[int] = set()
  waiting = [value]
  while waiting:
    node = waiting[-1]
    if id(node) in done:
      waiting.pop()
    elif type(node) not in (list, tuple, dict):
      plain = type(node) in _LEAVES
      held = len(node) if isinstance(node, (str, bytes, bytearray)) else 8
      done[id(node)] = (0, 1, held if plain else dialect.weigh(node))
      waiting.pop()
    elif id(node) not in open_now:
      open_now.add(id(node))
      inside = _children(node)
      if any(id(child) in open_now for child in inside):
        raise DamagedError("holds a container that contains itself")
      waiting.extend(inside)
    else:
      open_now.remove(id(node))
      waiting.pop()
      below = [done[id(child)] for child in _children(node)]
      depth = 1 + max((d for d, _, _ in below), default=0)
      elements = 1 + sum(n for _, n, _ in below)
      payload = sum(n for _, _, n in below)
      if depth > _MAX_DEPTH:
        raise DamagedError(f"nests containers more than {_MAX_DEPTH} deep")
      if (
        elements > _MAX_ELEMENTS_PER_BYTE * size + _SPARE
        or payload > _MAX_PAYLOAD_PER_BYTE * size + _SPARE
      ):
        raise DamagedError("unfolds into far more data than the file holds")
      done[id(node)] = (depth, elements, payload)


def _children(node: Any) -> list[Any]:
  return [*node.keys(), *node.values()] if type(node) is dict else list(node)
