import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import geometry
from cwm_jax.counterfactual import perturb
from cwm_jax.types import InputError

FRAME = jnp.zeros((10, 12, 3))


def _changed(marked):
  rows, cols = np.nonzero(np.abs(np.asarray(marked - FRAME)).sum(-1))
  return sorted(set(rows.tolist())), sorted(set(cols.tolist()))


def test_an_odd_square_is_centred_on_the_pixel_that_holds_the_query():
  for point in ([6.0, 4.0], [6.99, 4.99]):
    assert _changed(perturb.Square(size=3)(FRAME, jnp.array(point))) == ([3, 4, 5], [5, 6, 7])


def test_an_even_square_reaches_one_pixel_further_up_and_left():
  marked = perturb.Square(size=4)(FRAME, jnp.array([6.5, 4.5]))
  assert _changed(marked) == ([2, 3, 4, 5], [4, 5, 6, 7])


@pytest.mark.parametrize("patch, size", [(8, 4), (4, 2), (1, 1)])
def test_where_nothing_is_said_the_mark_is_a_red_square_of_half_a_patch(patch, size):
  assert perturb.default(patch) == perturb.Square(colour=(255, 0, 0), size=size)


def test_a_square_is_cut_at_the_border():
  assert _changed(perturb.Square(size=5)(FRAME, jnp.array([0.1, 9.9]))) == ([7, 8, 9], [0, 1, 2])


def test_a_square_replaces_pixels_by_its_normalised_colour():
  marked = perturb.Square(colour=(0, 255, 0), size=1)(FRAME + 7.0, jnp.array([2.5, 3.5]))
  rgb = np.asarray(geometry.unnormalise(marked))
  np.testing.assert_allclose(rgb[3, 2], [0.0, 1.0, 0.0], atol=1e-6)
  np.testing.assert_allclose(np.asarray(marked)[3, 3], 7.0)


def test_a_gaussian_adds_its_amplitude_at_the_point_and_the_same_in_all_channels():
  marked = np.asarray(perturb.WhiteGaussian(-0.5, 1.0)(FRAME + 1.0, jnp.array([6.5, 4.5])))
  np.testing.assert_allclose(marked[4, 6], 0.5, atol=1e-6)
  np.testing.assert_allclose(marked[4, 7], 1.0 - 0.5 * np.exp(-0.5), atol=1e-6)
  np.testing.assert_array_equal(marked[..., 0], marked[..., 2])


@pytest.mark.parametrize("point_xy", [(6.5, 4.5), (6.1, 4.9), (5.0, 3.0)])
def test_a_gaussian_lies_on_the_point_below_its_pixel(point_xy):
  bump = np.asarray(perturb.WhiteGaussian(1.0, 1.0)(FRAME, jnp.array(point_xy)))[..., 0]
  rows, cols = np.mgrid[: bump.shape[0], : bump.shape[1]] + 0.5
  centre = [(bump * cols).sum() / bump.sum(), (bump * rows).sum() / bump.sum()]
  np.testing.assert_allclose(centre, point_xy, atol=0.01)


def test_a_learned_mark_is_added_to_the_frame():
  mark = perturb.additive(lambda token, point: jnp.full((10, 12, 3), token[0] * point[0]))
  np.testing.assert_allclose(mark(FRAME + 1.0, jnp.array([2.0, 0.0]), jnp.array([3.0])), 7.0)


def test_a_mark_is_built_from_its_description():
  assert perturb.build({"kind": "square", "colour": [0, 0, 255], "size": 6}) == perturb.Square(
    (0, 0, 255), 6
  )
  assert perturb.build({"kind": "gaussian", "sigma": 2.0}) == perturb.WhiteGaussian(sigma=2.0)


@pytest.mark.parametrize(
  "spec, word",
  [
    ({}, "kind"),
    ({"kind": "star"}, "star"),
    ({"kind": "square", "side": 3}, "side"),
    ({"kind": "square", "size": 0}, "size"),
    ({"kind": "square", "colour": [1, 2]}, "colour"),
    ({"kind": "gaussian", "sigma": 0.0}, "sigma"),
  ],
)
def test_a_description_that_makes_no_mark_is_refused_in_a_sentence(spec, word):
  with pytest.raises(InputError, match=word):
    perturb.build(spec)
