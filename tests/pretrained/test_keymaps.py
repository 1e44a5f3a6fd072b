"""Key maps: public names and layouts to ours and back, nothing lost and nothing left over."""

import tracemalloc

import numpy as np
import pytest

from cwm_jax.pretrained import keymaps, layouts, weights
from cwm_jax.types import InputError

WIDTH, SIDE, HIDDEN, DEPTH = 4, 2, 6, 2


def state(**rules):
  """A two-block predictor's state dict by public names; every number is another one."""
  key_bias = rules.get("key_bias", True)
  shapes = {
    "mask_token": (1, 1, WIDTH),
    "encoder.patch_embed.proj.weight": (WIDTH, 3, 1, SIDE, SIDE),
    "encoder.patch_embed.proj.bias": (WIDTH,),
    "encoder_to_decoder.weight": (WIDTH, WIDTH),
    "decoder.head.weight": (3 * SIDE**2, WIDTH),
    "decoder.head.bias": (3 * SIDE**2,),
  }
  if rules.get("learned_positions", True):
    shapes |= {"encoder.pos_embed": (1, 8, WIDTH), "pos_embed": (1, 8, WIDTH)}
  if rules.get("bridge", True):
    shapes["encoder_to_decoder.bias"] = (WIDTH,)
  for half in ("encoder", "decoder"):
    shapes |= {f"{half}.norm.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    for i in range(DEPTH):
      block = f"{half}.blocks.{i}."
      for norm in ("norm1", "norm2"):
        shapes |= {f"{block}{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
      shapes[block + "attn.qkv.weight"] = (3 * WIDTH, WIDTH)
      shapes |= {f"{block}attn.{n}_bias": (WIDTH,) for n in ("qkv" if key_bias else "qv")}
      shapes |= {block + "attn.proj.weight": (WIDTH, WIDTH), block + "attn.proj.bias": (WIDTH,)}
      shapes |= {block + "mlp.fc1.weight": (HIDDEN, WIDTH), block + "mlp.fc1.bias": (HIDDEN,)}
      shapes |= {block + "mlp.fc2.weight": (WIDTH, HIDDEN), block + "mlp.fc2.bias": (WIDTH,)}
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


VARIANTS = [
  {},
  dict(learned_positions=False),
  dict(learned_positions=False, key_bias=False, bridge=False),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_goes_to_our_parameters_and_back_unchanged(variant):
  theirs, rules = state(**variant), keymaps.predictor_rules(**variant)
  again = keymaps.to_state(keymaps.to_params(theirs, rules), rules)
  assert set(again) == set(theirs)
  for name, array in theirs.items():
    np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_blocks_are_stacked_in_their_order_and_queries_come_first():
  theirs = state()
  ours = keymaps.to_params(theirs, keymaps.predictor_rules())["encoder"]["blocks"]
  for i in range(DEPTH):
    np.testing.assert_array_equal(
      ours["fc1"]["kernel"][i], theirs[f"encoder.blocks.{i}.mlp.fc1.weight"].T
    )
    joined = [theirs[f"encoder.blocks.{i}.attn.{n}_bias"] for n in "qkv"]
    np.testing.assert_array_equal(ours["attn"]["qkv"]["bias"][i], np.concatenate(joined))


def test_a_patch_embedding_is_the_convolution_it_came_from():
  rng = np.random.default_rng(1)
  kernel = rng.standard_normal((WIDTH, 3, 1, SIDE, SIDE))
  patch = rng.standard_normal((SIDE, SIDE, 3))
  exact = np.einsum("octhw,hwc->o", kernel, patch)
  ours = layouts.PatchEmbedding().ours([kernel])
  np.testing.assert_allclose(patch.reshape(-1) @ ours, exact, rtol=1e-12)


def test_biases_that_a_release_lacks_are_zero_here():
  variant = dict(key_bias=False, bridge=False)
  ours = keymaps.to_params(state(**variant), keymaps.predictor_rules(**variant))
  np.testing.assert_array_equal(ours["encoder_to_decoder"]["bias"], np.zeros(WIDTH))
  bias = ours["encoder"]["blocks"]["attn"]["qkv"]["bias"].reshape(DEPTH, 3, WIDTH)
  assert not bias[:, 1].any() and bias[:, 0].all() and bias[:, 2].all()


@pytest.mark.parametrize("path", ["encoder_to_decoder/bias", "encoder/blocks/attn/qkv/bias"])
def test_a_bias_that_a_release_cannot_hold_is_not_dropped_in_silence(path):
  variant = dict(key_bias=False, bridge=False)
  rules = keymaps.predictor_rules(**variant)
  flat = weights.flatten(keymaps.to_params(state(**variant), rules))
  flat[path] = flat[path] + 1
  with pytest.raises(InputError, match=f"{path}.*no place"):
    keymaps.to_state(weights.unflatten(flat), rules)


def test_names_of_both_sides_are_told_when_they_do_not_match():
  theirs = state()
  theirs["encoder.blocks.1.gamma"] = theirs.pop("encoder.blocks.1.norm1.weight")
  with pytest.raises(InputError) as error:
    keymaps.to_params(theirs, keymaps.predictor_rules(), where="the file a.pt")
  for said in ("the file a.pt", "missing: encoder.blocks.1.norm1.weight", "unexpected: encoder"):
    assert said in str(error.value)
  params = keymaps.to_params(state(), keymaps.predictor_rules())
  params["extra"] = {"bias": params["head"].pop("bias")}
  with pytest.raises(InputError, match="missing: head/bias; unexpected: extra/bias"):
    keymaps.to_state(params, keymaps.predictor_rules())


def test_a_gap_between_blocks_is_told_as_missing_and_a_huge_number_costs_nothing():
  theirs = state()
  theirs["decoder.blocks.3.mlp.fc1.bias"] = theirs["decoder.blocks.1.mlp.fc1.bias"]
  with pytest.raises(InputError, match=r"missing: decoder\.blocks\.2"):
    keymaps.to_params(theirs, keymaps.predictor_rules())
  theirs = state() | {"decoder.blocks.999999999999.mlp.fc1.bias": np.zeros(HIDDEN)}
  with pytest.raises(InputError, match="unexpected: decoder.blocks.999999999999"):
    keymaps.to_params(theirs, keymaps.predictor_rules())


@pytest.mark.parametrize(
  ("name", "shape", "told"),
  [
    ("mask_token", (2, 1, WIDTH), "mask_token.*begin with"),
    ("decoder.head.weight", (WIDTH,), "head.weight.*2 axes"),
    ("encoder.patch_embed.proj.weight", (WIDTH, 12), "proj.weight.*5 axes"),
    ("encoder.blocks.1.attn.k_bias", (WIDTH + 1,), "blocks.1.attn.q_bias.*should be equal"),
    ("encoder.blocks.1.norm1.bias", (WIDTH + 1,), "norm1.bias.*differ in shape"),
  ],
)
def test_a_tensor_of_a_shape_that_no_layout_takes_is_named(name, shape, told):
  with pytest.raises(InputError, match=told):
    keymaps.to_params(state() | {name: np.zeros(shape, np.float32)}, keymaps.predictor_rules())


def test_a_prefix_stands_before_every_name():
  theirs = {f"cwm_model.{name}": array for name, array in state().items()}
  rules = keymaps.predictor_rules(prefix="cwm_model.")
  assert set(keymaps.to_state(keymaps.to_params(theirs, rules), rules)) == set(theirs)


def test_perturber_layers_keep_their_order():
  rng = np.random.default_rng(2)
  theirs = {}
  for i, shape in enumerate([(5, 4), (5,), None, (5, 5), (5,), None, (18, 5), (18,)]):
    if shape:
      theirs[f"nn.mlp.{i}.weight"] = rng.standard_normal(shape).astype(np.float32)
      theirs[f"nn.mlp.{i}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
  ours = keymaps.to_params(theirs, keymaps.perturber_rules())
  np.testing.assert_array_equal(ours["fc3"]["kernel"], theirs["nn.mlp.6.weight"].T)
  np.testing.assert_array_equal(ours["norm2"]["scale"], theirs["nn.mlp.4.weight"])
  assert set(keymaps.to_state(ours, keymaps.perturber_rules())) == set(theirs)


@pytest.mark.parametrize(
  ("name", "variant"),
  [
    ("opt-cwm-256", VARIANTS[0]),
    ("opt-cwm-512", VARIANTS[0]),
    ("cwm-2frame-8x8", VARIANTS[1]),
    ("cwm-2frame-4x4", VARIANTS[2]),
  ],
)
def test_the_rules_name_every_parameter_of_the_released_predictors_once(name, variant):
  from cwm_jax.configs import opt_cwm

  config = {"model": opt_cwm.get_config(name).model.to_dict()}
  _, shapes = weights.expected_shapes(config, where="here")
  ours = [rule.ours for rule in keymaps.predictor_rules(**variant)]
  assert sorted(ours) == sorted(shapes)


def test_no_more_than_one_parameter_is_held_twice_at_a_time():
  rules = [
    keymaps.Rule((f"part{k}.{{i}}.weight",), f"part{k}/kernel", layouts.Transposed())
    for k in range(8)
  ]
  theirs = {f"part{k}.{i}.weight": np.ones((96, 128), np.float32) for k in range(8) for i in (0, 1)}
  tracemalloc.start()
  try:
    params = keymaps.to_params(theirs, rules)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  size = sum(array.nbytes for array in weights.flatten(params).values())
  assert size == sum(array.nbytes for array in theirs.values())
  assert size <= peak < 1.3 * size
