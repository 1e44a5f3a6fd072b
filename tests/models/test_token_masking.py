"""The predictor whose hidden tokens are replaced, and positions that fit other grids."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import models
from cwm_jax.configs import base, opt_cwm
from cwm_jax.models import cached_attention, layers, positions


def tiny(**changes):
  model = base.get_config().model
  model.update(
    dict(
      image_hw=(16, 24),
      patch=4,
      masking="token",
      encoder_width=16,
      encoder_depth=1,
      encoder_heads=2,
      decoder_width=12,
      decoder_depth=1,
      decoder_heads=2,
    )
  )
  model.update(changes)
  return models.build(model)


@pytest.fixture(scope="module")
def case():
  """(parameters, frames, mask with 5 patches of frame 2 visible)."""
  frames = jax.random.normal(jax.random.key(0), (1, 2, 16, 24, 3))
  mask = jnp.zeros((1, 2, 4, 6), bool).at[:, 1].set(True).at[:, 1, 2, :5].set(False)
  params = jax.device_get(init(tiny(), frames, mask))
  # Norms and positions begin too tame to tell one token from another.
  wave = lambda x: 0.3 * np.cos(np.arange(x.size)).reshape(x.shape)  # noqa: E731
  params = jax.tree.map(lambda x: jnp.asarray(x + wave(x), jnp.float32), params)
  return params, frames, mask


@partial(jax.jit, static_argnames=("net", "num_visible", "predict_frame", "keep_revealed"))
def image(params, frames, mask, net=None, **arguments):
  return (net or tiny()).apply({"params": params}, frames, mask, **arguments).image


@partial(jax.jit, static_argnames=("net", "num_visible"))
def init(net, frames, mask, num_visible=None):
  return net.init(jax.random.key(1), frames, mask, num_visible=num_visible)["params"]


def to_pixels(mask):
  return jnp.repeat(jnp.repeat(mask, 4, 2), 4, 3)[..., None]


def test_the_mask_token_has_the_encoders_width(case):
  params, _, _ = case
  assert params["mask_token"].shape == (16,) and params["decoder_positions"].shape == (48, 12)


def test_what_is_hidden_cannot_be_seen_and_what_is_visible_matters(case):
  params, frames, mask = case
  clean = image(params, frames, mask)
  garbled = jnp.where(to_pixels(mask), 100.0, frames)
  np.testing.assert_array_equal(clean, image(params, garbled, mask))
  for frame in (0, 1):
    changed = jnp.where(to_pixels(mask), frames, frames.at[:, frame].add(1.0))
    assert float(jnp.abs(image(params, changed, mask) - clean).max()) > 1e-3


def test_the_prediction_is_exactly_zero_on_revealed_patches_only(case):
  params, frames, mask = case
  predicted, hidden = image(params, frames, mask), to_pixels(mask)[:, 1, ..., 0]
  assert np.all(np.asarray(predicted)[~hidden] == 0) and np.all(np.asarray(predicted)[hidden] != 0)
  assert np.all(np.asarray(image(params, frames, mask, keep_revealed=True)) != 0)


def test_a_hidden_token_carries_no_position_through_the_encoder(case):
  """All hidden tokens leave the encoder as one, and the encoder's positions there do nothing."""
  params, frames, mask = case
  _, said = tiny().apply({"params": params}, frames, mask, mutable=["intermediates"])
  tokens = np.asarray(said["intermediates"]["encoder_tokens"][0])[0, 24:]
  hidden = np.asarray(mask)[0, 1].reshape(-1)
  np.testing.assert_allclose(tokens[hidden], tokens[hidden][:1].repeat(19, 0), atol=1e-6)
  assert np.abs(tokens[~hidden] - tokens[hidden][:1]).max() > 1e-2
  moved = params["encoder_positions"].at[24 + jnp.flatnonzero(hidden)].add(1.0)
  other = image(params | {"encoder_positions": moved}, frames, mask)
  np.testing.assert_array_equal(other, image(params, frames, mask))


@pytest.mark.parametrize("masking", ["token", "drop"])
def test_predicting_frame_1_is_predicting_frame_2_of_the_exchanged_pair(masking):
  """Where positions do not tell the frames apart; tokens are those of the visible frame."""
  net = tiny(masking=masking)
  frames = jax.random.normal(jax.random.key(0), (1, 2, 16, 24, 3))
  mask = jnp.zeros((1, 2, 4, 6), bool).at[:, 0].set(True).at[:, 0, 2, :5].set(False)
  params = init(net, frames, mask, num_visible=29)
  for name in ("encoder_positions", "decoder_positions"):
    params[name] = jnp.tile(params[name][:24], (2, 1))
  run = jax.jit(net.apply, static_argnames=("num_visible", "predict_frame"))
  first = run({"params": params}, frames, mask, num_visible=29, predict_frame=1)
  second = run({"params": params}, frames[:, ::-1], mask[:, ::-1], num_visible=29)
  np.testing.assert_allclose(first.image, second.image, atol=1e-5)
  np.testing.assert_allclose(first.tokens, second.tokens, atol=1e-5)
  hidden = to_pixels(mask)[:, 0, ..., 0]
  assert np.all(np.asarray(first.image)[~hidden] == 0)
  assert np.all(np.asarray(first.image)[hidden] != 0)


def test_a_share_replaces_so_much_of_a_token_and_is_clipped(case):
  params, frames, mask = case
  exact = image(params, frames, mask)
  np.testing.assert_array_equal(exact, image(params, frames, mask.astype(jnp.float32)))
  np.testing.assert_array_equal(exact, image(params, frames, jnp.where(mask, 7.0, -3.0)))
  half = image(params, frames, jnp.where(mask, 0.5, 0.0))
  assert float(jnp.abs(half - exact).max()) > 1e-3


@pytest.mark.parametrize(
  ("changes", "arguments", "said"),
  [
    (dict(masking="drop"), {}, "needs num_visible"),
    (dict(), dict(predict_frame=0), "frames 1 and 2"),
    (dict(context=2), dict(predict_frame=1), "context"),
  ],
)
def test_arguments_that_do_not_fit_the_masking_say_so(case, changes, arguments, said):
  _, frames, mask = case
  with pytest.raises(ValueError, match=said):
    tiny(**changes).init(jax.random.key(0), frames, mask, **arguments)


def test_a_dropping_predictor_refuses_shares(case):
  _, frames, mask = case
  with pytest.raises(ValueError, match="True and False"):
    tiny(masking="drop").init(jax.random.key(0), frames, mask.astype(jnp.float32), num_visible=29)


@pytest.mark.parametrize("masking", ["token", "drop"])
def test_learned_positions_serve_other_image_sizes_by_resizing(masking):
  """Weights of a 2 x 3 grid on a 4 x 6 image are those with the resized table in their place."""
  frames = jax.random.normal(jax.random.key(0), (1, 2, 16, 24, 3))
  mask = jnp.zeros((1, 2, 4, 6), bool).at[:, 1, 1:].set(True)
  small, large = tiny(masking=masking, positions_hw=(2, 3)), tiny(masking=masking)
  params = init(small, frames, mask, num_visible=30)
  resized = {
    name: positions.resize_positions(params[name], (2, 3), (4, 6))
    for name in ("encoder_positions", "decoder_positions")
  }
  assert params["encoder_positions"].shape == (12, 16)
  np.testing.assert_allclose(
    image(params, frames, mask, small, num_visible=30),
    image(params | resized, frames, mask, large, num_visible=30),
    atol=1e-5,
  )


def test_resizing_positions_keeps_frames_apart_and_constants_constant():
  table = jnp.concatenate([jnp.full((6, 2), 1.0), jnp.full((6, 2), -2.0)])
  out = positions.resize_positions(table, (2, 3), (5, 4))
  np.testing.assert_allclose(out, jnp.repeat(jnp.array([1.0, -2.0]), 20)[:, None] + jnp.zeros(2))
  assert positions.resize_positions(table, (2, 3), (2, 3)) is table
  with pytest.raises(ValueError, match="12 tokens is not for 2 frames of 3 x 3"):
    positions.resize_positions(table, (3, 3), (2, 3))


def test_doubled_positions_have_the_known_bicubic_weights():
  """At a quarter of a patch, a = -0.75 gives -27/256, 225/256, 67/256 and -9/256."""
  step = jnp.zeros((2, 8, 1)).at[0, 4, 0].set(1.0).reshape(16, 1)
  out = np.asarray(positions.resize_positions(step, (1, 8), (1, 16)))[:16, 0]
  want = [0, -9, -27, 67, 225, 225, 67, -27, -9, 0]
  np.testing.assert_allclose(out[4:14] * 256, want, atol=1e-4)


def test_the_releases_own_way_keeps_a_table_whose_length_fits():
  table = jax.random.normal(jax.random.key(0), (32, 3))
  assert positions.release_positions(table, (8, 2)) is table
  np.testing.assert_array_equal(
    positions.release_positions(table, (5, 6)), positions.resize_positions(table, (4, 4), (5, 6))
  )
  assert positions.release_grid(8, 2) == (64, 64)


def test_token_sine_positions_alternate_sine_and_cosine_of_the_running_number():
  table = positions.token_sine_positions(50, 4)
  np.testing.assert_allclose(
    table[7], [np.sin(7), np.cos(7), np.sin(0.07), np.cos(0.07)], rtol=1e-6
  )
  net = tiny(masking="drop", positions="sine")
  frames = jnp.zeros((1, 2, 16, 24, 3))
  mask = jnp.zeros((1, 2, 4, 6), bool).at[:, 1, 1:].set(True)
  params = init(net, frames, mask, num_visible=30)
  assert not any("positions" in name for name in params)
  # Equal patches are told apart by their positions alone.
  predicted = np.asarray(image(params, frames, mask, net, num_visible=30))
  assert predicted[:, 4:].std(axis=(1, 2)).max() > 1e-4


def test_attention_in_cache_is_attention_whatever_the_lengths_and_has_its_gradient(monkeypatch):
  monkeypatch.setattr(cached_attention, "_SCORES", 4 * 7)
  q, k, v, cotangent = jax.random.normal(jax.random.key(4), (4, 2, 7, 3, 8))

  @partial(jax.jit, static_argnames="implementation")
  def value_and_gradient(q, k, v, cotangent, implementation):
    loss = lambda *qkv: (layers.attend(*qkv, implementation) * cotangent).sum()  # noqa: E731
    return layers.attend(q, k, v, implementation), jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  for n in (3, 7):
    cached, whole = (
      value_and_gradient(q[:, :n], k, v, cotangent[:, :n], kind) for kind in ("cached", "einsum")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cached, whole)


def test_large_score_matrices_are_not_made_on_a_cpu():
  """Nothing as large as all scores of two heads is made, nor of one at thousands of tokens."""
  if jax.default_backend() != "cpu":
    pytest.skip("other devices have kernels of their own")
  few, some, many = (jax.ShapeDtypeStruct((1, n, 2, 8), jnp.float32) for n in (32, 512, 2048))
  assert "2,32,32" in str(jax.make_jaxpr(layers.attend)(few, few, few))
  assert ("2,512,512" in str(jax.make_jaxpr(layers.attend)(some, some, some))) == (
    jax.device_count() > 1
  )
  assert "2048,2048" not in str(jax.make_jaxpr(layers.attend)(many, many, many))


@pytest.mark.parametrize("name", opt_cwm.MODELS)
def test_released_sizes_have_the_releases_parameter_counts(name):
  """Counts from the public layers' shapes; keys without a bias are zero biases here."""
  model = opt_cwm.get_config(name).model
  net = models.build(model)
  h, w = model.image_hw
  n = h * w // model.patch**2
  grid = (h // model.patch, w // model.patch)
  shapes = jax.eval_shape(
    lambda key: net.init(
      key, jnp.zeros((1, 2, h, w, 3)), jnp.zeros((1, 2, *grid), bool), num_visible=2 * n
    ),
    jax.random.key(0),
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  e, d, pixels = model.encoder_width, model.decoder_width, 3 * model.patch**2
  block = lambda c: 12 * c * c + 13 * c  # noqa: E731
  want = pixels * e + e + model.encoder_depth * block(e) + 2 * e + e * d + d
  want += model.decoder_depth * block(d) + 2 * d + d * pixels + pixels
  want += e if model.masking == "token" else d
  if model.positions == "learned":
    want += 2 * 32 * 32 * (e + d)
  assert count == want
  with pytest.raises(ValueError, match="unknown release"):
    opt_cwm.model("opt-cwm-1024")
