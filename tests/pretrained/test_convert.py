"""Conversion: every key accounted for, exact round trips, the release's order of loading."""

from __future__ import annotations

import json

import jax
import joint_job
import numpy as np
import pytest
from torch_writer import Global, Tensor, write

from cwm_jax.configs import base as defaults
from cwm_jax.pretrained import (
  convert,
  flow_predictors,
  keymaps,
  safetensors_file,
  two_stream_keys,
  weights,
)
from cwm_jax.pretrained.merge import NamesError
from cwm_jax.tasks import joint_building
from cwm_jax.types import InputError

HEADS = (2, 4)
RNG = np.random.default_rng(0)


def _linear(name, out, into):
  return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name, width):
  return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _half(name, width, depth):
  shapes = _norm(f"{name}.norm", width)
  for i in range(depth):
    block = f"{name}.blocks.{i}"
    shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
    shapes |= {f"{block}.attn.{kind}_bias": (width,) for kind in "qkv"}
    shapes |= {f"{block}.attn.qkv.weight": (3 * width, width)}
    shapes |= _linear(f"{block}.attn.proj", width, width)
    shapes |= _linear(f"{block}.mlp.fc1", 4 * width, width)
    shapes |= _linear(f"{block}.mlp.fc2", width, 4 * width)
  return shapes


def _base_shapes(side=2, patch=4, encoder=8, decoder=12):
  """A released base predictor, tiny: 2 + 1 blocks."""
  count = 2 * side * side
  return {
    "mask_token": (1, 1, encoder),
    "pos_embed": (1, count, decoder),
    "encoder.pos_embed": (1, count, encoder),
    "encoder.patch_embed.proj.weight": (encoder, 3, 1, patch, patch),
    "encoder.patch_embed.proj.bias": (encoder,),
    **_half("encoder", encoder, 2),
    **_linear("encoder_to_decoder", decoder, encoder),
    **_half("decoder", decoder, 1),
    **_linear("decoder.head", 3 * patch * patch, decoder),
  }


def _perturber_shapes(width=8, hidden=6):
  shapes = {}
  for at, out, into in ((0, hidden, width), (3, hidden, hidden), (6, 18, hidden)):
    shapes |= _linear(f"nn.mlp.{at}", out, into) | _norm(f"nn.mlp.{at + 1}", out)
  return shapes


def _random(shapes, prefix=""):
  return {prefix + n: RNG.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def _joint(base=True):
  """What joint training saves: a flow predictor, and Psi-flow beside it."""
  state = _random(_perturber_shapes(), "flow_predictor.perturber.") | _psi_flow()
  return state | (_random(_base_shapes(), "flow_predictor.cwm_model.") if base else {})


PSI_FLOW = "recon_cwm_model.two_stream_vmae."


def _psi_flow(width=8, decoder=12):
  """A released Psi-flow, tiny: 3 + 2 blocks."""
  links = ("o<->o", "o-_", "o-_"), ("o<-_", "o-_")
  sizes = dict(encoder_width=width, encoder_heads=2, decoder_width=decoder, decoder_heads=4)
  section = defaults.get_config().flow_predictor
  section.update(kind="two_stream", patch=4)
  section.two_stream.update(encoder_links=links[0], decoder_links=links[1], **sizes)
  shapes = flow_predictors.expected_shapes({"flow_predictor": section.to_dict()}, where="here")
  params = {n: RNG.normal(size=x.shape) for n, x in weights.flatten(shapes).items()}
  rules = two_stream_keys.two_stream_rules(*links, prefix=PSI_FLOW)
  return keymaps.to_state(weights.unflatten(params), rules)


def _assert_same(found, wanted):
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    assert found[name].shape == array.shape and found[name].dtype == np.float32, name
    np.testing.assert_array_equal(found[name], array)


def _round_trip(tmp_path, made):
  path = weights.save(tmp_path / "ours.safetensors", made.params, made.config, extra=made.extra)
  return convert.to_state(path)


@pytest.mark.parametrize("kind", ["base", "flow predictor", "joint training"])
def test_a_release_comes_back_from_our_weights_file_bit_for_bit(tmp_path, kind):
  state = _random(_base_shapes()) if kind == "base" else _joint()
  if kind == "flow predictor":
    top = "flow_predictor."
    state = {n[len(top) :]: a for n, a in state.items() if n.startswith(top)}
  made = convert.from_state(state, heads=HEADS, where="state")
  _assert_same(_round_trip(tmp_path, made), state)
  assert made.skipped == {}


def test_psi_flow_comes_along_and_is_read_by_itself(tmp_path):
  state = _joint()
  made = convert.from_state(state, heads=HEADS, where="state")
  path = weights.save(tmp_path / "ours.safetensors", made.params, made.config, extra=made.extra)
  assert "flow_predictor" not in weights.load(path)[0]
  module, params = weights.load_flow_predictor(path)
  assert (module.setting, module.encoder_heads, module.decoder_heads) == ("release", *HEADS)
  want = state[f"{PSI_FLOW}decoder.output_layers.head_primary.weight"].T
  np.testing.assert_array_equal(params["head"]["kernel"], want)
  given = [np.zeros(shape, np.float32) for shape in ((1, 8, 8, 3), (1, 2, 2), (1, 2, 2))]
  image = jax.eval_shape(module.apply, {"params": params}, *given)
  assert image.shape == (1, 8, 8, 3)
  bare = convert.from_state(_random(_base_shapes()), heads=HEADS, where="state")
  without = weights.save(tmp_path / "bare.safetensors", bare.params, bare.config)
  assert weights.load_flow_predictor(without) is None


def test_a_joint_training_goes_on_from_the_psi_flow_that_a_release_brings(tmp_path):
  made = convert.from_state(_joint(), heads=HEADS, where="state")
  path = weights.save(tmp_path / "ours.safetensors", made.params, made.config, extra=made.extra)
  changes = dict(flow_predictor__kind="file", perturber__init="file", perturber__file=str(path))
  task = joint_building.build(joint_job.get_config(path, joint__num_points=1, **changes))
  for name in ("flow_predictor", "perturber"):
    jax.tree.map(np.testing.assert_array_equal, task.given[name], made.params[name])
  config = joint_job.get_config(joint_job.weights_file(tmp_path), flow_predictor__kind="file")
  with pytest.raises(InputError, match="holds no Psi-flow"):
    joint_building.build(config)


def test_a_psi_flow_of_unknown_heads_asks_for_them():
  with pytest.raises(InputError, match="heads.*--heads"):
    convert.from_state(_joint(), where="state")


def test_a_part_of_psi_flow_that_is_gone_is_told():
  state = _joint()
  gone = f"{PSI_FLOW}encoder.two_stream_transformer.blocks.2.self_attn_layers_primary.mlp.fc1.bias"
  del state[gone]
  with pytest.raises(NamesError) as error:
    convert.from_state(state, heads=HEADS, where="state")
  assert error.value.sides == {"missing": [gone]}


def test_a_torch_file_is_converted_as_the_tensors_in_it(tmp_path):
  state = _random(_base_shapes())
  saved = {n: Tensor(a, parameter=n == "mask_token") for n, a in state.items()}
  content = {"model": saved, "args": Global("argparse", "Namespace", (), {"lr": 0.1}), "epoch": 7}
  made = convert.assemble([write(tmp_path / "base.pt", content)], heads=HEADS)
  _assert_same(_round_trip(tmp_path, made), state)
  model = made.config["model"]
  assert (model["encoder_depth"], model["decoder_depth"], model["mlp_ratio"]) == (2, 1, 4.0)
  assert (model["masking"], model["positions_hw"], model["image_hw"]) == ("token", (2, 2), (8, 8))
  assert (model["encoder_heads"], model["decoder_heads"]) == HEADS


@pytest.mark.parametrize("bare", [False, True])
def test_a_release_with_fixed_positions_and_fewer_biases_makes_the_round_trip(tmp_path, bare):
  gone = ("pos_embed", "k_bias", "encoder_to_decoder.bias") if bare else ("pos_embed",)
  state = {n: a for n, a in _random(_base_shapes()).items() if not n.endswith(gone)}
  state["mask_token"] = np.ones((1, 1, 12), np.float32)
  made = convert.from_state(state, heads=HEADS, where="state")
  model = made.config["model"]
  assert (model["masking"], model["positions"], model["positions_hw"]) == ("drop", "sine", ())
  _assert_same(_round_trip(tmp_path, made), state)


def test_names_with_the_prefix_of_data_parallel_training_lose_it(tmp_path):
  state = _random(_base_shapes())
  path = write(tmp_path / "b.pt", {"module." + n: Tensor(a) for n, a in state.items()})
  _assert_same(convert.read_state(path), state)


def test_a_converted_release_is_a_model_that_runs_with_its_own_mark(tmp_path):
  from cwm_jax.tracker import Tracker

  made = convert.from_state(_joint(), heads=HEADS, where="state")
  assert made.config["mark"] == {"kind": "learned", "hidden_width": 6, "size": 20, "scale": 1}
  path = weights.save(tmp_path / "ours.safetensors", made.params, made.config, extra=made.extra)
  tracker = Tracker.load(path, num_masks=1, mask_ratio=0.5)
  frames = RNG.integers(0, 256, (2, 8, 8, 3), np.uint8)
  mark = tracker.explain(frames[0], frames[1], [5, 5]).mark
  # The fixed square would have 4 pixels; the learned mark's grid covers the whole little image.
  assert np.count_nonzero(np.abs(mark).sum(axis=-1)) > 16


def test_the_joint_checkpoint_is_laid_over_the_base_and_wins(tmp_path):
  base, over = _random(_base_shapes()), _joint()
  state, overlaid = convert.overlay(base, over)
  assert sorted(overlaid) == sorted(f"cwm_model.{name}" for name in base)
  top = "flow_predictor."
  _assert_same(state, {n.removeprefix(top): a for n, a in over.items()})


def test_a_switch_keeps_the_base_and_takes_only_what_it_lacks():
  base, over = _random(_base_shapes()), _joint()
  state, overlaid = convert.overlay(base, over, keep_base=True)
  assert overlaid == []
  np.testing.assert_array_equal(state["cwm_model.pos_embed"], base["pos_embed"])
  name = "perturber.nn.mlp.0.weight"
  np.testing.assert_array_equal(state[name], over[f"flow_predictor.{name}"])


def test_two_files_become_one_and_what_was_done_is_told(tmp_path):
  base, over = _random(_base_shapes()), _joint(base=False)
  over["flow_predictor.cwm_model.mask_token"] = np.zeros((1, 1, 8), np.float32)
  files = [
    write(tmp_path / f"{name}.pt", {"model": {n: Tensor(a) for n, a in state.items()}})
    for name, state in (("base", base), ("over", over))
  ]
  made = convert.assemble(files, heads=HEADS)
  assert made.overlaid == ("cwm_model.mask_token",)
  assert made.notes[0] == "laid 1 tensors over the base's (cwm_model.mask_token)"
  np.testing.assert_array_equal(made.params["mask_token"], np.zeros(8))
  kept = convert.assemble(files, heads=HEADS, keep_base=True)
  np.testing.assert_array_equal(kept.params["mask_token"], base["mask_token"].reshape(-1))


def test_a_mismatch_carries_both_whole_lists_and_a_short_sentence():
  state = _random(_base_shapes())
  gone = [n for n in state if n.startswith("decoder.blocks.0.mlp")] + ["mask_token"]
  for name in gone:
    del state[name]
  state |= {f"surplus.{i}": np.zeros(1, np.float32) for i in range(9)}
  with pytest.raises(
    NamesError, match=r"the file does not fit .*missing.*and 1 more; unex"
  ) as told:
    convert.from_state(state, heads=HEADS, where="the file")
  assert sorted(told.value.sides["missing"]) == sorted(gone)
  assert len(told.value.sides["unexpected"]) == 9
  lines = convert.listing(told.value).splitlines()
  assert "  surplus.8" in lines and "  mask_token" in lines and len(lines) == 16


def _without(state, name):
  return {n: a for n, a in state.items() if n != name}


BROKEN = {
  "another model": (lambda s: {"cnet.conv1.weight": np.zeros(1)}, "layout of no release"),
  "no heads": (lambda s: s, "how many attention heads"),
  "a block missing": (
    lambda s: {n: a for n, a in s.items() if "encoder.blocks.0" not in n},
    "missing: encoder.blocks.0",
  ),
  "a tensor missing": (lambda s: _without(s, "decoder.norm.bias"), "missing: decoder.norm.bias"),
  "a block of a billion": (
    lambda s: s | {"encoder.blocks.999999999.norm1.bias": np.zeros(8)},
    "unexpected: encoder.blocks.999999999",
  ),
  "another shape": (
    lambda s: s | {"decoder.head.weight": np.zeros((48, 13), np.float32)},
    "of another shape: head/kernel",
  ),
  "another rank": (lambda s: s | {"decoder.head.weight": np.zeros(48)}, "should have 2 axes"),
  "blocks that differ": (
    lambda s: s | {"encoder.blocks.1.norm1.bias": np.zeros(9)},
    "differ in shape",
  ),
  "not finite": (
    lambda s: s | {"mask_token": np.full((1, 1, 8), np.nan, np.float32)},
    "not finite",
  ),
  "positions that are not square": (
    lambda s: s | {"encoder.pos_embed": np.zeros((1, 6, 8)), "pos_embed": np.zeros((1, 6, 12))},
    "not square",
  ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_state_that_does_not_fit_is_refused_in_one_sentence(kind):
  change, sentence = BROKEN[kind]
  heads = None if kind == "no heads" else HEADS
  with pytest.raises(InputError, match=sentence) as caught:
    convert.from_state(change(_random(_base_shapes())), heads=heads, where="FILE")
  assert "FILE" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "heads, release, sentence",
  [
    ((3, 4), None, "width of 8 does not divide into 3"),
    (None, "opt-cwm-512", "is not opt-cwm-512: its patch is 4, not 8"),
    (None, "opt-cwm-9", "unknown release 'opt-cwm-9'"),
  ],
)
def test_settings_that_contradict_the_shapes_are_refused(heads, release, sentence):
  with pytest.raises(InputError, match=sentence):
    convert.from_state(_random(_base_shapes()), heads=heads, release=release, where="FILE")


def test_a_weights_file_whose_mark_lacks_parameters_is_refused(tmp_path):
  made = convert.from_state(_joint(), heads=HEADS, where="state")
  del made.params["perturber"]["fc2"]
  path = weights.save(tmp_path / "o.safetensors", made.params, made.config, extra=made.extra)
  with pytest.raises(InputError, match="missing: perturber/fc2"):
    weights.load_perturber(path)


def test_parameters_that_a_release_has_no_place_for_are_named(tmp_path):
  made = convert.from_state(_random(_base_shapes()), heads=HEADS, where="state")
  made.params["context_embed"] = {"kernel": np.zeros(3, np.float32)}
  path = weights.save(tmp_path / "o.safetensors", made.params, made.config, extra=made.extra)
  with pytest.raises(InputError, match="unexpected: context_embed/kernel"):
    convert.to_state(path)


def test_someone_elses_safetensors_are_read_with_every_type(tmp_path):
  from safetensors.numpy import save_file

  arrays = {
    "steps": np.arange(3, dtype=np.int64),
    "flag": np.array([True, False]),
    "half": np.float16([1.5]),
    "number": np.array(2.5, np.float32),
  }
  save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
  found = safetensors_file.read(tmp_path / "a.safetensors")
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype and found[name].shape == array.shape
    np.testing.assert_array_equal(found[name], array)
  assert not weights.is_ours(tmp_path / "a.safetensors")


def _manifest(cwm_goldens):
  return {
    name: tuple(shape)
    for name, shape in json.loads((cwm_goldens / "manifest_optcwm_full.json").read_text()).items()
  }


def test_the_key_map_accounts_for_every_key_of_the_full_release_without_allocating(cwm_goldens):
  shapes = _manifest(cwm_goldens)
  # Broadcast zeros have the shapes of the release and no memory of their own.
  naming = convert.naming_of(shapes, where="manifest")
  found = keymaps.to_shapes(shapes, naming.rules(), where="manifest")
  numbers = sum(int(np.prod(s)) for s in shapes.values())
  assert sum(int(np.prod(s)) for s in found.values()) == numbers
  from cwm_jax.configs import opt_cwm

  config = {
    "model": opt_cwm.get_config("opt-cwm-512").model.to_dict(),
    "mark": dict(kind="learned", scale=2, **opt_cwm.PERTURBER),
  }
  _, expected = weights.expected_shapes(config, where="manifest")
  top = "flow_predictor/"
  theirs = {n.removeprefix(top): s for n, s in found.items() if n.startswith(top)}
  told = flow_predictors.told_by_shapes(theirs, naming.links, heads=None, where="manifest")
  assert told["two_stream"]["grid_hw"] == (28, 28)
  section = defaults.get_config().flow_predictor.to_dict() | told
  mine = flow_predictors.expected_shapes({"flow_predictor": section}, where="manifest")
  expected |= {f"{top}{n}": x.shape for n, x in weights.flatten(mine).items()}
  weights.check_names(found, expected, where="manifest")


@pytest.mark.parametrize(
  "case, section", [("c1_base_cwm", "base_cwm"), ("c4_flow", "base_cwm"), ("c5_optcwm", "base_cwm")]
)
def test_states_of_the_public_code_make_the_round_trip(tmp_path, cwm_goldens, case, section):
  settings = json.loads((cwm_goldens / "config.json").read_text())[section]
  heads = (settings["encoder_num_heads"], settings["decoder_num_heads"])
  path = cwm_goldens / f"{case}_state.safetensors"
  made = convert.assemble([path], heads=heads)
  _assert_same(_round_trip(tmp_path, made), safetensors_file.read(path))
