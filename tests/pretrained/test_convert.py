"""Conversion: every key accounted for, exact round trips, the release's order of loading."""

from __future__ import annotations

import json

import jax
import joint_job
import numpy as np
import pytest
import tiny_release
from tiny_release import HEADS, PSI_FLOW
from torch_writer import Global, Tensor, write

from cwm_jax.configs import base as defaults
from cwm_jax.pretrained import (
  convert,
  flow_predictors,
  keymaps,
  safetensors_file,
  weights,
)
from cwm_jax.pretrained.merge import NamesError
from cwm_jax.tasks import joint_building
from cwm_jax.types import InputError


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
  state = (
    tiny_release.random(tiny_release.base_shapes()) if kind == "base" else tiny_release.joint()
  )
  if kind == "flow predictor":
    top = "flow_predictor."
    state = {n[len(top) :]: a for n, a in state.items() if n.startswith(top)}
  made = convert.from_state(state, heads=HEADS, where="state")
  _assert_same(_round_trip(tmp_path, made), state)
  assert made.skipped == {}


def test_psi_flow_comes_along_and_is_read_by_itself(tmp_path):
  state = tiny_release.joint()
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
  bare = convert.from_state(
    tiny_release.random(tiny_release.base_shapes()), heads=HEADS, where="state"
  )
  without = weights.save(tmp_path / "bare.safetensors", bare.params, bare.config)
  assert weights.load_flow_predictor(without) is None


def test_psi_flow_may_have_other_heads_than_the_predictor():
  state = tiny_release.joint()
  config = convert.from_state(state, heads=HEADS, flow_heads=(4, 2), where="state").config
  assert (config["model"]["encoder_heads"], config["model"]["decoder_heads"]) == HEADS
  psi_flow = config["flow_predictor"]["two_stream"]
  assert (psi_flow["encoder_heads"], psi_flow["decoder_heads"]) == (4, 2)
  with pytest.raises(InputError, match="width of 12 does not divide into 5"):
    convert.from_state(state, heads=HEADS, flow_heads=(4, 5), where="state")
  bare = tiny_release.random(tiny_release.base_shapes())
  with pytest.raises(InputError, match="holds no Psi-flow"):
    convert.from_state(bare, heads=HEADS, flow_heads=HEADS, where="state")


def test_a_joint_training_goes_on_from_the_psi_flow_that_a_release_brings(tmp_path):
  made = convert.from_state(tiny_release.joint(), heads=HEADS, where="state")
  path = weights.save(tmp_path / "ours.safetensors", made.params, made.config, extra=made.extra)
  changes = dict(flow_predictor__kind="file", perturber__init="file", perturber__file=str(path))
  running = dict(remat="full", attention_impl="xla")
  changes |= {f"flow_predictor__{name}": value for name, value in running.items()}
  task = joint_building.build(joint_job.get_config(path, joint__num_points=1, **changes))
  for name in ("flow_predictor", "perturber"):
    jax.tree.map(np.testing.assert_array_equal, task.given[name], made.params[name])
  # Its sizes are the file's; how it runs is the config's.
  alone, _ = weights.load_flow_predictor(path)
  assert task.flow_predictor == alone.clone(**running)
  config = joint_job.get_config(joint_job.weights_file(tmp_path), flow_predictor__kind="file")
  with pytest.raises(InputError, match="holds no Psi-flow"):
    joint_building.build(config)


def test_a_psi_flow_of_unknown_heads_asks_for_them():
  with pytest.raises(InputError, match="heads.*--heads"):
    convert.from_state(tiny_release.joint(), where="state")


def test_a_part_of_psi_flow_that_is_gone_is_told():
  state = tiny_release.joint()
  gone = f"{PSI_FLOW}encoder.two_stream_transformer.blocks.2.self_attn_layers_primary.mlp.fc1.bias"
  del state[gone]
  with pytest.raises(NamesError) as error:
    convert.from_state(state, heads=HEADS, where="state")
  assert error.value.sides == {"missing": [gone]}


def test_a_torch_file_is_converted_as_the_tensors_in_it(tmp_path):
  state = tiny_release.random(tiny_release.base_shapes())
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
  state = {
    n: a for n, a in tiny_release.random(tiny_release.base_shapes()).items() if not n.endswith(gone)
  }
  state["mask_token"] = np.ones((1, 1, 12), np.float32)
  made = convert.from_state(state, heads=HEADS, where="state")
  model = made.config["model"]
  assert (model["masking"], model["positions"], model["positions_hw"]) == ("drop", "sine", ())
  _assert_same(_round_trip(tmp_path, made), state)


def test_names_with_the_prefix_of_data_parallel_training_lose_it(tmp_path):
  state = tiny_release.random(tiny_release.base_shapes())
  path = write(tmp_path / "b.pt", {"module." + n: Tensor(a) for n, a in state.items()})
  _assert_same(convert.read_state(path), state)


def test_a_converted_release_is_a_model_that_runs_with_its_own_mark(tmp_path):
  from cwm_jax.tracker import Tracker

  made = convert.from_state(tiny_release.joint(), heads=HEADS, where="state")
  assert made.config["mark"] == {"kind": "learned", "hidden_width": 6, "size": 20, "scale": 1}
  path = weights.save(tmp_path / "ours.safetensors", made.params, made.config, extra=made.extra)
  tracker = Tracker.load(path, num_masks=1, mask_ratio=0.5)
  frames = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  mark = tracker.explain(frames[0], frames[1], [5, 5]).mark
  # The fixed square would have 4 pixels; the learned mark's grid covers the whole little image.
  assert np.count_nonzero(np.abs(mark).sum(axis=-1)) > 16


def test_the_joint_checkpoint_is_laid_over_the_base_and_wins(tmp_path):
  base, over = tiny_release.random(tiny_release.base_shapes()), tiny_release.joint()
  state, overlaid = convert.overlay(base, over)
  assert sorted(overlaid) == sorted(f"cwm_model.{name}" for name in base)
  top = "flow_predictor."
  _assert_same(state, {n.removeprefix(top): a for n, a in over.items()})


def test_a_switch_keeps_the_base_and_takes_only_what_it_lacks():
  base, over = tiny_release.random(tiny_release.base_shapes()), tiny_release.joint()
  state, overlaid = convert.overlay(base, over, keep_base=True)
  assert overlaid == []
  np.testing.assert_array_equal(state["cwm_model.pos_embed"], base["pos_embed"])
  name = "perturber.nn.mlp.0.weight"
  np.testing.assert_array_equal(state[name], over[f"flow_predictor.{name}"])


def test_two_files_become_one_and_what_was_done_is_told(tmp_path):
  base, over = tiny_release.random(tiny_release.base_shapes()), tiny_release.joint(base=False)
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
  state = tiny_release.random(tiny_release.base_shapes())
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


MARK, PSI = "flow_predictor.perturber.nn.mlp.0.bias", ".blocks.0.self_attn_layers_primary."


@pytest.mark.parametrize(
  "told_of, sentence",
  [
    (lambda name: name == MARK, "'perturber/fc1/bias' has shape .* too few axes"),
    (lambda name: f"{PSI}mlp.fc1.bias" in name, "fc1/bias' has shape .* too few axes"),
  ],
)
def test_biases_without_an_axis_beside_the_predictor_are_refused_too(told_of, sentence):
  state = {n: np.zeros(()) if told_of(n) else a for n, a in tiny_release.joint().items()}
  with pytest.raises(InputError, match=sentence):
    convert.from_state(state, heads=HEADS, where="FILE")


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
  "positions of no axis": (
    lambda s: s | {"encoder.pos_embed": np.zeros(1)},
    "'encoder_positions' has shape .* too few axes",
  ),
  "no positions": (
    lambda s: s | {"encoder.pos_embed": np.zeros((1, 0, 8)), "pos_embed": np.zeros((1, 0, 12))},
    "are empty",
  ),
  "a bridge's bias of no axis": (
    lambda s: s | {"encoder_to_decoder.bias": np.zeros(())},
    "'encoder_to_decoder/bias' has shape .* too few axes",
  ),
  "biases of no axis": (
    lambda s: s | {n: np.zeros(()) for n in s if n.endswith("fc1.bias")},
    "'encoder/blocks/fc1/bias' has shape .* too few axes",
  ),
  "patches that nothing is made of": (
    lambda s: s | {"encoder.patch_embed.proj.weight": np.zeros((0, 3, 1, 2, 2))},
    r"'encoder.patch_embed.proj.weight' has shape \(0, 3, 1, 2, 2\)",
  ),
  "patches without pixels": (
    lambda s: s | {"encoder.patch_embed.proj.weight": np.zeros((8, 3, 1, 0, 0))},
    "are empty",
  ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_state_that_does_not_fit_is_refused_in_one_sentence(kind):
  change, sentence = BROKEN[kind]
  heads = None if kind == "no heads" else HEADS
  with pytest.raises(InputError, match=sentence) as caught:
    convert.from_state(
      change(tiny_release.random(tiny_release.base_shapes())), heads=heads, where="FILE"
    )
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
    convert.from_state(
      tiny_release.random(tiny_release.base_shapes()), heads=heads, release=release, where="FILE"
    )


def test_a_weights_file_whose_mark_lacks_parameters_is_refused(tmp_path):
  made = convert.from_state(tiny_release.joint(), heads=HEADS, where="state")
  del made.params["perturber"]["fc2"]
  path = weights.save(tmp_path / "o.safetensors", made.params, made.config, extra=made.extra)
  with pytest.raises(InputError, match="missing: perturber/fc2"):
    weights.load_perturber(path)


def test_parameters_that_a_release_has_no_place_for_are_named(tmp_path):
  made = convert.from_state(
    tiny_release.random(tiny_release.base_shapes()), heads=HEADS, where="state"
  )
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
  told = flow_predictors.told_by_shapes(
    theirs, naming.links, heads=None, predictor_heads=(3, 3), where="manifest"
  )
  assert told["two_stream"] == opt_cwm.TWO_STREAM
  section = defaults.get_config().flow_predictor.to_dict() | told
  mine = flow_predictors.expected_shapes({"flow_predictor": section}, where="manifest")
  expected |= {f"{top}{n}": x.shape for n, x in weights.flatten(mine).items()}
  weights.check_names(found, expected, where="manifest")


def _two_stream_heads(cwm_goldens):
  """(encoder's, decoder's) attention heads of the set's Psi-flow."""
  told = json.loads((cwm_goldens / "config.json").read_text())["opt_cwm"]["two_stream_config"]
  sizes = json.loads((cwm_goldens / told).read_text())
  halves = sizes["encoder_params"]["transformer_params"], sizes["decoder_params"]
  return tuple(half["block_params"]["primary"]["attn"]["num_heads"] for half in halves)


@pytest.mark.parametrize("case", ["c1_base_cwm", "c4_flow", "c5_optcwm"])
def test_states_of_the_public_code_make_the_round_trip(tmp_path, cwm_goldens, case):
  settings = json.loads((cwm_goldens / "config.json").read_text())["base_cwm"]
  heads = (settings["encoder_num_heads"], settings["decoder_num_heads"])
  flow_heads = _two_stream_heads(cwm_goldens) if case == "c5_optcwm" else None
  path = cwm_goldens / f"{case}_state.safetensors"
  made = convert.assemble([path], heads=heads, flow_heads=flow_heads)
  _assert_same(_round_trip(tmp_path, made), safetensors_file.read(path))
  if flow_heads is not None:
    psi_flow = made.config["flow_predictor"]["two_stream"]
    assert (psi_flow["encoder_heads"], psi_flow["decoder_heads"]) == flow_heads
