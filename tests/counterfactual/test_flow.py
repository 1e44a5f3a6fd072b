"""Where an answer is counted from: the mark's own middle, whatever its side."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import toy_predictors as toys
from jax.tree_util import Partial

from cwm_jax.counterfactual import compiled, flow, learned_flow, perturb

# A flat pair, so that a square's response is flat too and its middle is known exactly.
FRAMES = jnp.zeros((2, 24, 32, 3))
POINTS = jnp.array([[10.5, 8.5], [20.875, 12.125], [13.0, 9.0]])
MASKS = jnp.ones((1, 2, 6, 8), bool).at[:, 0].set(False)


@pytest.mark.parametrize("readout", ["soft", "window"])
@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_square_of_any_side_is_counted_from_its_own_middle(side, readout):
  mark = perturb.Square(size=side)
  for dy, dx in [(0, 0), (3, 5)]:
    answer = flow.flow_pair(
      toys.shifted_by(dy, dx), mark, FRAMES, MASKS, POINTS, readout=readout, order="paper"
    )
    np.testing.assert_allclose(answer.xy, POINTS + jnp.array([dx, dy]), atol=1e-4)


@pytest.mark.parametrize("side", [2, 3])
def test_learned_flow_and_explanations_count_from_a_square_s_middle_too(side):
  mark, predict = perturb.Square(size=side), toys.shifted_by(3, 5)
  asked = FRAMES[None], MASKS[None, None], POINTS[None]
  found = learned_flow.learned_flow(predict, Partial(mark), *asked)
  np.testing.assert_allclose(found.flow_xy[0], np.tile([5.0, 3.0], (3, 1)), atol=1e-4)
  size = np.array([24, 32], np.int32)
  marked = mark(FRAMES[0], POINTS[1])
  _, answer = compiled.explain_answer(
    (jnp.roll(marked, (3, 5), (0, 1)) - FRAMES[1])[None],
    jnp.ones((1, 3)),
    MASKS[None],
    np.int32(1),
    POINTS[1],
    size,
    image_hw=(24, 32),
    read_at=None,
    middle=perturb.middle(mark),
    readout="window",
    inverse_temperature=200.0,
    occlusion_threshold=0.05,
    order="release",
    average="hidden",
    protocol="half_pixel",
  )
  np.testing.assert_allclose(answer.xy[0], POINTS[1] + jnp.array([5, 3]), atol=1e-4)


def test_marks_tell_where_in_the_query_s_pixel_their_middle_lies():
  even, odd, bump = perturb.Square(size=2), perturb.Square(size=3), perturb.WhiteGaussian()
  assert [perturb.middle(mark) for mark in (even, odd, bump)] == [0.0, 0.5, None]
  assert perturb.middle(partial(odd)) == perturb.middle(lambda *given: None) == 0.5
  assert perturb.middle(partial(even)) == 0.0


def test_the_release_s_answers_are_bare_indices_whatever_the_square_s_side():
  response = flow.Response(jnp.zeros((1, 24, 32)).at[0, 12, 15].set(1.0), jnp.ones(1))
  for middle in (0.0, 0.5, None):
    answer = flow.read_out(
      response, POINTS[:1], readout="window", protocol="release", middle=middle
    )
    np.testing.assert_allclose(answer.xy, [[15.0, 12.0]])
