"""The predictor: what it may see, what it must not see, and its shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import models
from cwm_jax.configs import base
from cwm_jax.models import layers, predictor


def tiny(**changes):
  model = base.get_config().model
  model.update(
    dict(
      image_hw=(16, 24),
      patch=4,
      positions="rotary",
      encoder_width=32,
      encoder_depth=2,
      encoder_heads=2,
      decoder_width=16,
      decoder_depth=1,
      decoder_heads=2,
    )
  )
  model.update(changes)
  return models.build(model)


def some_input(batch=2, visible=5, seed=0):
  """Frames [batch, 2, 16, 24, 3] and masks that show `visible` patches of frame 2."""
  keys = jax.random.split(jax.random.key(seed), 2)
  frames = jax.random.normal(keys[0], (batch, 2, 16, 24, 3))
  rank = jnp.argsort(jax.random.uniform(keys[1], (batch, 24)), axis=1)
  hidden = jnp.stack([jnp.zeros((batch, 24), bool), rank >= visible], axis=1)
  return frames, hidden.reshape(batch, 2, 4, 6), 24 + visible


@functools.partial(jax.jit, static_argnums=(0, 4))
def predict(net, params, frames, mask, shown):
  return net.apply(params, frames, mask, num_visible=shown)


@functools.partial(jax.jit, static_argnums=(0, 3))
def init(net, frames, mask, shown):
  return net.init(jax.random.key(1), frames, mask, num_visible=shown)


@pytest.fixture(scope="module")
def net_and_params():
  net = tiny()
  return net, init(net, *some_input())


def test_patches_go_back_where_they_came_from():
  frames = jax.random.normal(jax.random.key(0), (2, 2, 12, 20, 3))
  patches = predictor.patchify(frames, 4)
  assert patches.shape == (2, 2, 15, 48)
  np.testing.assert_array_equal(patches[0, 1, 6], frames[0, 1, 4:8, 4:8].reshape(-1))
  np.testing.assert_array_equal(predictor.unpatchify(patches, (3, 5), 4), frames)


def test_shapes_and_zeros_on_revealed_patches(net_and_params):
  net, params = net_and_params
  frames, mask, shown = some_input()
  image, tokens = predict(net, params, frames, mask, shown)
  assert image.shape == (2, 16, 24, 3) and image.dtype == jnp.float32
  assert tokens.shape == (2, 4, 6, 32)
  revealed = ~np.repeat(np.repeat(mask[:, 1], 4, 1), 4, 2)
  assert np.all(np.asarray(image)[revealed] == 0) and np.all(np.asarray(image)[~revealed] != 0)


def test_hidden_patches_of_frame_2_cannot_be_seen(net_and_params):
  net, params = net_and_params
  frames, mask, shown = some_input()
  hidden = jnp.repeat(jnp.repeat(mask, 4, 2), 4, 3)[..., None]
  garbled = jnp.where(hidden, 100.0, frames)
  first = predict(net, params, frames, mask, shown)
  second = predict(net, params, garbled, mask, shown)
  np.testing.assert_array_equal(first.image, second.image)


def test_context_begins_as_nothing_and_sees_only_frame_1(net_and_params):
  """Zero weight at first; with weights, still blind to what is hidden of frame 2."""
  _, plain = net_and_params
  net = tiny(context=2)
  frames, mask, shown = some_input()
  params = init(net, frames, mask, shown)["params"]
  before = predict(tiny(), plain, frames, mask, shown).image
  added = plain["params"] | {"context_embed": params["context_embed"]}
  after = predict(net, {"params": added}, frames, mask, shown).image
  np.testing.assert_allclose(after, before, atol=1e-6)
  kernel = params["context_embed"]["kernel"]
  added["context_embed"] = {"kernel": jax.random.normal(jax.random.key(3), kernel.shape)}
  hidden = jnp.repeat(jnp.repeat(mask, 4, 2), 4, 3)[..., None]
  with_weight = predict(net, {"params": added}, frames, mask, shown).image
  garbled = jnp.where(hidden, 100.0, frames)
  np.testing.assert_array_equal(
    with_weight, predict(net, {"params": added}, garbled, mask, shown).image
  )
  assert float(jnp.abs(with_weight - before).max()) > 1e-3


def test_visible_patches_of_frame_2_and_frame_1_matter(net_and_params):
  net, params = net_and_params
  frames, mask, shown = some_input()
  hidden = jnp.repeat(jnp.repeat(mask, 4, 2), 4, 3)[..., None]
  clean = predict(net, params, frames, mask, shown).image
  for frame in (0, 1):
    changed = frames.at[:, frame].add(1.0)
    changed = jnp.where(hidden, frames, changed)
    other = predict(net, params, changed, mask, shown).image
    assert float(jnp.abs(other - clean).max()) > 1e-3


def test_each_pair_of_a_batch_is_predicted_alone(net_and_params):
  net, params = net_and_params
  frames, mask, shown = some_input(batch=3, seed=5)
  together = predict(net, params, frames, mask, shown).image
  alone = predict(net, params, frames[1:2], mask[1:2], shown).image
  np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


def test_rotary_attention_depends_on_relative_positions_only():
  """Shifting all positions leaves the products of queries and keys as they are."""
  table = layers.rotary_table((8, 8), 16, of_hw=(8, 8))
  q, k = jax.random.normal(jax.random.key(2), (2, 1, 1, 1, 16))
  at = lambda y, x: table[y * 8 + x][None, None]  # noqa: E731
  here = (layers.rotate(q, at(1, 2)) * layers.rotate(k, at(3, 1))).sum()
  there = (layers.rotate(q, at(4, 6)) * layers.rotate(k, at(6, 5))).sum()
  np.testing.assert_allclose(here, there, rtol=1e-4)


def test_all_attention_implementations_are_one_function():
  q, k, v = jax.random.normal(jax.random.key(4), (3, 2, 7, 3, 8))
  scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8)
  weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  exact = np.einsum("bhnm,bmhd->bnhd", weights, v)
  for implementation in (None, "einsum", "cached", "xla"):
    np.testing.assert_allclose(layers.attend(q, k, v, implementation), exact, atol=1e-5)


def test_rotary_weights_serve_other_image_sizes(net_and_params):
  net, params = net_and_params
  frames = jnp.zeros((1, 2, 32, 8, 3))
  mask = jnp.zeros((1, 2, 8, 2), bool).at[:, 1, 1:].set(True)
  assert predict(net, params, frames, mask, 18).image.shape == (1, 32, 8, 3)


def test_rotary_positions_are_resized_as_tables_are(net_and_params):
  """A grid twice as fine over the same image has its patches' centres at quarters between."""
  places = layers.resize_places(layers.grid_yx((4, 2)), (4, 2), (2, 1))
  np.testing.assert_allclose(places[::2, 0], [-0.25, 0.25, 0.75, 1.25])
  np.testing.assert_allclose(places[:2, 1], [-0.25, 0.25])
  back = layers.resize_places(places, (2, 1), (4, 2))
  np.testing.assert_allclose(back, layers.grid_yx((4, 2)), atol=1e-6)
  frames, mask, shown = some_input()
  outputs = [
    predict(net, net_and_params[1], frames, mask, shown).image
    for net in (tiny(), tiny(positions_hw=(4, 6)), tiny(positions_hw=(2, 3)))
  ]
  np.testing.assert_array_equal(outputs[0], outputs[1])
  assert float(jnp.abs(outputs[0] - outputs[2]).max()) > 1e-3


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialising_changes_no_gradient(net_and_params, remat):
  net, params = net_and_params
  frames, mask, shown = some_input()

  def loss(params, net):
    return (predict(net, params, frames, mask, shown).image ** 2).sum()

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  plain, again = gradient(params, net), gradient(params, tiny(remat=remat))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, again)
  traced = {
    kind: str(jax.make_jaxpr(gradient, static_argnums=1)(params, tiny(remat=kind)))
    for kind in ("none", remat)
  }
  assert "remat" in traced[remat] and "remat" not in traced["none"]


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(net_and_params):
  _, params = net_and_params
  frames, mask, shown = some_input()
  half = tiny(dtype="bfloat16")
  fresh = init(half, frames, mask, shown)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
  exact = predict(tiny(), params, frames, mask, shown).image
  rough = predict(half, params, frames, mask, shown).image
  assert rough.dtype == jnp.float32
  assert float(jnp.abs(rough - exact).max()) < 0.1 * float(jnp.abs(exact).max())


def test_attention_in_float32_keeps_bfloat16_nearer_to_float32(net_and_params):
  _, params = net_and_params
  frames, mask, shown = some_input()

  def image(**dtypes):
    return predict(tiny(**dtypes), params, frames, mask, shown).image

  exact = image()
  error = {
    kind: float(jnp.abs(image(dtype="bfloat16", attention_dtype=kind) - exact).mean())
    for kind in ("", "bfloat16", "float32")
  }
  assert 0 < error["float32"] < error["bfloat16"] and error[""] == error["bfloat16"]
  np.testing.assert_array_equal(image(attention_dtype="float32"), exact)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(masking="guess"), "masking"),
    (dict(positions="none"), "positions"),
    (dict(patch=5), "does not divide"),
    (dict(remat="some"), "remat"),
    (dict(encoder_heads=16), "multiple of 4"),
  ],
)
def test_what_cannot_be_built_says_so(changes, said):
  frames, mask, shown = some_input()
  with pytest.raises(ValueError, match=said):
    tiny(**changes).init(jax.random.key(0), frames, mask, num_visible=shown)


def test_learned_positions_build_and_run():
  net = tiny(positions="learned")
  frames, mask, shown = some_input()
  params = init(net, frames, mask, shown)
  assert params["params"]["encoder_positions"].shape == (48, 32)
  assert predict(net, params, frames, mask, shown).image.shape == (2, 16, 24, 3)


def test_the_last_block_may_work_out_only_the_tokens_that_are_wanted():
  x = jax.random.normal(jax.random.key(7), (2, 6, 8))
  stack = layers.Stack(depth=2, heads=2)
  params = stack.init(jax.random.key(8), x)
  whole, some = stack.apply(params, x), stack.apply(params, x, wanted=slice(-2, None))
  assert some.shape == (2, 2, 8)
  np.testing.assert_allclose(some, whole[:, -2:], atol=1e-6)
