"""Released flow networks: every key accounted for, exact round trips, sizes read off the shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cwm_jax.configs import flow_networks
from cwm_jax.pretrained import convert, flow_keymaps, keymaps, weights
from cwm_jax.pretrained.merge import NamesError
from cwm_jax.types import InputError

RNG = np.random.default_rng(0)
COUNTER = "num_batches_tracked"


def _conv(name, out, into, rows=3, columns=None):
  return {f"{name}.weight": (out, into, rows, columns or rows), f"{name}.bias": (out,)}


def _batch_norm(name, width):
  leaves = ("weight", "bias", "running_mean", "running_var")
  return {f"{name}.{leaf}": (width,) for leaf in leaves} | {f"{name}.{COUNTER}": ()}


def _motion(name, words, end, windows, corr, flow, width):
  shapes = _conv(f"{name}.{words[0]}1{end}", corr[0], windows, 1)
  if len(corr) > 1:
    shapes |= _conv(f"{name}.{words[0]}2{end}", corr[1], corr[0])
  shapes |= _conv(f"{name}.{words[1]}1{end}", flow[0], 2, 7)
  shapes |= _conv(f"{name}.{words[1]}2{end}", flow[1], flow[0])
  return shapes | _conv(f"{name}.conv{end}", width - 2, corr[-1] + flow[-1])


def _encoder(name, stem, widths, depths, out, *, naming, into=3, norm=True, bottleneck=False):
  """Either an original encoder's shapes or torchvision's, written down from their code."""
  port, word = naming == "torchvision", "bn" if naming == "sea_raft" else "norm"
  shapes = _conv(f"{name}.convnormrelu.0" if port else f"{name}.conv1", stem, into, 7)
  norms = {f"{name}.convnormrelu.1" if port else f"{name}.{word}1": stem}
  before = stem
  for stage, (width, depth) in enumerate(zip(widths, depths), start=1):
    for i in range(depth):
      block = f"{name}.layer{stage}.{i}"
      quarter = width // 4
      layers = [(width, before, 3), (width, width, 3)]
      if bottleneck:
        layers = [(quarter, before, 1), (quarter, quarter, 3), (width, quarter, 1)]
      for k, layer in enumerate(layers, start=1):
        shapes |= _conv(f"{block}.convnormrelu{k}.0" if port else f"{block}.conv{k}", *layer)
        norms[f"{block}.convnormrelu{k}.1" if port else f"{block}.{word}{k}"] = layer[0]
      if i == 0 and stage > 1:
        shapes |= _conv(f"{block}.downsample.0", width, before, 1)
        norms[f"{block}.downsample.1"] = width
        if not port:
          norms[f"{block}.{word}{len(layers) + 1}"] = width
      before = width
  for norm_name, width in norms.items() if norm else ():
    shapes |= _batch_norm(norm_name, width)
  last = dict(raft="conv2", torchvision="conv", sea_raft="final_conv")[naming]
  return shapes | _conv(f"{name}.{last}", out, before, 1)


def _raft(naming, *, small):
  """A RAFT with the connections of the released sizes, and few channels."""
  widths, hidden, context, motion = (8, 12, 16), 6, 5, 10
  corr, flow, windows = ((8,) if small else (8, 6)), (6, 4), 4 * (49 if small else 81)
  port = naming == "torchvision"
  names = ("feature_encoder", "context_encoder") if port else ("fnet", "cnet")
  kind = dict(naming=naming, bottleneck=small)
  shapes = _encoder(names[0], 8, widths, (2, 2, 2), 16, norm=False, **kind)
  shapes |= _encoder(names[1], 8, widths, (2, 2, 2), hidden + context, norm=not small, **kind)
  top = "update_block"
  if port:
    shapes |= _motion(f"{top}.motion_encoder", ("convcorr", "convflow"), ".0", windows, corr, flow,
                      motion)  # fmt: skip
  else:
    shapes |= _motion(f"{top}.encoder", ("convc", "convf"), "", windows, corr, flow, motion)
  into = hidden + context + motion
  units = {"": (3, 3)} if small else {"1": (1, 5), "2": (5, 1)}
  for number, kernel in units.items():
    for letter in "zrq":
      unit = f"{top}.gru.conv{letter}{number}"
      if port:
        unit = f"{top}.recurrent_block.convgru{number or 1}.conv{letter}"
      shapes |= _conv(unit, hidden, into, *kernel)
  shapes |= _conv(f"{top}.flow_head.conv1", 7, hidden) | _conv(f"{top}.flow_head.conv2", 2, 7)
  if not small:
    mask = ("mask_predictor.convrelu.0", "mask_predictor.conv")
    mask = mask if port else (f"{top}.mask.0", f"{top}.mask.2")
    shapes |= _conv(mask[0], 12, hidden) | _conv(mask[1], 576, 12, 1)
  return shapes


def _sea_raft(dim=8, depths=(2, 1, 3)):
  widths = (8, 12, 16)
  shapes = _encoder("fnet", 8, widths, depths, 2 * dim, naming="sea_raft")
  shapes |= _encoder("cnet", 8, widths, depths, 2 * dim, naming="sea_raft", into=6)
  shapes |= _conv("init_conv", 2 * dim, 2 * dim)
  shapes |= _conv("flow_head.0", 2 * dim, dim) | _conv("flow_head.2", 6, 2 * dim)
  shapes |= _conv("upsample_weight.0", 2 * dim, dim)
  shapes |= _conv("upsample_weight.2", 576, 2 * dim, 1)
  words, corr = ("convc", "convf"), (2 * dim, dim * 3 // 2)
  shapes |= _motion("update_block.encoder", words, "", 4 * 81, corr, (dim, dim // 2), dim)
  for i in range(2):
    block = f"update_block.refine.{i}"
    shapes |= {f"{block}.dwconv.weight": (3 * dim, 1, 7, 7), f"{block}.dwconv.bias": (3 * dim,)}
    shapes |= {f"{block}.norm.{leaf}": (3 * dim,) for leaf in ("weight", "bias")}
    shapes |= {f"{block}.pwconv1.weight": (4 * dim, 3 * dim), f"{block}.pwconv1.bias": (4 * dim,)}
    shapes |= {f"{block}.pwconv2.weight": (3 * dim, 4 * dim), f"{block}.pwconv2.bias": (3 * dim,)}
    shapes |= {f"{block}.gamma": (3 * dim,)} | _conv(f"{block}.final", dim, 3 * dim, 1)
  return shapes


def _random(shapes):
  state = {}
  for name, shape in shapes.items():
    counter = name.endswith(COUNTER)
    state[name] = np.array(7) if counter else RNG.normal(size=shape).astype(np.float32)
  for name in [n for n in state if ".downsample.1." in n and n.split(".")[0] in ("fnet", "cnet")]:
    block, _, leaf = name.rpartition(".downsample.1.")
    twins = [f"{block}.{norm}.{leaf}" for norm in ("bn3", "norm4", "norm3")]
    state[name] = state[next(twin for twin in twins if twin in state)]
  return state


CASES = {
  "raft": lambda: _raft("raft", small=False),
  "raft, small": lambda: _raft("raft", small=True),
  "torchvision": lambda: _raft("torchvision", small=False),
  "torchvision, small": lambda: _raft("torchvision", small=True),
  "sea_raft": _sea_raft,
}


@pytest.mark.parametrize("case", CASES)
def test_a_release_comes_back_from_our_weights_file_bit_for_bit(tmp_path, case):
  state = _random(CASES[case]())
  made = convert.from_state(state, where="state")
  path = weights.save(tmp_path / "a.safetensors", made.params, made.config, extra=made.extra)
  weights.load_model(path)  # fits the network that its config describes
  again = convert.to_state(path)
  wanted = {name: array for name, array in state.items() if not name.endswith(COUNTER)}
  assert again.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(again[name], array)
  counters = len(state) - len(wanted)
  assert made.skipped == ({COUNTER: counters} if counters else {})
  assert bool(counters) == any(COUNTER in note for note in made.notes)


def test_sizes_are_read_off_the_shapes():
  sizes = convert.from_state(_random(_sea_raft()), where="state").config["flow_network"]
  assert (sizes["kind"], sizes["depths"], sizes["widths"]) == ("sea_raft", (2, 1, 3), (8, 12, 16))
  assert (sizes["hidden_width"], sizes["radius"], sizes["iterations"]) == (8, 4, 4)
  small = convert.from_state(_random(CASES["raft, small"]()), where="s").config["flow_network"]
  assert (small["block"], small["context_norm"], small["radius"]) == ("bottleneck", "none", 3)
  assert (small["gru"], small["upsampling"], small["motion_width"]) == ("square", "bilinear", 10)


def test_one_of_two_names_of_a_norm_is_enough_and_both_must_agree():
  state = _random(_sea_raft())
  want = convert.from_state(state, where="state").params
  for part in (".downsample.1.", ".bn3."):
    kept = {name: array for name, array in state.items() if part not in name}
    assert len(kept) < len(state)
    got = convert.from_state(kept, where="state").params
    for name, array in weights.flatten(want).items():
      np.testing.assert_array_equal(weights.flatten(got)[name], array)
  state["fnet.layer2.0.downsample.1.bias"] = state["fnet.layer2.0.bn3.bias"] + 1
  with pytest.raises(InputError, match="downsample.1.bias' and 'fnet.layer2.0.bn3.bias' are one"):
    convert.from_state(state, where="state")


@pytest.mark.parametrize("case", CASES)
def test_a_key_too_few_or_too_many_is_told(case):
  state = _random(CASES[case]())
  with pytest.raises(NamesError, match=r"unexpected: fnet\.extra"):
    convert.from_state(state | {"fnet.extra": np.zeros(3)}, where="state")
  for end in ("convr.weight", "convr1.weight", "layer3.1.conv2.bias", "flow_head.conv2.weight"):
    for gone in [name for name in state if name.endswith(end)][:1]:
      rest = {name: array for name, array in state.items() if name != gone}
      with pytest.raises(InputError, match="missing"):
        convert.from_state(rest, where="state")


def test_the_whole_released_layout_is_accounted_for(cwm_goldens):
  manifest = json.loads((cwm_goldens / "manifest_searaft_full.json").read_text())
  state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in manifest.items()}
  whole = flow_keymaps.merge_twins(state, where="manifest")
  rules = flow_keymaps.rules_of_state(whole, flow_keymaps.naming_of(whole))
  shapes = keymaps.to_shapes({n: a.shape for n, a in whole.items()}, rules)
  section = {"flow_network": flow_networks.get_config("opt-cwm-distilled").flow_network.to_dict()}
  _, expected = weights.expected_shapes(section, where="config")
  assert shapes == expected
  left_out = set(state) - {name for rule in rules for name in rule.theirs}
  assert all(n.endswith(COUNTER) or ".downsample.1." in n for n in left_out)
  back = flow_keymaps.add_twins(whole, "sea_raft")
  assert set(state) - set(back) == {name for name in state if name.endswith(COUNTER)}


def test_a_release_by_name_must_have_its_sizes():
  state = _random(_sea_raft())
  with pytest.raises(InputError, match="state is not sea-raft-S: its stem_width is 8, not 64"):
    convert.from_state(state, release="sea-raft-S", where="state")
  with pytest.raises(InputError, match="is a flow network, and 'opt-cwm-512' is none"):
    convert.from_state(state, release="opt-cwm-512", where="state")
  with pytest.raises(InputError, match="has no attention heads"):
    convert.from_state(state, heads=(2, 2), where="state")


def test_numbers_that_are_not_finite_are_refused():
  state = _random(_sea_raft())
  state["init_conv.bias"][0] = np.nan
  with pytest.raises(InputError, match="context_conv/bias' holds values that are not finite"):
    convert.from_state(state, where="state")
