"""RAFT and SEA-RAFT: correlation two ways, iterations, resizes, what gradients reach."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from cwm_jax import geometry, models
from cwm_jax.configs import base, flow_networks
from cwm_jax.models import correlation, flow_encoders, flow_network, flow_updates

RNG = np.random.default_rng(0)
TINY = tiny_model.flow_network() | dict(radius=2, levels=4, iterations=2)


def build(kind, **changes):
  section = dict(base.get_config().flow_network) | TINY | dict(kind=kind) | changes
  return models.build_flow_network(section)


def init(net, frames):
  params = jax.jit(net.init)(jax.random.key(1), frames)["params"]
  return jax.tree.map(lambda x: x + 0.02 * RNG.normal(size=x.shape).astype(np.float32), params)


def run(fn, *arguments):
  """Compiled as a whole: what two calls in it share is computed, and compiled, once."""
  return jax.jit(fn)(*arguments)


def some_frames(h=40, w=56, batch=1):
  return jnp.asarray(RNG.random((batch, 2, h, w, 3), np.float32))


def some_features(h, w, c=6, batch=2):
  return (jnp.asarray(RNG.normal(size=(batch, h, w, c)), jnp.float32) for _ in range(2))


def naive_look_up(first, second, places, *, levels, radius):
  """One number at a time, from the definition."""
  b, h, w, c = first.shape
  first, pyramid = np.asarray(first, np.float64), [np.asarray(second, np.float64)]
  for _ in range(levels - 1):
    m = pyramid[-1]
    m = m[:, : m.shape[1] // 2 * 2, : m.shape[2] // 2 * 2]
    pyramid.append((m[:, ::2, ::2] + m[:, 1::2, ::2] + m[:, ::2, 1::2] + m[:, 1::2, 1::2]) / 4)
  found = []
  for i, m in enumerate(pyramid):
    for dx in range(-radius, radius + 1):
      for dy in range(-radius, radius + 1):
        x, y = places[..., 0] / 2**i + dx, places[..., 1] / 2**i + dy
        total = np.zeros((b, h, w))
        for px in range(m.shape[2]):
          for py in range(m.shape[1]):
            share = np.maximum(0, 1 - abs(x - px)) * np.maximum(0, 1 - abs(y - py))
            total += share * (first * m[:, None, None, py, px]).sum(-1) / np.sqrt(c)
        found.append(total)
  return np.stack(found, axis=-1)


@pytest.mark.parametrize("way", ["all_pairs", "on_demand"])
def test_a_look_up_is_bilinear_and_moves_along_x_in_its_slow_axis(way):
  first, second = some_features(5, 7)
  places = RNG.uniform(-3, 9, (2, 5, 7, 2)).astype(np.float32)
  places[0, 0, 0] = (0, 4)  # on a pixel, on the border
  places[0, 0, 1] = (1e9, -1e9)

  def find(first, second, places):
    correlated = correlation.correlate(first, second, levels=3, way=way)
    return correlation.look_up(correlated, places, radius=2)

  got = run(find, first, second, jnp.asarray(places))
  want = naive_look_up(first, second, places, levels=3, radius=2)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_both_ways_of_correlating_agree_also_in_their_gradients(monkeypatch):
  monkeypatch.setattr(correlation, "_CHUNK", 16)  # several chunks, the last one not full
  first, second = some_features(9, 11)
  places = jnp.asarray(RNG.uniform(-2, 12, (2, 9, 11, 2)), jnp.float32)
  weights = jnp.asarray(RNG.normal(size=(2, 9, 11, 4 * 49)), jnp.float32)

  def found(way, first, second):
    correlated = correlation.correlate(first, second, way=way)
    return correlation.look_up(correlated, places, radius=3)

  def both(first, second):
    for way in ("all_pairs", "on_demand"):
      values, back = jax.vjp(functools.partial(found, way), first, second)
      yield values, back(weights)

  one, other = run(lambda *f: tuple(both(*f)), first, second)
  np.testing.assert_allclose(one[0], other[0], atol=1e-5)
  for mine, theirs in zip(one[1], other[1]):
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert np.abs(mine).max() > 0.1


def test_on_demand_memory_grows_with_the_pixels_and_all_pairs_with_their_square():
  def peak(way, side):
    features = jax.ShapeDtypeStruct((1, side, side, 16), "float32")
    places = jax.ShapeDtypeStruct((1, side, side, 2), "float32")

    def both(first, second, places):
      correlated = correlation.correlate(first, second, way=way)
      return correlation.look_up(correlated, places, radius=3).sum(-1)

    return jax.jit(both).lower(features, features, places).compile().memory_analysis()

  small, large = 32, 64  # 1,024 and 4,096 pixels
  pairs, demand = (
    [peak(way, side).temp_size_in_bytes for side in (small, large)]
    for way in ("all_pairs", "on_demand")
  )
  volume = 4 * large**4
  assert pairs[1] > volume > 4 * demand[1]
  assert demand[1] < 4.5 * demand[0]
  assert pairs[1] > 8 * pairs[0]


def test_auto_takes_all_pairs_until_the_volume_is_too_large(monkeypatch):
  first, second = some_features(4, 4)
  assert correlation.correlate(first, second).first is None
  monkeypatch.setattr(correlation, "_LARGEST_VOLUME", 1000)
  assert correlation.correlate(first, second).first is not None
  with pytest.raises(ValueError, match="the correlation is 'some'; choose one of auto"):
    correlation.correlate(first, second, way="some")


def test_a_depthwise_convolution_is_what_the_compiler_would_make_of_it():
  x = jnp.asarray(RNG.normal(size=(2, 9, 12, 5)), jnp.float32)
  kernel = jnp.asarray(RNG.normal(size=(7, 7, 1, 5)), jnp.float32)
  want = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), [(3, 3), (3, 3)], dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=5,
  )  # fmt: skip
  np.testing.assert_allclose(run(flow_updates.depthwise, x, kernel), want, atol=1e-4)


def test_convex_upsampling_takes_the_neighbour_that_its_weights_name():
  values = jnp.asarray(RNG.normal(size=(1, 3, 4, 2)), jnp.float32)
  logits = np.zeros((1, 3, 4, 9, 8, 8), np.float32)
  logits[..., 4, :, :] = 100.0  # itself
  logits[..., 1, 0, :] = 200.0  # the upper one, for the first row of each cell
  logits[..., 5, 7, 7] = 300.0  # the right one, for each cell's last pixel
  fine = run(flow_updates.upsample_convex, values, jnp.asarray(logits.reshape(1, 3, 4, -1)))
  assert fine.shape == (1, 24, 32, 2)
  np.testing.assert_allclose(fine[0, 9:15, 8:16], np.broadcast_to(values[0, 1, 1], (6, 8, 2)))
  np.testing.assert_allclose(fine[0, 8, 8:16], np.broadcast_to(values[0, 0, 1], (8, 2)))
  np.testing.assert_allclose(fine[0, 0], 0)  # above the image there is nothing
  np.testing.assert_allclose(fine[0, 15, 15], values[0, 1, 2])


@pytest.mark.parametrize(("kind", "estimates"), [("raft", 2), ("sea_raft", 3)])
def test_the_last_of_every_estimate_is_the_answer(kind, estimates):
  net, frames = build(kind), some_frames(27, 35)

  def calls(params):
    ask = functools.partial(net.apply, {"params": params}, frames)
    return ask(every=True), ask(), ask(iterations=1), ask(iterations=0) if starts else None

  starts = kind == "sea_raft"
  every, last, once, none = run(calls, init(net, frames))
  assert every.flow_xy.shape == (estimates, 1, 27, 35, 2) and last.flow_xy.shape == (1, 27, 35, 2)
  np.testing.assert_allclose(every.flow_xy[-1], last.flow_xy, atol=1e-5)
  np.testing.assert_allclose(every.flow_xy[-2], once.flow_xy, atol=1e-5)
  assert np.abs(every.flow_xy[-1] - every.flow_xy[-2]).max() > 1e-3
  if starts:
    np.testing.assert_allclose(every.info[-1], last.info, atol=1e-5)
    np.testing.assert_allclose(every.flow_xy[0], none.flow_xy, atol=1e-5)
  else:
    assert last.info is None


@pytest.mark.parametrize("changes", [
  dict(kind="raft", gru="square", upsampling="bilinear", block="bottleneck", context_norm="none",
       corr_widths=(8,)),
  dict(kind="sea_raft", refine_blocks=1, feature_norm="group", context_norm="group", stem_width=8,
       widths=(8, 16, 16)),
])  # fmt: skip
def test_recomputing_iterations_changes_no_gradient(changes):
  net = build(**changes)
  frames = some_frames(24, 28)

  def gradient(net, params):
    def loss(params):
      return jnp.mean(jnp.abs(net.apply({"params": params}, frames, every=True).flow_xy))

    return jax.grad(loss)(params)

  found, again = run(
    lambda p: (gradient(net, p), gradient(net.clone(remat=True), p)), init(net, frames)
  )
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), found, again)
  told = jax.tree_util.tree_leaves_with_path(found)
  # A bias before an instance norm does nothing, and statistics are stored; the rest is trained.
  idle = [jax.tree_util.keystr(path) for path, leaf in told if not np.any(leaf)]
  assert all(name.endswith(("['bias']", "['mean']", "['var']")) for name in idle), idle


def test_no_gradient_reaches_stored_statistics():
  norm, x = flow_encoders.FixedBatchNorm(), jnp.asarray(RNG.normal(size=(1, 3, 3, 4)), jnp.float32)
  params = norm.init(jax.random.key(0), x)["params"]
  params |= dict(mean=jnp.arange(4.0), var=1.0 + jnp.arange(4.0))
  want = (np.asarray(x) - np.arange(4)) / np.sqrt(1 + np.arange(4) + 1e-5)
  np.testing.assert_allclose(norm.apply({"params": params}, x), want, atol=1e-5)
  found = jax.grad(lambda p: jnp.sum(norm.apply({"params": p}, x) ** 2))(params)
  assert np.all(found["scale"] != 0)
  assert not np.any(found["mean"]) and not np.any(found["var"])


def test_frames_seen_at_half_their_size_give_flow_in_their_own_pixels():
  net, frames = build("sea_raft"), some_frames(24, 32)
  double = jnp.repeat(jnp.repeat(frames, 2, axis=2), 2, axis=3)

  def both(params):
    halved = net.clone(scale=-1).apply({"params": params}, double).flow_xy
    return net.apply({"params": params}, frames).flow_xy, halved

  flow, halved = run(both, init(net, frames))
  assert halved.shape == (1, 48, 64, 2)
  # Enlarging is linear: 2 x 2 pixels hold the mean of a pixel and shares of its neighbours.
  want = 2 * geometry.resize(flow, (48, 64))
  np.testing.assert_allclose(halved, want, atol=1e-4)


def test_padding_is_split_or_below():
  assert flow_network.pad_amounts((130, 150), "split") == ((3, 3), (1, 1))
  assert flow_network.pad_amounts((131, 147), "split") == ((2, 3), (2, 3))
  assert flow_network.pad_amounts((131, 147), "bottom") == ((0, 5), (2, 3))
  assert flow_network.pad_amounts((128, 160), "split") == ((0, 0), (0, 0))


@pytest.mark.parametrize("hw", [(8, 8), (17, 70)])
def test_frames_too_small_for_the_pyramid_still_have_flow(hw):
  net, frames = build("raft"), some_frames(*hw)
  flow = run(lambda p: net.apply({"params": p}, frames).flow_xy, init(net, frames))
  assert flow.shape == (1, *hw, 2) and np.isfinite(flow).all()


def test_bfloat16_stays_near():
  net, frames = build("sea_raft", iterations=1), some_frames(24, 32)

  def both(params):
    rough = net.clone(dtype=jnp.bfloat16)
    return [n.apply({"params": params}, frames).flow_xy for n in (net, rough)]

  flow, rough = run(both, init(net, frames))
  assert rough.dtype == jnp.float32 and not np.array_equal(rough, flow)
  assert np.abs(rough - flow).max() < 0.1 * np.abs(flow).max() + 0.02


@pytest.mark.parametrize(
  ("name", "count"),
  [("raft-large-C_T_V1", 5_257_536), ("raft-small-C_T_V1", 990_162)],
)
def test_released_networks_have_as_many_parameters_as_published(name, count):
  section = dict(base.get_config().flow_network) | flow_networks.network(name)
  net = models.build_flow_network(section)
  shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2, 64, 64, 3)))
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  own = [leaf for path, leaf in leaves if path[-1].key not in ("mean", "var")]
  assert sum(int(np.prod(leaf.shape)) for leaf in own) == count


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(kind="none"), "flow_network.kind is 'none'"),
    (dict(kind="raft", gru="long"), "the GRU is 'long'"),
    (dict(kind="raft", upsampling="cubic"), "the upsampling is 'cubic'"),
    (dict(kind="raft", block="wide"), "the block is 'wide'"),
    (dict(kind="raft", context_norm="layer"), "the norm is 'layer'"),
    (dict(kind="raft", padding="left"), "the padding is 'left'"),
    (dict(kind="raft", dtype="float8"), "flow_network.dtype is 'float8'"),
  ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(changes, said):
  with pytest.raises(ValueError, match=said):
    jax.eval_shape(build(**changes).init, jax.random.key(0), some_frames())


def test_frames_of_any_size_are_seen_at_the_network_s_own():
  net, frames = build("sea_raft"), some_frames(32, 48)
  seen = geometry.resize(frames, (16, 16), antialias=True)

  def both(params):
    own = net.apply({"params": params}, seen).flow_xy
    return own, net.clone(image_hw=(16, 16)).apply({"params": params}, frames).flow_xy

  own, found = run(both, init(net, frames))
  want = geometry.resize(jnp.asarray(own), (32, 48)) * jnp.array([3.0, 2.0])
  np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
