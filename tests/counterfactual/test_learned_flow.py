"""diffFLOW: the same answers as FLOW read softly, gradients through the marked pass, memory."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import joint_job
import numpy as np
import pytest
from jax.tree_util import Partial

from cwm_jax import tasks
from cwm_jax.counterfactual import flow, learned_flow, masks
from cwm_jax.types import FramePair, InputError, Prediction

SIDE, PATCH, SHIFT = 24, 4, (3, 6)  # (dy, dx) of every point


def moved(params, frames, mask):
  """A predictor of a world that moves by SHIFT: frame 1, moved, times a parameter."""
  second = jnp.roll(frames[:, 0], SHIFT, axis=(1, 2)) * params
  hidden = masks.patches_to_pixels(mask[:, 1], PATCH)[..., None]
  grid = frames.shape[2] // PATCH
  tokens = frames[:, 0].reshape(-1, grid, PATCH, grid, PATCH, 3).mean((2, 4))
  return Prediction(jnp.where(hidden, second, 0.0), tokens)


def bump(params, frame1, point_xy, token):
  """A bump on the query's pixel whose height depends on parameters and on the token."""
  h, w = frame1.shape[:2]
  y, x = jnp.arange(h)[:, None] + 0.5, jnp.arange(w)[None] + 0.5
  near = jnp.exp(-((x - point_xy[0]) ** 2 + (y - point_xy[1]) ** 2))
  return frame1 + near[..., None] * (params + 0.1 * token.mean())


@pytest.fixture(scope="module")
def asked():
  """(frames, points): two pairs, three queries each that stay inside."""
  frames = jax.random.normal(jax.random.key(0), (2, 2, SIDE, SIDE, 3))
  points = jnp.array(
    [[[6.5, 6.5], [10.5, 14.5], [2.5, 9.5]], [[9.5, 3.5], [4.5, 4.5], [13.5, 8.5]]]
  )
  return frames, points


def all_hidden(k, m):
  return masks.sample_masks(jax.random.key(1), (6, 6), 0, (2, k, m))


@pytest.mark.parametrize("k, m, at_once", [(1, 1, 1), (3, 2, 1), (3, 2, 2), (1, 3, 3)])
def test_the_flow_of_a_world_that_moves_is_found_however_the_passes_are_laid_out(
  asked, k, m, at_once
):
  frames, points = asked
  found = learned_flow.learned_flow(
    partial(moved, 1.0),
    Partial(bump, 1.0),
    frames,
    all_hidden(k, m),
    points,
    points_at_once=at_once,
  )
  np.testing.assert_allclose(found.flow_xy, jnp.broadcast_to(jnp.array(SHIFT[::-1]), (2, 3, 2)))
  assert found.spread.shape == found.peak.shape == (2, 3)
  np.testing.assert_allclose(found.spread, 0.0, atol=1e-6)


def test_it_answers_what_flow_read_softly_answers_under_the_same_masks(asked):
  frames, points = asked
  drawn = masks.sample_masks(jax.random.key(4), (6, 6), 9, (2, 3, 2))
  predict, mark = partial(moved, 1.0), Partial(bump, 0.7)
  for order in ("release", "paper"):
    settings = dict(order=order, inverse_temperature=3.0, average="hidden")
    found = learned_flow.learned_flow(predict, mark, frames, drawn, points, **settings)
    for pair, point in np.ndindex(2, 3):
      want = flow.flow_pair(
        predict, mark, frames[pair], drawn[pair, point], points[pair, point, None],
        readout="soft", **settings,
      )  # fmt: skip
      got = points[pair, point] + found.flow_xy[pair, point]
      np.testing.assert_allclose(got, want.xy[0], rtol=1e-5, atol=1e-4)


def test_frames_of_another_size_give_flow_in_their_own_pixels(asked):
  frames, points = asked
  found = learned_flow.learned_flow(
    partial(moved, 1.0),
    Partial(bump, 1.0),
    frames,
    all_hidden(1, 1),
    points * 2,
    video_hw=(2 * SIDE, 2 * SIDE),
  )
  np.testing.assert_allclose(found.flow_xy[0, 0], 2 * np.array(SHIFT[::-1]))


class Following:
  """`bump`, which says that it follows the query inside its pixel."""

  on_pixel = False

  def __call__(self, *given):
    return bump(*given)


def test_a_mark_off_its_pixel_gives_the_point_s_own_flow_in_frames_of_another_size(asked):
  frames, _ = asked
  # Pixel centres of the video that are none of the predictor's image; corners of its pixels.
  points = jnp.array([[[12.5, 13.5], [17.5, 20.5], [8.0, 18.0]]]).repeat(2, axis=0)
  predict, mark = partial(moved, 1.0), Partial(Following(), 1.0)
  drawn, settings = all_hidden(3, 2), dict(inverse_temperature=30.0)
  ask = partial(learned_flow.learned_flow, predict, mark, frames, drawn)
  found = ask(points, video_hw=(2 * SIDE, 2 * SIDE), **settings).flow_xy
  # By symmetry, at a corner.
  np.testing.assert_allclose(found[:, 2], 2 * jnp.array([SHIFT[::-1]] * 2), atol=1e-3)
  for pair, point in np.ndindex(2, 3):
    here = points[pair, point, None] / 2
    want = flow.flow_pair(
      predict, mark, frames[pair], drawn[pair, point], here, readout="soft", **settings
    )
    np.testing.assert_allclose(found[pair, point], 2 * (want.xy[0] - here[0]), atol=1e-3)


def test_a_point_on_a_pixel_s_centre_has_the_same_flow_however_its_mark_lies(asked):
  frames, points = asked
  ask = partial(learned_flow.learned_flow, partial(moved, 1.0))
  on, off = (
    ask(Partial(mark, 1.0), frames, all_hidden(1, 1), points, inverse_temperature=5.0)
    for mark in (bump, Following())
  )
  jax.tree.map(np.testing.assert_array_equal, on, off)


def test_gradients_go_through_the_marked_pass_alone(asked):
  frames, points = asked

  def total(mark_params, predictor_params, temperature=0.5):
    found = learned_flow.learned_flow(
      partial(moved, predictor_params),
      Partial(bump, mark_params),
      frames,
      all_hidden(3, 2),
      points,
      inverse_temperature=temperature,
    )
    return jnp.sum(found.flow_xy)

  gradient = float(jax.jit(jax.grad(total))(1.0, 1.0))
  step = 5e-2
  numeric = float(total(1.0 + step, 1.0) - total(1.0 - step, 1.0)) / (2 * step)
  assert gradient == pytest.approx(numeric, rel=3e-2) and abs(gradient) > 1e-2
  # The clean prediction is held fixed: as the predictor's scale grows, so does the difference of
  # the passes seen by the gradient, although true clean and marked predictions would cancel.
  through = float(jax.jit(jax.grad(total, argnums=1))(1.0, 1.0))
  both = float(total(1.0, 1.0 + step) - total(1.0, 1.0 - step)) / (2 * step)
  assert abs(through - both) > 1e-2


def test_gradients_are_the_same_however_the_passes_are_laid_out(asked):
  frames, points = asked
  shared = masks.sample_masks(jax.random.key(4), (6, 6), 9, (2, 1, 3))

  def gradient(drawn, at_once):
    def total(mark_params):
      found = learned_flow.learned_flow(
        partial(moved, 1.0),
        Partial(bump, mark_params),
        frames,
        drawn,
        points,
        inverse_temperature=0.5,
        points_at_once=at_once,
      )
      return jnp.sum(found.flow_xy * jnp.arange(1.0, 4.0)[:, None])

    return float(jax.jit(jax.grad(total))(1.0))

  apart, together = gradient(shared.repeat(3, axis=1), 1), gradient(shared, 2)
  assert together == pytest.approx(apart, rel=1e-3) and abs(apart) > 1e-2


@pytest.mark.parametrize(
  "k, settings, told",
  [
    (2, {}, "masks for 2 points; give them for each of 3 points, or for 1"),
    (1, {"order": "mine"}, "averaging order is 'mine'"),
    (1, {"protocol": "release"}, "averages over all masks"),
  ],
)
def test_what_does_not_go_together_is_told(asked, k, settings, told):
  frames, points = asked
  with pytest.raises(InputError, match=told):
    learned_flow.learned_flow(
      partial(moved, 1.0), Partial(bump, 1.0), frames, all_hidden(k, 1), points, **settings
    )


def peak_bytes(predictor, points, **changes):
  """Working memory of one gradient of the joint loss, from the compiled program."""
  config = joint_job.get_config(predictor, joint__num_points=points, **changes)
  task = tasks.build(config)
  pair = FramePair(jax.ShapeDtypeStruct((2, 2, *task.image_hw, 3), jnp.float32))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
  params = jax.eval_shape(task.init, jax.random.key(0))
  step = jax.jit(jax.grad(lambda *given: task.loss(*given)[0]))
  return step.lower(params, pair, keys).compile().memory_analysis().temp_size_in_bytes


def test_eight_points_take_at_most_three_times_the_memory_of_one(tmp_path):
  predictor = joint_job.weights_file(
    tmp_path, image_hw=[32, 32], encoder_width=32, decoder_width=32
  )
  one, eight = (peak_bytes(predictor, points) for points in (1, 8))
  assert eight <= 3 * one
