"""Learned marks: what the 18 numbers mean, how they are drawn and where they are laid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from cwm_jax.counterfactual import gaussian, perturb
from cwm_jax.types import GaussianParams


def test_numbers_reach_the_ends_of_their_ranges():
  low, high = (gaussian.gaussian_params(jnp.full((18,), x), size=12) for x in (-1.0, 1.0))
  np.testing.assert_allclose(high.mean_yx, 6.0)
  np.testing.assert_allclose(low.mean_yx, -6.0)
  np.testing.assert_allclose(low.std_yx, 1.0)
  np.testing.assert_allclose(high.std_yx, 6.0)
  np.testing.assert_allclose(high.correlation, 0.98, rtol=1e-6)
  np.testing.assert_allclose(low.amplitude, -1.0)


def test_six_numbers_in_a_row_are_one_channels():
  numbers = jnp.arange(18.0) / 18
  params = gaussian.gaussian_params(numbers, size=20)
  np.testing.assert_allclose(params.mean_yx[1], numbers[6:8] * 10)
  np.testing.assert_allclose(params.amplitude, numbers[5::6])


def params_with(**changes):
  plain = dict(
    mean_yx=jnp.zeros((3, 2)),
    std_yx=jnp.full((3, 2), 2.0),
    correlation=jnp.zeros(3),
    amplitude=jnp.array([1.0, -0.5, 0.25]),
  )
  return GaussianParams(**(plain | changes))


def test_each_channels_extreme_value_on_the_grid_is_its_amplitude():
  mean = jnp.array([[0.3, -2.2], [9.0, 9.0], [-30.0, 4.0]])
  mark = gaussian.draw(params_with(mean_yx=mean), size=20)
  np.testing.assert_allclose(mark[..., 0].max(), 1.0, rtol=1e-6)
  np.testing.assert_allclose(mark[..., 1].min(), -0.5, rtol=1e-6)
  np.testing.assert_allclose(mark[..., 2].max(), 0.25, rtol=1e-6)


def test_the_mean_is_row_and_column_on_a_grid_with_both_ends():
  at = (2, 15)  # 20 points from -10 to 10
  mean = jnp.array([-10 + 20 / 19 * i for i in at])
  mark = np.asarray(gaussian.draw(params_with(mean_yx=jnp.tile(mean, (3, 1))), size=20))
  for channel in range(3):
    top = np.abs(mark[..., channel]).argmax()
    assert np.unravel_index(top, (20, 20)) == at
  # One step of 20 / 19 pixels away along a row, at a width of 2.
  np.testing.assert_allclose(mark[2, 16, 0], np.exp(-((20 / 19 / 2) ** 2) / 2), rtol=1e-5)


def test_a_correlated_bump_leans_along_the_diagonal():
  mark = gaussian.draw(params_with(correlation=jnp.full(3, 0.9)), size=21)[..., 0]
  assert mark[13, 13] > 5 * mark[13, 7] and mark[7, 7] > 5 * mark[7, 13]


@pytest.mark.parametrize("centre", [(0, 0), (4, 6), (7, 8), (7, 0)])
def test_a_mark_is_laid_on_its_pixel_and_cut_at_the_border(centre):
  frame = jnp.arange(8 * 9 * 3, dtype=jnp.float32).reshape(8, 9, 3)
  mark = jax.random.uniform(jax.random.key(0), (6, 6, 3)) + 1
  got = np.asarray(gaussian.add_at(frame, mark, jnp.array(centre)) - frame)
  want = np.zeros((8, 9, 3), np.float32)
  for row in range(8):
    for column in range(9):
      i, j = row - centre[0] + 3, column - centre[1] + 3
      if 0 <= i < 6 and 0 <= j < 6:
        want[row, column] = mark[i, j]
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_enlarging_repeats_pixels():
  mark = jnp.arange(12.0).reshape(2, 2, 3)
  large = gaussian.enlarge(mark, 3)
  assert large.shape == (6, 6, 3)
  np.testing.assert_array_equal(large[::3, 2::3], mark)
  np.testing.assert_array_equal(gaussian.enlarge(mark, 1), mark)


class Stub:
  """Stands for the network: the token is the numbers, times a parameter."""

  def apply(self, variables, token):
    return token * variables["params"]


def test_the_mark_reads_its_token_and_carries_its_parameters_through_jit():
  frame = jnp.zeros((30, 40, 3))
  token = jnp.linspace(-0.8, 0.8, 18)
  mark = Partial(gaussian.GaussianMark(Stub(), size=8, scale=2), jnp.float32(0.5))
  marked = jax.jit(lambda mark, *rest: mark(*rest))(mark, frame, jnp.array([20.9, 10.2]), token)
  alone = gaussian.draw(gaussian.gaussian_params(0.5 * token, size=8), size=8)
  want = gaussian.add_at(frame, gaussian.enlarge(alone, 2), jnp.array([10, 20]))
  np.testing.assert_allclose(marked, want, atol=1e-6)
  assert np.asarray(marked)[2:18, 12:28].any() and not np.asarray(marked)[:2].any()


def test_a_mark_that_is_not_bound_to_pixels_follows_its_query_inside_the_pixel():
  frame = jnp.zeros((30, 40, 3))
  numbers = jnp.tile(jnp.array([0.0, 0.0, -0.5, -0.5, 0.0, 0.6]), 3)

  def centre_xy(point_xy, **settings):
    mark = gaussian.GaussianMark(Stub(), size=15, **settings)
    marked = np.asarray(mark(jnp.float32(1.0), frame, jnp.array(point_xy), numbers))[..., 0]
    columns, rows = np.arange(40) + 0.5, np.arange(30) + 0.5
    return np.array([(marked * columns).sum(), (marked * rows[:, None]).sum()]) / marked.sum()

  for point_xy in ([20.5, 12.5], [20.2, 12.9], [20.8, 12.1]):
    np.testing.assert_allclose(centre_xy(point_xy, on_pixel=False), point_xy, atol=0.02)
    np.testing.assert_allclose(centre_xy(point_xy), [20.5, 12.5], atol=1e-4)


def painted_xy(point_xy, **settings):
  """(mark, centre of what it paints) of a mark without reach, in pixels."""
  frame = jnp.zeros((40, 60, 3))
  # As narrow as can be, so that the grid cuts nothing off; means at the ends of their range.
  numbers = jnp.tile(jnp.array([1.0, -1.0, -1.0, -1.0, 0.0, 0.6]), 3)
  mark = Partial(gaussian.GaussianMark(Stub(), reach=0.0, **settings), jnp.float32(1.0))
  marked = np.asarray(mark(frame, jnp.array(point_xy), numbers))[..., 1]
  y, x = (np.indices(marked.shape) * marked).sum((1, 2)) / marked.sum() + 0.5
  return mark, (x, y)


@pytest.mark.parametrize("size, scale", [(15, 1), (5, 2), (10, 1), (20, 1)])
@pytest.mark.parametrize("point_xy", [(30.5, 20.5), (30.2, 20.9)])
def test_a_mark_without_reach_lies_on_its_query_whether_its_side_is_odd_or_even(
  size, scale, point_xy
):
  _, xy = painted_xy(point_xy, size=size, scale=scale, on_pixel=False)
  np.testing.assert_allclose(xy, point_xy, atol=0.03)


@pytest.mark.parametrize("size, scale, middle", [(5, 1, 0.5), (5, 2, 0.0), (5, 3, 0.5)])
def test_a_mark_of_an_odd_grid_tells_where_on_its_pixel_it_lies_however_it_is_enlarged(
  size, scale, middle
):
  mark, xy = painted_xy((30.2, 20.9), size=size, scale=scale)
  assert perturb.middle(mark) == middle
  np.testing.assert_allclose(xy, (30 + middle, 20 + middle), atol=1e-4)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_mark_of_an_even_grid_counts_from_its_pixel_s_centre_as_the_release_was_trained(scale):
  assert perturb.middle(Partial(gaussian.GaussianMark(Stub(), size=20, scale=scale), None)) == 0.5


def test_without_reach_the_means_are_the_grid_s_middle_whatever_the_numbers_say():
  numbers = jnp.linspace(-0.9, 0.8, 18)
  free, bound = (gaussian.gaussian_params(numbers, size=20, reach=share) for share in (1.0, 0.0))
  assert float(jnp.abs(free.mean_yx).min()) > 0.5 and not np.any(bound.mean_yx)
  np.testing.assert_array_equal(bound.std_yx, free.std_yx)


def test_gradients_are_finite_at_the_ends_of_the_ranges():
  @jax.jit
  @jax.grad
  def gradient(numbers):
    return (gaussian.draw(gaussian.gaussian_params(numbers, size=20), size=20) ** 2).sum()

  for numbers in (jnp.ones(18), -jnp.ones(18), jnp.zeros(18)):
    assert np.isfinite(gradient(numbers)).all()
