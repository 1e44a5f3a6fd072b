"""Weights files: what comes back is what was saved, and what is broken ends in a sentence."""

from __future__ import annotations

import errno
import json
import resource
import struct

import ml_dtypes
import numpy as np
import pytest
import tiny_model

from cwm_jax.pretrained import weights
from cwm_jax.pretrained.merge import check_names, merge
from cwm_jax.types import InputError

MODEL = {"patch": 4, "image_hw": [16, 16], "attention_dtype": "", "attention_impl": ""}
CONFIG = {"model": MODEL, "seed": 3}


def _params():
  rng = np.random.default_rng(0)
  return {
    "encoder": {"blocks": {"kernel": rng.normal(size=(2, 3, 4)).astype(np.float32)}},
    "mask_token": rng.normal(size=(5,)).astype(np.float32),
  }


def _file(tmp_path, header: dict | bytes, body: bytes = b"", length: int | None = None):
  """A safetensors file built by hand, so that it can be wrong in one exact way."""
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  path = tmp_path / "hand.safetensors"
  path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
  return path


def _header(**entries):
  return {"__metadata__": {"config": json.dumps(CONFIG)}, **entries}


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_float32_weights_come_back_bit_for_bit_with_config_and_extra(tmp_path):
  path = weights.save(
    tmp_path / "w.safetensors", _params(), CONFIG, extra={"scores": {"median": 1.5}}
  )
  params, config = weights.load(path)
  assert config == CONFIG
  assert weights.read_header(path).extra == {"scores": {"median": 1.5}}
  flat, want = weights.flatten(params), weights.flatten(_params())
  assert flat.keys() == want.keys() == {"encoder/blocks/kernel", "mask_token"}
  for name in want:
    assert flat[name].dtype == np.float32
    np.testing.assert_array_equal(flat[name], want[name])


def test_bfloat16_weights_take_half_the_room_and_come_back_as_rounded_float32(tmp_path):
  params = {"a": np.linspace(-3, 3, 10_000, dtype=np.float32)}
  small = weights.save(tmp_path / "b.safetensors", params, CONFIG, dtype="bfloat16")
  large = weights.save(tmp_path / "f.safetensors", params, CONFIG)
  assert large.stat().st_size - small.stat().st_size == pytest.approx(
    20_000, abs=16
  )  # the headers' own lengths
  loaded = weights.load(small)[0]["a"]
  assert loaded.dtype == np.float32
  np.testing.assert_array_equal(loaded, params["a"].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_format_is_the_public_one_in_both_directions(tmp_path):
  from safetensors.numpy import load_file, save_file

  path = weights.save(tmp_path / "w.safetensors", _params(), CONFIG)
  np.testing.assert_array_equal(load_file(path)["mask_token"], _params()["mask_token"])
  other = tmp_path / "other.safetensors"
  save_file({"a/b": np.float16([[1, 2]])}, other, metadata={"config": json.dumps(CONFIG)})
  np.testing.assert_array_equal(weights.load(other)[0]["a"]["b"], np.float32([[1, 2]]))


def test_saving_leaves_no_partial_file_and_replaces_an_older_one(tmp_path):
  path = tmp_path / "w.safetensors"
  weights.save(path, {"a": np.zeros(3)}, CONFIG)
  weights.save(path, {"a": np.ones(3)}, CONFIG)
  assert list(tmp_path.iterdir()) == [path]
  np.testing.assert_array_equal(weights.load(path)[0]["a"], np.ones(3, np.float32))


def test_a_weights_file_may_be_read_by_whoever_may_read_other_new_files(tmp_path):
  path = weights.save(tmp_path / "w.safetensors", _params(), CONFIG)
  other = tmp_path / "other"
  other.touch()
  assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
  "kwargs, sentence",
  [
    (dict(params={"a/b": np.zeros(1)}), "cannot be named 'a/b'"),
    (dict(config={"model": object()}), "cannot be written as JSON"),
    (dict(dtype="int8"), "float32 or bfloat16, not 'int8'"),
    (dict(path="nowhere/w.safetensors"), "No such file or directory"),
  ],
)
def test_what_cannot_be_saved_is_said_in_a_sentence(tmp_path, kwargs, sentence):
  named = dict(path="w.safetensors", params={"a": np.zeros(1)}, config=CONFIG) | kwargs
  named["path"] = tmp_path / named["path"]
  with pytest.raises(InputError, match=sentence):
    weights.save(**named)


def test_a_disk_without_room_is_the_cause_of_what_cannot_be_saved(tmp_path):
  path = weights.save(tmp_path / "w.safetensors", {"a": np.ones(3)}, CONFIG)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(InputError, match="cannot write weights .*: File too large") as told:
      weights.save(path, {"a": np.zeros(1000)}, CONFIG)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  cause = told.value.__cause__
  assert (cause.errno, cause.filename) == (errno.EFBIG, str(path))
  assert list(tmp_path.iterdir()) == [path]
  np.testing.assert_array_equal(weights.load(path)[0]["a"], np.ones(3, np.float32))


BROKEN = {
  "empty": (lambda t: _file(t, b"", length=0), "not JSON"),
  "three bytes": (lambda t: _bytes(t, b"abc"), "not a safetensors file, or it is cut short"),
  "text": (lambda t: _bytes(t, b"These are not the weights you seek.\n"), "not a safetensors"),
  "length beyond the file": (lambda t: _file(t, _header(), length=10**6), "cut short"),
  "length of 2**63": (lambda t: _file(t, _header(), length=2**63), "not a safetensors file"),
  "header not JSON": (lambda t: _file(t, b"{'a': 1}"), "header is not JSON"),
  "header not UTF-8": (lambda t: _file(t, b"\xff\xfe{}"), "header is not JSON"),
  "deeply nested header": (lambda t: _file(t, b"[" * 200_000), "header is not"),
  "header a list": (lambda t: _file(t, b"[1, 2]"), "header is not a table"),
  "no config": (lambda t: _file(t, {"a": _entry()}, bytes(8)), "carries no config"),
  "config not JSON": (
    lambda t: _file(t, {"__metadata__": {"config": "{"}, "a": _entry()}, bytes(8)),
    "config is not a JSON object",
  ),
  "config without model": (
    lambda t: _file(t, {"__metadata__": {"config": "{}"}, "a": _entry()}, bytes(8)),
    "no 'model' section",
  ),
  "no tensors": (lambda t: _file(t, _header()), "holds no parameters"),
  "unknown dtype": (lambda t: _file(t, _header(a=_entry("F8")), bytes(8)), "dtype 'F8'"),
  "integer dtype": (lambda t: _file(t, _header(a=_entry("I64", (1,))), bytes(8)), "dtype 'I64'"),
  "dtype a list": (lambda t: _file(t, _header(a=_entry(["F32"])), bytes(8)), "dtype"),
  "name given twice": (
    lambda t: _file(
      t, json.dumps(_header(a=_entry())).replace("}}", '}, "a": {}}').encode(), bytes(8)
    ),
    "names the same tensor twice|malformed",
  ),
  "entry not a table": (lambda t: _file(t, _header(a=7), bytes(8)), "'a' is malformed"),
  "negative offset": (
    lambda t: _file(t, _header(a=_entry(offsets=(-8, 0))), bytes(8)),
    "malformed",
  ),
  "offset not whole": (
    lambda t: _file(t, _header(a=_entry(offsets=(0.0, 8.0))), bytes(8)),
    "malformed",
  ),
  "negative shape": (lambda t: _file(t, _header(a=_entry(shape=(-1, -2))), bytes(8)), "malformed"),
  "huge shape": (
    lambda t: _file(t, _header(a=_entry(shape=(2**40, 2**40))), bytes(8)),
    "does not fit its length",
  ),
  "empty and endless": (
    lambda t: _file(t, _header(a=_entry(shape=(2**62, 2**62, 0), offsets=(0, 0)))),
    "does not fit its length",
  ),
  "empty with an axis beyond all numbers": (
    lambda t: _file(t, _header(a=_entry(shape=(10**30, 0), offsets=(0, 0)))),
    "does not fit its length",
  ),
  "empty and endless by many axes": (
    lambda t: _file(t, _header(a=_entry(shape=(10,) * 31 + (0,), offsets=(0, 0)))),
    "does not fit its length",
  ),
  "huge offsets": (
    lambda t: _file(t, _header(a=_entry(shape=(2**40,), offsets=(0, 2**42))), bytes(8)),
    "cut short: 'a' ends beyond",
  ),
  "body cut short": (lambda t: _file(t, _header(a=_entry()), bytes(7)), "cut short"),
  "overlapping tensors": (
    lambda t: _file(t, _header(a=_entry(), b=_entry(offsets=(4, 12))), bytes(12)),
    "overlap",
  ),
  "a name through another": (
    lambda t: _file(t, _header(**{"a": _entry(), "a/b": _entry(offsets=(8, 16))}), bytes(16)),
    "runs through another",
  ),
  "not finite": (
    lambda t: _file(t, _header(a=_entry()), struct.pack("<ff", 1.0, float("nan"))),
    "'a' holds values that are not finite",
  ),
  "a folder": (lambda t: t, "is a folder"),
  "missing": (lambda t: t / "absent.safetensors", "No such file"),
}


def _bytes(tmp_path, content: bytes):
  path = tmp_path / "raw.safetensors"
  path.write_bytes(content)
  return path


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_weights_file_is_refused_with_one_sentence_that_names_it(tmp_path, kind):
  make, sentence = BROKEN[kind]
  path = make(tmp_path)
  with pytest.raises(InputError, match=sentence) as caught:
    weights.load(path)
  assert str(path) in str(caught.value) or "parameter name" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_every_truncation_of_a_good_file_is_refused(tmp_path):
  whole = weights.save(tmp_path / "w.safetensors", _params(), CONFIG).read_bytes()
  cut = tmp_path / "cut.safetensors"
  for length in range(0, len(whole), 7):
    cut.write_bytes(whole[:length])
    with pytest.raises(InputError):
      weights.load(cut)


def test_flatten_and_unflatten_are_inverses_and_refuse_a_name_used_twice():
  nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
  assert weights.flatten(nested) == {"a/b": 1, "a/c/d": 2, "e": 3}
  assert weights.unflatten(weights.flatten(nested)) == nested
  with pytest.raises(InputError, match="used twice"):
    weights.unflatten({"a/b": 1, "a": 2})


def _tiny_model_config():
  return {"model": tiny_model.config(encoder_depth=2)}


def _tiny_model_file(tmp_path, change=lambda flat, config: None):
  config = _tiny_model_config()
  _, shapes = weights.expected_shapes(config, where="test")
  flat = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
  change(flat, config)
  return weights.save(tmp_path / "tiny.safetensors", weights.unflatten(flat), config)


def test_a_model_is_built_from_its_weights_file_and_runs(tmp_path):
  import jax.numpy as jnp

  module, params, config = weights.load_model(_tiny_model_file(tmp_path))
  assert config["model"]["patch"] == 4
  frames, mask = jnp.zeros((1, 2, 16, 16, 3)), jnp.zeros((1, 2, 4, 4), bool).at[:, 1].set(True)
  prediction = module.apply({"params": params}, frames, mask, num_visible=16)
  assert prediction.image.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
  "change, sentence",
  [
    (lambda flat, config: flat.pop("head/bias"), "missing: head/bias"),
    (lambda flat, config: flat.update({"x/y": np.zeros(1)}), "unexpected: x/y"),
    (
      lambda flat, config: flat.update({"head/bias": np.zeros(7)}),
      r"of another shape: head/bias \(7,\) for \(48,\)",
    ),
    (lambda flat, config: config["model"].pop("patch"), "lacks 'patch'"),
    (lambda flat, config: config["model"].update(dtype="int4"), "describes no model .*int4"),
    (lambda flat, config: config["model"].update(image_hw=[15, 16]), "does not divide"),
    (lambda flat, config: config["model"].update(patch=0), "describes no model"),
    (lambda flat, config: config["model"].update(encoder_width="wide"), "describes no model"),
    (lambda flat, config: config["model"].update(encoder_depth=3), "of another shape"),
  ],
)
def test_weights_that_do_not_fit_their_own_config_are_refused(tmp_path, change, sentence):
  path = _tiny_model_file(tmp_path, change)
  with pytest.raises(InputError, match=sentence) as caught:
    weights.load_model(path)
  assert "tiny.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_names_are_excused_only_where_a_pattern_says_so():
  found, expected = {"a": (1,), "old/x": (2,)}, {"a": (1,), "new/y": (3,)}
  with pytest.raises(InputError, match="missing: new/y; unexpected: old/x"):
    check_names(found, expected, where="file")
  check_names(found, expected, where="file", excuse_missing="new/", excuse_extra="old/")


def test_a_long_list_of_unmatched_names_is_cut_short():
  with pytest.raises(InputError, match="n0, n1, n2, n3 and 6 more"):
    check_names({}, {f"n{i}": () for i in range(10)}, where="file")


def test_merging_takes_the_loaded_values_and_keeps_the_excused_ones():
  merged = merge(
    {"a": np.zeros(2), "head": np.zeros(1)}, {"a": np.ones(2)}, where="f", excuse_missing="head"
  )
  np.testing.assert_array_equal(merged["a"], np.ones(2))
  np.testing.assert_array_equal(merged["head"], np.zeros(1))
