"""`.npz` files: arrays come back; bombs, objects and broken files end in a sentence."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from cwm_jax.data import npz
from cwm_jax.types import InputError


def _npy(shape, raw: bytes, kind="<f4", version=b"\x01\x00", extra="") -> bytes:
  text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, {extra}}}\n".encode()
  layout = "<H" if version == b"\x01\x00" else "<I"
  return b"\x93NUMPY" + version + struct.pack(layout, len(text)) + text + raw


def _zip(path, content: bytes, kind=zipfile.ZIP_DEFLATED):
  with zipfile.ZipFile(path, "w", kind) as archive:
    archive.writestr("a.npy", content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_in_shape_type_and_order(tmp_path, save):
  arrays = {
    "a": np.arange(6, dtype=">i2").reshape(2, 3),
    "b": np.asfortranarray(np.ones((2, 3), np.float32)),
    "c": np.array(True),
    "d": np.zeros((0, 4)),
  }
  save(tmp_path / "x.npz", **arrays)
  found = npz.load_arrays(tmp_path / "x.npz", list(arrays))
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype and found[name].flags.writeable
    np.testing.assert_array_equal(found[name], array)


class _Trap:
  def __reduce__(self):
    return os.mkdir, ("MARKER",)


def _objects(path):
  np.savez(path, a=np.array([_Trap()], dtype=object))


def _bomb(path):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    with archive.open("a.npy", "w", force_zip64=True) as file:
      file.write(_npy((npz.MAX_BYTES // 4,), b""))
      for _ in range(npz.MAX_BYTES >> 24):
        file.write(bytes(1 << 24))


def _understated(path):
  """The directory says 4 kB; the member unpacks to 40 MB."""
  _zip(path, _npy((10_000_000,), bytes(40_000_000)))
  raw = bytearray(path.read_bytes())
  struct.pack_into("<I", raw, raw.rindex(b"PK\x01\x02") + 24, 4096)
  path.write_bytes(bytes(raw))


def _written(content):
  return lambda path: _zip(path, content)


HOSTILE = {
  "not a zip": (lambda p: p.write_bytes(b"points, honestly"), "cannot be read as an .npz"),
  "no such array": (lambda p: np.savez(p, b=np.zeros(1)), "lacks an array"),
  "objects": (_objects, "it holds objects"),
  "a bomb": (_bomb, "unpacks to more than 256 MiB"),
  "an understated bomb": (_understated, "cannot be read as an .npz"),
  "shape beyond the bytes": (_written(_npy((2**50,), bytes(8))), "does not fit its bytes"),
  "negative shape": (_written(_npy((-2, -1), bytes(8))), "cannot be read as an .npz"),
  "nothing but a name": (_written(b"\x93NUMPY"), "cannot be read"),
  "a later version": (_written(_npy((2,), bytes(8), version=b"\x07\x00")), "version"),
  "header of code": (_written(_npy("__import__('os').mkdir('MARKER')", b"")), "cannot be read"),
  "zero-width text": (_written(_npy((2**40,), b"", kind="<U0")), "does not fit its bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_ends_in_one_sentence_runs_nothing_and_takes_no_memory(
  tmp_path, monkeypatch, kind
):
  monkeypatch.chdir(tmp_path)
  make, sentence = HOSTILE[kind]
  path = tmp_path / "given.npz"
  make(path)
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match=sentence) as caught:
      npz.load_arrays(path, ["a"])
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert "given.npz" in str(caught.value) and "\n" not in str(caught.value)
  assert list(tmp_path.iterdir()) == [path]
  assert peak < 1_000_000


def test_every_truncation_ends_in_a_sentence(tmp_path):
  buffer = io.BytesIO()
  np.savez_compressed(buffer, a=np.arange(50))
  whole = buffer.getvalue()
  for stop in range(0, len(whole), 13):
    (tmp_path / "cut.npz").write_bytes(whole[:stop])
    with pytest.raises(InputError):
      npz.load_arrays(tmp_path / "cut.npz", ["a"])
