"""Pickles: plain data and arrays come back; anything else ends in a sentence and runs nothing."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from cwm_jax.data.pickle_machine import MAX_BYTES_PER_BYTE
from cwm_jax.data.unpickle import load_pickle
from cwm_jax.types import InputError


def _saved(tmp_path, raw: bytes):
  path = tmp_path / "given.pkl"
  path.write_bytes(raw)
  return path


def _content():
  rng = np.random.default_rng(0)
  return {
    "video": rng.integers(0, 255, (2, 3, 4, 3), np.uint8),
    "points": np.asfortranarray(rng.normal(size=(3, 2)).astype(np.float32)),
    "strided": np.arange(10)[::2],
    "big-endian": np.arange(3).astype(">f4"),
    "occluded": np.array([True, False]),
    "words": np.array(["ab", "c"]),
    "none": np.zeros((0, 24, 2), np.float32),
    "scalar": np.float32(3),
    "number": np.array(7),
    "text": "\u00e9" * 3,
    "bytes": b"\x00\xff",
    "no bytes": b"",
    "buffer": bytearray(b"12"),
    "list": [1, -5, 2**80, 300, 70_000, 1.5, None, True, False, 1j],
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "ordered": collections.OrderedDict(a=1, b=2),
    "shared": [{"x": 1}] * 3,
    3: ["a"] * 300,
    (1, "a"): "a key of two",
  }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_python_pickles_comes_back_equal(tmp_path, protocol):
  content = _content()
  found = load_pickle(_saved(tmp_path, pickle.dumps(content, protocol)))
  assert list(found) == list(content)
  for name, value in content.items():
    if isinstance(value, (np.ndarray, np.generic)):
      np.testing.assert_array_equal(found[name], value)
      assert found[name].dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
    else:
      assert found[name] == value, name


def test_an_array_of_python_2_and_an_old_numpy_is_read(tmp_path):
  raw = (
    b"\x80\x02}U\x06pointscnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
    b"J\xff\xff\xff\xffK\x00tb\x89U\x08" + struct.pack("<ff", 1.5, -2.0) + b"tbs."
  )
  np.testing.assert_array_equal(
    load_pickle(_saved(tmp_path, raw))["points"], np.float32([1.5, -2.0])
  )


def test_values_that_share_an_array_still_share_it(tmp_path):
  array = np.arange(4)
  first, second = load_pickle(_saved(tmp_path, pickle.dumps([array, array])))
  assert first is second


class _Attack:
  """What `pickle.load` would run."""

  def __init__(self, function, *arguments):
    self.reduced = function, arguments

  def __reduce__(self):
    return self.reduced


def _array(shape, raw: bytes, kind="f4", setting=b"\x80\x04"):
  """A pickle of one array whose shape and bytes need not agree."""
  head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
  text = pickle.dumps(kind, 2)[2:-1]
  dims = pickle.dumps(tuple(shape), 2)[2:-1]
  body = b"cnumpy\ndtype\n" + text + b"\x89\x88\x87R\x89" + pickle.dumps(raw, 3)[2:-1] + b"tb."
  return setting + head + dims + body


def _nested_key():
  """A dict key of 60 doubled tuples, whose hash alone would take 2**60 steps."""
  return b"\x80\x02}K\x01" + b"2\x86" * 60 + b"Ns."


HOSTILE = {
  "empty": (b"", "is empty"),
  "text": (b"not a pickle at all", "is not a pickle"),
  "text protocol": (pickle.dumps([1], 0), "protocol 2 to 5"),
  "later protocol": (b"\x80\x09.", "protocol 9"),
  "cut short": (pickle.dumps([1.5] * 100)[:-50], "is cut short"),
  "no end": (b"\x80\x04]", "is cut short"),
  "stack left over": (b"\x80\x04]].", "is damaged"),
  "nothing on the stack": (b"\x80\x04.", "is damaged"),
  "append to nothing": (b"\x80\x04Na.", "is damaged"),
  "unknown memo": (b"\x80\x04h\x07.", "is damaged"),
  "frame of 2**62": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "is cut short"),
  "bytes of 2**62": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "is cut short"),
  "bytearray of 2**40": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "is cut short"),
  "text of 4 GB": (b"\x80\x02X\xff\xff\xff\xffa.", "is cut short"),
  "array of 2**50": (_array([2**25, 2**25], bytes(8)), "does not fit its 8 bytes"),
  "array of too few": (_array([3], bytes(8)), "does not fit its 8 bytes"),
  "negative shape": (_array([-1, -2], bytes(8)), "shape is no tuple of whole numbers"),
  "endless empty rows": (_array([2**40, 0], b""), "does not fit its 0 bytes"),
  "100 axes": (_array([1] * 100, bytes(4)), "does not fit"),
  "objects": (pickle.dumps(np.array([print, None])), "type 'O8'"),
  "zero-width text": (_array([2**40], b"", kind="S0"), "type 'S0'"),
  "records": (pickle.dumps(np.zeros(2, [("a", "f4")])), "type 'V4'|records"),
  "array left empty": (_array([2], bytes(8))[: -len(b"(K\x01") - 60] + b".", "damaged|cut short"),
  "contains itself": (b"\x80\x04]\x942h\x00a.", "damaged|contains itself"),
  "list in itself": (b"\x80\x04]\x94h\x00a.", "contains itself"),
  "deep nesting": (b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".", "more than 100 deep"),
  "doubled 60 times": (b"\x80\x04K\x01" + b"2\x86" * 60 + b".", "unfolds into far more"),
  "key of doubled tuples": (_nested_key(), "neither text nor a number"),
  "a list as key": (b"\x80\x04}]Ns.", "neither text nor a number"),
  "a set": (pickle.dumps({1, 2}, 4), "makes no plain data"),
  "extension registry": (b"\x80\x04\x82\x01.", "makes no plain data"),
  "persistent id": (b"\x80\x04K\x01Q.", "outside the file"),
  "os.system": (pickle.dumps(_Attack(os.system, "touch MARKER"), 2), r"system'; only plain"),
  "eval": (pickle.dumps(_Attack(eval, "open('MARKER', 'w')"), 4), r"eval'; only plain"),
  "a class": (pickle.dumps(collections.Counter("ab")), r"'collections.Counter'"),
  "numpy's own loader": (
    b"\x80\x04cnumpy\nload\nX\x06\x00\x00\x00MARKER\x85R.",
    r"asks for 'numpy.load'",
  ),
  "dotted name": (b"\x80\x04X\x05\x00\x00\x00numpyX\x0b\x00\x00\x00ndarray.sum\x93.", "asks for"),
  "state of a list": (b"\x80\x04]Nb.", "state of a list"),
  "encode elsewhere": (
    pickle.dumps(_Attack(__import__("_codecs").encode, "a", "bz2"), 2),
    "asks to encode",
  ),
  "call of text": (b"\x80\x04X\x01\x00\x00\x00a)R.", "calls something"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_ends_in_one_sentence_runs_nothing_and_takes_no_memory(
  tmp_path, monkeypatch, kind
):
  monkeypatch.chdir(tmp_path)
  raw, sentence = HOSTILE[kind]
  path = _saved(tmp_path, raw)
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match=sentence) as caught:
      load_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
  assert list(tmp_path.iterdir()) == [path]
  # Beyond the bound of what a file makes: the error, its traceback, the machine.
  assert peak < MAX_BYTES_PER_BYTE * len(raw) + 300_000


@pytest.mark.parametrize(
  "unit", [b"]", b"}", b"(", b"2", b"}K\x01Ns", b"\x94", b"ccollections\nOrderedDict\n)R"]
)
def test_no_operation_makes_more_memory_than_the_stated_multiple(tmp_path, unit):
  raw = b"\x80\x04}" + unit * (6_000 // len(unit))
  path = _saved(tmp_path, raw)
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match="cut short"):
      load_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < MAX_BYTES_PER_BYTE * len(raw) + 300_000


def test_every_truncation_and_many_a_flipped_byte_end_in_a_value_or_a_sentence(tmp_path):
  whole = pickle.dumps(_content(), 4)
  for stop in range(0, len(whole), 23):
    with pytest.raises(InputError):
      load_pickle(_saved(tmp_path, whole[:stop]))
  rng = np.random.default_rng(1)
  for _ in range(100):
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] = rng.integers(256)
    try:
      load_pickle(_saved(tmp_path, bytes(damaged)))
    except InputError as error:
      assert "given.pkl" in str(error)


@pytest.mark.parametrize("make", [lambda p: p / "absent.pkl", lambda p: p, lambda p: "/dev/zero"])
def test_what_is_no_file_is_said_in_a_sentence(tmp_path, make):
  with pytest.raises(InputError, match="cannot be read|is not a file"):
    load_pickle(make(tmp_path))
