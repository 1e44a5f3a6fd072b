"""Psi-flow that begins as a predictor and is told where patches of frame 1 went."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from cwm_jax import geometry, models
from cwm_jax.configs import base
from cwm_jax.data import procedural, rendering
from cwm_jax.pretrained import weights

HW = (16, 24)


def model(**changes):
  return tiny_model.config(**{"image_hw": HW, **changes})


def section(**changes):
  return {**base.get_config().flow_predictor.to_dict(), "kind": "moved", **changes}


@functools.partial(jax.jit, static_argnums=0)
def predict(net, params, *given):
  return net.apply({"params": params}, *given)


@pytest.fixture(scope="module")
def net_and_params():
  """With parameters as a predictor has them."""
  predictor = models.build(model())
  frames, mask = jnp.zeros((1, 2, *HW, 3)), jnp.zeros((1, 2, 4, 6), bool)
  init = jax.jit(predictor.init, static_argnames="num_visible")
  params = init(jax.random.key(0), frames, mask, num_visible=48)["params"]
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  # Biases and the context embedding begin at zero, where they could be left out unnoticed.
  noisy = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)]
  return models.build_flow_predictor(section(), model()), jax.tree.unflatten(tree, noisy)


def some_input():
  rng = np.random.default_rng(0)
  frame1 = jnp.asarray(rng.normal(size=(2, *HW, 3)), jnp.float32)
  points_xy = jnp.asarray([[[2.5, 2.5], [14.5, 6.5], [23.5, 15.5]]] * 2)
  return frame1, points_xy, jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32)


def test_its_parameters_are_a_predictors(net_and_params):
  net, params = net_and_params
  own = jax.eval_shape(net.init, jax.random.key(0), *some_input())["params"]
  assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)


def test_the_order_of_points_means_nothing(net_and_params):
  net, params = net_and_params
  frame1, points_xy, flow_xy = some_input()
  found = predict(net, params, frame1, points_xy, flow_xy)
  again = predict(net, params, frame1, points_xy[:, ::-1], flow_xy[:, ::-1])
  np.testing.assert_allclose(again, found, atol=1e-5)
  other = predict(net, params, frame1, points_xy, flow_xy[:, ::-1])
  assert float(jnp.abs(other - found).max()) > 1e-3


def test_a_whole_patch_of_flow_tells_what_a_visible_patch_of_frame_2_tells(net_and_params):
  net, params = net_and_params
  frame1, points_xy, _ = some_input()
  # Frame 2 shows each point's patch one patch further to the left and one lower or higher.
  flow_xy = jnp.asarray([[[4.0, 4.0], [-4.0, 4.0], [-4.0, -4.0]]] * 2)
  frame2 = np.zeros_like(frame1)
  mask = np.ones((2, 2, 4, 6), bool)
  mask[:, 0] = False
  for (x, y), (dx, dy) in zip(points_xy[0], flow_xy[0], strict=True):
    row, column = int(y // 4), int(x // 4)
    to_row, to_column = row + int(dy // 4), column + int(dx // 4)
    patch = frame1[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    frame2[:, 4 * to_row : 4 * to_row + 4, 4 * to_column : 4 * to_column + 4] = patch
    mask[:, 1, to_row, to_column] = False
  frames = jnp.stack([frame1, frame2], axis=1)
  ways = dict(num_visible=24 + 3, mutable="intermediates")
  see = jax.jit(functools.partial(models.build(model()).apply, **ways))
  tell = jax.jit(functools.partial(net.apply, mutable="intermediates"))
  _, seen = see({"params": params}, frames, jnp.asarray(mask))
  _, told = tell({"params": params}, frame1, points_xy, flow_xy)
  seen, told = (x["intermediates"]["encoder_tokens"][0] for x in (seen, told))
  # The predictor lists visible patches of frame 2 in raster order, this one in that of the points.
  order = np.argsort([6 * 1 + 1, 6 * 2 + 2, 6 * 2 + 4])
  np.testing.assert_allclose(told[:, :24], seen[:, :24], atol=1e-4)
  np.testing.assert_allclose(told[:, 24:][:, order], seen[:, 24:], atol=1e-4)


def test_the_prediction_is_smooth_in_the_flow(net_and_params):
  net, params = net_and_params
  frame1, points_xy, flow_xy = some_input()

  def total(flow_xy):
    return jnp.sum(jnp.square(predict(net, params, frame1, points_xy, flow_xy)))

  slope = jax.jit(jax.grad(total))(flow_xy)
  step = 0.1 * slope / jnp.linalg.norm(slope)
  found = float(total(flow_xy + step) - total(flow_xy - step)) / 2
  assert found == pytest.approx(float(jnp.sum(slope * step)), rel=5e-2)
  assert np.all(np.asarray(slope) != 0)


def test_untrained_the_shipped_predictor_already_heeds_the_flow():
  params, config = weights.load(weights.shipped())
  net = models.build_flow_predictor(section(), config["model"])
  preset = procedural.preset_at(0, ((0, "views"),))
  scenes = [procedural.draw_scene(seed, preset, max_objects=4) for seed in range(8)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *scenes)
  pair = rendering.render(stacked, size_hw=(64, 64), texture_size=64, truth=True)
  rows, columns = np.random.default_rng(0).integers(8, 56, (2, 8, 8))
  points_xy = jnp.asarray(np.stack([columns, rows], axis=-1) + 0.5, jnp.float32)
  flow_xy = jnp.asarray(pair.flow_xy)[jnp.arange(8)[:, None], rows, columns]

  @jax.jit
  def error(flow_xy):
    frame1 = geometry.normalise(pair.frames[:, 0])
    found = predict(net, params, frame1, points_xy, flow_xy)
    return jnp.mean(jnp.square(found - pair.frames[:, 1]))

  told, nothing, another = error(flow_xy), error(0 * flow_xy), error(jnp.roll(flow_xy, 1, axis=0))
  assert nothing > 1.2 * told and another > 1.2 * told


@pytest.mark.parametrize(
  ("changes", "said"), [(dict(positions="learned"), "rotary"), (dict(masking="token"), "drop")]
)
def test_it_cannot_begin_as_a_predictor_of_another_design(changes, said):
  with pytest.raises(ValueError, match=said):
    models.build_flow_predictor(section(), model(**changes))


def test_it_needs_a_predictor_to_begin_as():
  with pytest.raises(ValueError, match="begins as a predictor"):
    models.build_flow_predictor(section())
