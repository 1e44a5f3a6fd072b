"""Torch files without PyTorch: tensors come back; broken or hostile files end in a sentence."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_writer import Global, Tensor, write

from cwm_jax.data.pickle_machine import Opaque
from cwm_jax.pretrained import torch_file
from cwm_jax.types import InputError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("byteorder", ["little", "big", None])
@pytest.mark.parametrize(
  "dtype",
  [
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16),
    *(np.int64, np.uint8, np.bool_, np.complex64),
  ],
)
def test_every_type_comes_back_bit_for_bit_in_either_byte_order(tmp_path, dtype, byteorder):
  array = (RNG.normal(size=(2, 3)) * 3).astype(dtype)
  path = write(tmp_path / "a.pt", {"a": Tensor(array)}, byteorder=byteorder)
  found = torch_file.read(path)["a"]
  assert found.dtype == array.dtype
  np.testing.assert_array_equal(found, array)


def test_strides_and_offsets_select_what_torch_would(tmp_path):
  base = np.arange(24, dtype=np.float32)
  value = {
    "transposed": Tensor(base, size=(4, 6), stride=(1, 4)),
    "slice": Tensor(base, size=(2, 2), stride=(6, 2), offset=7),
    "scalar": Tensor(base, size=(), stride=(), offset=23),
    "empty": Tensor(base[:0], size=(0, 5), stride=(5, 1)),
    "parameter": Tensor(base, parameter=True),
  }
  found = torch_file.read(write(tmp_path / "a.pt", value))
  np.testing.assert_array_equal(found["transposed"], base.reshape(6, 4).T)
  np.testing.assert_array_equal(found["slice"], [[7, 9], [13, 15]])
  assert found["scalar"].shape == () and found["scalar"] == 23
  assert found["empty"].shape == (0, 5)
  np.testing.assert_array_equal(found["parameter"], base)


def test_tensors_are_views_of_the_file_and_cost_no_memory_until_copied(tmp_path):
  large = np.ones(2_000_000, np.float32)
  path = write(tmp_path / "a.pt", {"model": {"a": Tensor(large)}})
  tracemalloc.start()
  try:
    found = torch_file.read(path)["model"]["a"]
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < large.nbytes / 8
  assert not found.flags.writeable and found.sum() == large.size


def test_tensors_that_share_a_storage_are_both_read(tmp_path):
  tied = Tensor(np.arange(3, dtype=np.float32), key="0")
  found = torch_file.read(write(tmp_path / "a.pt", {"a": tied, "b": tied}))
  np.testing.assert_array_equal(found["a"], found["b"])


def test_what_else_a_checkpoint_holds_is_kept_as_data_or_as_a_name_that_does_nothing(tmp_path):
  value = {
    "model": Global("collections", "OrderedDict", (), {"_metadata": {"version": 1}}),
    "epoch": 3,
    "args": Global("argparse", "Namespace", (), {"lr": 0.1}),
    "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.5, "betas": (0.9, 0.95)}]},
    "size": Global("torch", "Size", ((2, 3),)),
    "module": Global("somewhere.training", "Secret", ("touch MARKER",), {"a": 1}),
  }
  found = torch_file.read(write(tmp_path / "a.pt", value))
  assert found["epoch"] == 3 and found["size"] == (2, 3) and found["model"] == {}
  assert found["optimizer"] == value["optimizer"]
  assert isinstance(found["args"], Opaque) and found["args"].name == "argparse.Namespace"
  assert found["module"].name == "somewhere.training.Secret"


FOUR = np.arange(4, dtype=np.float32)


def _pt(value, **settings):
  return lambda path: write(path, value, **settings)


def _raw(content: bytes):
  return lambda path: path.write_bytes(content)


def _patched(value, change):
  """A good file, then changed as a whole."""

  def make(path):
    write(path, value)
    path.write_bytes(change(path.read_bytes()))

  return make


def _central(raw: bytes, at: int, layout: str, number: int, nth: int = -1) -> bytes:
  """Overwrites a field of the nth entry of the zip's central directory."""
  places = [i for i in range(len(raw)) if raw.startswith(b"PK\x01\x02", i)]
  changed = bytearray(raw)
  struct.pack_into(layout, changed, places[nth] + at, number)
  return bytes(changed)


def _bomb(path):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02}.")
    archive.writestr("archive/data/0", bytes(30_000_000))


def _twice(path):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.warns(UserWarning, match="Duplicate"):
      archive.writestr("archive/data.pkl", b"\x80\x02}.")


HOSTILE = {
  "empty": (_raw(b""), "is empty"),
  "text": (_raw(b"weights, honestly\n" * 5), "is not a torch file"),
  "a zip of other things": (
    _pt({}, members={"data.pkl": None}),
    "not one that torch.save wrote",
  ),
  "the old form": (_raw(torch_file._OLD_MAGIC + bytes(99)), "PyTorch before 1.6"),
  "TorchScript": (_pt({}, members={"constants.pkl": b"\x80\x02)."}), "TorchScript"),
  "cut short": (_patched({"a": Tensor(FOUR)}, lambda raw: raw[:-30]), "cut short"),
  "cut in front": (_patched({"a": Tensor(FOUR)}, lambda raw: raw[40:]), "damaged|cut short"),
  "a compressed bomb": (_bomb, "torch.save never compresses"),
  "compressed": (_pt({"a": Tensor(FOUR)}, compress=True), "never compresses"),
  "stored, with another size": (
    _patched({"a": Tensor(FOUR)}, lambda raw: _central(raw, 24, "<I", 10**9)),
    "never compresses",
  ),
  "a member beyond the file": (
    _patched(
      {"a": Tensor(FOUR)},
      lambda raw: _central(_central(raw, 24, "<I", 10**9), 20, "<I", 10**9),
    ),
    "cut short",
  ),
  "a member somewhere else": (
    _patched({"a": Tensor(FOUR)}, lambda raw: _central(raw, 42, "<I", 11)),
    "not where it should be",
  ),
  "overlapping members": (
    _patched({"a": Tensor(FOUR)}, lambda raw: _central(raw, 42, "<I", 0)),
    "overlaps another",
  ),
  "a member twice": (_twice, "twice"),
  "encrypted": (
    _patched({"a": Tensor(FOUR)}, lambda raw: _central(raw, 8, "<H", 1)),
    "encrypted",
  ),
  "unknown byte order": (_pt({"a": Tensor(FOUR)}, members={"byteorder": b"odd"}), "byte order"),
  "no numbers": (_pt({"a": Tensor(FOUR)}, members={"data/0": None}), "lacks the numbers"),
  "a path as a key": (
    _pt({"a": Tensor(FOUR, key="../../x")}, members={"data/../../x": None}),
    "lacks the numbers",
  ),
  "a storage cut short": (_pt({"a": Tensor(FOUR)}, members={"data/0": bytes(15)}), "is shorter"),
  "a storage of 2**60": (_pt({"a": Tensor(FOUR, count=2**60)}), "is shorter"),
  "a negative storage": (_pt({"a": Tensor(FOUR, count=-4)}), "is shorter"),
  "size beyond the storage": (_pt({"a": Tensor(FOUR, size=(5,))}), "reaches beyond"),
  "offset beyond the storage": (_pt({"a": Tensor(FOUR, offset=1)}), "reaches beyond"),
  "stride beyond the storage": (_pt({"a": Tensor(FOUR, stride=(2,))}), "reaches beyond"),
  "a stride of 2**70": (_pt({"a": Tensor(FOUR, stride=(2**70,))}), "reaches beyond"),
  "a negative stride": (_pt({"a": Tensor(FOUR, stride=(-1,), offset=3)}), "not whole numbers"),
  "a negative offset": (_pt({"a": Tensor(FOUR, offset=-1)}), "not whole numbers"),
  "a stride of zero": (_pt({"a": Tensor(FOUR, size=(2**40,), stride=(0,))}), "repeats its few"),
  "more strides than sizes": (_pt({"a": Tensor(FOUR, stride=(1, 1))}), "not whole numbers"),
  "empty and endless": (
    _pt({"a": Tensor(FOUR, size=(2**60, 0), stride=(0, 0))}),
    "repeats its few",
  ),
  "one storage a thousand times": (
    _pt({str(i): Tensor(np.zeros(99_999, np.float32), key="0") for i in range(20)}),
    "far larger than the file",
  ),
  "os.system": (_pt({"a": Global("posix", "system", ("touch MARKER",))}), "have no use for"),
  "subprocess": (_pt({"a": Global("subprocess", "Popen", ("touch MARKER",))}), "no use for"),
  "eval": (_pt({"a": Global("builtins", "eval", ("open('MARKER', 'w')",))}), "no use for"),
  "a storage of another kind": (
    _pt(
      {"a": Tensor(FOUR)},
      members={"data.pkl": b"\x80\x02}X\x01\x00\x00\x00a(X\x01\x00\x00\x00xNNNKtQs."},
    ),
    "damaged",
  ),
  "a tensor without storage": (
    _pt({"a": Global("torch._utils", "_rebuild_tensor_v2", (1, 0, (1,), (1,), False, None))}),
    "no storage",
  ),
  "a bare tensor": (_pt(Tensor(FOUR)), "holds a ndarray; a dict of tensors is read"),
  "a whole module": (_pt(Global("my.model", "Net")), "object of the class 'my.model.Net'"),
  "a broken pickle inside": (_pt({}, members={"data.pkl": b"\x80\x02}"}), "cut short"),
  "lists in lists inside": (
    _pt({}, members={"data.pkl": b"\x80\x02" + b"]" * 900 + b"a" * 899 + b"."}),
    "deep",
  ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_torch_file_ends_in_one_sentence_runs_nothing_and_takes_no_memory(
  tmp_path, monkeypatch, kind
):
  monkeypatch.chdir(tmp_path)
  make, sentence = HOSTILE[kind]
  path = tmp_path / "given.pt"
  make(path)
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match=sentence) as caught:
      torch_file.read(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
  assert list(tmp_path.iterdir()) == [path]
  assert peak < 3_000_000


def test_every_truncation_and_many_a_flipped_byte_end_in_arrays_or_a_sentence(tmp_path):
  path = tmp_path / "given.pt"
  write(path, {"model": {"a": Tensor(FOUR), "b": Tensor(FOUR, stride=(1,))}, "epoch": 1})
  whole = path.read_bytes()
  for stop in range(0, len(whole), 29):
    path.write_bytes(whole[:stop])
    with pytest.raises(InputError):
      torch_file.read(path)
  rng = np.random.default_rng(1)
  for _ in range(100):
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] = rng.integers(256)
    path.write_bytes(bytes(damaged))
    try:
      torch_file.read(path)
    except InputError as error:
      assert "given.pt" in str(error)
