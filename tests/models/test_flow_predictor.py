"""Flow-conditioned predictors: what they begin as, what reaches them, what they refuse."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cwm_jax import geometry, models
from cwm_jax.configs import base
from cwm_jax.models import flow_predictor

SIDE, PATCH, POINTS = 16, 4, 3


def build(kind, two_stream=None, **changes):
  section = base.get_config().flow_predictor
  section.update(kind=kind, patch=PATCH, **changes)
  section.single.update(width=16, depth=2, heads=2)
  section.two_stream.update(
    setting="plain",
    encoder_width=16,
    encoder_heads=2,
    encoder_links=("o<->o", "o-_"),
    decoder_width=16,
    decoder_heads=2,
    decoder_links=("o<-_",),
  )
  section.two_stream.update(two_stream or {})
  return models.build_flow_predictor(section.to_dict())


def inputs(seed=0, *, side=SIDE, batch=2):
  """A normalised frame, points in distinct patches and their flows."""
  rng = np.random.default_rng(seed)
  frame = rng.standard_normal((batch, side, side, 3)).astype(np.float32)
  cells = np.stack([rng.permutation((side // PATCH) ** 2)[:POINTS] for _ in range(batch)])
  yx = np.stack([cells // (side // PATCH), cells % (side // PATCH)], -1) * PATCH
  points_xy = (yx[..., ::-1] + rng.uniform(0, PATCH, yx.shape)).astype(np.float32)
  flow_xy = rng.normal(0, 3, points_xy.shape).astype(np.float32)
  return tuple(map(jnp.asarray, (frame, points_xy, flow_xy)))


@functools.partial(jax.jit, static_argnums=0)
def predict(net, params, *given):
  return net.apply({"params": params}, *given)


@functools.partial(jax.jit, static_argnums=0)
def init(net, *given):
  return net.init(jax.random.key(0), *given)["params"]


def stirred(net, seed=1):
  """Parameters away from the start, where some are zero."""
  leaves, tree = jax.tree.flatten(init(net, *inputs()))
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return tree.unflatten([x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


@pytest.fixture(scope="module", params=["single", "two_stream"])
def kind(request):
  return request.param


def test_a_single_stream_begins_as_a_copy_of_frame_1():
  net, (frame, points_xy, flow_xy) = build("single"), inputs()
  image = predict(net, init(net, frame, points_xy, flow_xy), frame, points_xy, flow_xy)
  np.testing.assert_allclose(image, geometry.unnormalise(frame), atol=1e-6)


def test_the_flow_of_every_point_reaches_the_picture_and_its_gradient_comes_back(kind):
  net, given = build(kind), inputs()
  params = stirred(net)

  def total(frame, points_xy, flow_xy):
    return jnp.sum(jnp.square(predict(net, params, frame, points_xy, flow_xy)))

  gradient = jax.jit(jax.grad(total, argnums=2))(*given)
  assert gradient.shape == given[2].shape and np.all(np.abs(gradient) > 0)


def test_the_order_of_points_means_nothing(kind):
  net, (frame, points_xy, flow_xy) = build(kind), inputs()
  call = functools.partial(predict, net, stirred(net))
  order = jnp.array([2, 0, 1])
  np.testing.assert_allclose(
    call(frame, points_xy[:, order], flow_xy[:, order]),
    call(frame, points_xy, flow_xy),
    atol=2e-5,
  )


def test_pairs_of_a_batch_do_not_see_each_other(kind):
  net, (frame, points_xy, flow_xy) = build(kind), inputs()
  call = functools.partial(predict, net, stirred(net))
  other = call(frame, points_xy, flow_xy.at[1].set(0.0)) - call(frame, points_xy, flow_xy)
  np.testing.assert_allclose(other[0], 0, atol=1e-6)
  assert np.abs(other[1]).max() > 1e-3


def test_recomputing_in_the_backward_pass_changes_no_number(kind):
  given = inputs()
  params = stirred(build(kind))

  def gradient(remat):
    net = build(kind, remat=remat)
    loss = lambda p: jnp.mean(jnp.square(predict(net, p, *given)))  # noqa: E731
    return jax.grad(loss), jax.jit(jax.grad(loss))(params)

  plain, kept = gradient("none")
  full, recomputed = gradient("full")
  for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert "remat" in str(jax.make_jaxpr(full)(params))
  assert "remat" not in str(jax.make_jaxpr(plain)(params))


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (dict(kind="triple"), "kind is 'triple'; choose one of single, two_stream"),
    (dict(dtype="float16"), "dtype is 'float16'"),
  ],
)
def test_what_cannot_be_built_is_told(change, told):
  section = base.get_config().flow_predictor
  section.update(**change)
  with pytest.raises(ValueError, match=told):
    models.build_flow_predictor(section.to_dict())


def test_sizes_that_do_not_fit_are_told(kind):
  net, (frame, points_xy, flow_xy) = build(kind), inputs()
  with pytest.raises(ValueError, match="18 x 16 does not divide into patches of 4"):
    net.init(jax.random.key(0), jnp.zeros((2, 18, 16, 3)), points_xy, flow_xy)
  with pytest.raises(ValueError, match="at least one point"):
    net.init(jax.random.key(0), frame, points_xy[:, :0], flow_xy[:, :0])


def test_of_two_streams_a_flow_counts_for_the_patch_its_point_lies_in():
  net, (frame, points_xy, flow_xy) = build("two_stream"), inputs()
  call = functools.partial(predict, net, stirred(net))
  corners = jnp.floor(points_xy / PATCH) * PATCH
  image = call(frame, points_xy, flow_xy)
  np.testing.assert_allclose(call(frame, corners + PATCH - 0.01, flow_xy), image, atol=1e-5)
  assert np.abs(call(frame, (corners + PATCH) % SIDE, flow_xy) - image).max() > 1e-3


def test_patches_without_a_point_have_the_mask_token_and_those_with_two_their_mean():
  tokens = jnp.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 8.0]]])
  full = flow_predictor.fill_up(tokens, jnp.array([[3, 0, 3]]), 4, jnp.array([-1.0, -2.0]))
  np.testing.assert_array_equal(full, [[[3, 4], [-1, -2], [-1, -2], [3, 5]]])


def test_the_release_normalises_frame_1_once_more_and_has_one_head_across():
  def settings(heads):
    ways = dict(encoder_links=("o<-_",), encoder_heads=heads, decoder_heads=heads)
    return [build("two_stream", dict(setting=name, **ways)) for name in ("plain", "release")]

  frame, points_xy, flow_xy = inputs()
  params = stirred(settings(1)[0])
  (one, one_release), (two, two_release) = [
    [functools.partial(predict, net, params) for net in settings(heads)] for heads in (1, 2)
  ]
  again = geometry.normalise(frame)
  given = points_xy, flow_xy
  np.testing.assert_allclose(one_release(frame, *given), one(again, *given), atol=1e-5)
  assert np.abs(one_release(frame, *given) - one(frame, *given)).max() > 1e-2
  assert np.abs(two_release(frame, *given) - two(again, *given)).max() > 1e-2


def test_weights_for_one_grid_refuse_another():
  net, (frame, points_xy, flow_xy) = build("two_stream", dict(grid_hw=(5, 4))), inputs()
  with pytest.raises(ValueError, match=r"is for \(5, 4\) patches, the image has \(4, 4\)"):
    net.init(jax.random.key(0), frame, points_xy, flow_xy)


@pytest.mark.parametrize(
  ("two_stream", "told"),
  [
    (dict(setting="sane"), "the setting is 'sane'; choose one of release, plain"),
    (dict(encoder_links=("o<=>o",)), "not 'o<=>o'"),
  ],
)
def test_of_two_streams_unknown_choices_are_told(two_stream, told):
  with pytest.raises(ValueError, match=told):
    build("two_stream", two_stream).init(jax.random.key(0), *inputs())


def test_a_single_stream_learns_to_move_the_picture_as_the_flow_says():
  """Pictures moved as a whole; with the right flow the error falls well below another's."""
  net = build("single")
  optimizer = optax.adam(3e-3)

  def batch(key):
    first, second = jax.random.split(key)
    coarse = jax.random.uniform(first, (16, 6, 6, 3))
    big = jax.image.resize(coarse, (16, 24, 24, 3), "linear")
    move = jax.random.randint(second, (16, 2), -4, 5)

    def shifted(picture, by_xy):
      start = (4 - by_xy[1], 4 - by_xy[0], 0)
      return jax.lax.dynamic_slice(picture, start, (SIDE, SIDE, 3))

    frames = [jax.vmap(shifted)(big, move * i) for i in (0, 1)]
    points_xy = jnp.broadcast_to(jnp.array([[6.0, 6.0], [10.0, 10.0]]), (16, 2, 2))
    flow_xy = jnp.broadcast_to(move[:, None].astype(jnp.float32), (16, 2, 2))
    return geometry.normalise(frames[0]), frames[1], points_xy, flow_xy

  def loss(params, given, flow_xy):
    frame1, frame2, points_xy, _ = given
    return jnp.mean(jnp.square(predict(net, params, frame1, points_xy, flow_xy) - frame2))

  @jax.jit
  def train(params, keys):
    def step(carry, key):
      params, state = carry
      given = batch(key)
      gradient = jax.grad(loss)(params, given, given[3])
      updates, state = optimizer.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

  first = batch(jax.random.key(0))
  params = init(net, first[0], first[2], first[3])
  params = train(params, jax.random.split(jax.random.key(2), 300))
  held_out = batch(jax.random.key(3))
  told = loss(params, held_out, held_out[3])
  assert told < 0.8 * loss(params, held_out, jnp.zeros_like(held_out[3]))
  assert told < 0.8 * loss(params, held_out, jnp.roll(held_out[3], 1, axis=0))
