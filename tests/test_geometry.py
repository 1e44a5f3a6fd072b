"""Coordinates: half pixels, orders, round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import geometry


def test_normalising_and_back_is_the_identity():
  frames = jax.random.uniform(jax.random.key(0), (2, 4, 5, 3))
  back = geometry.unnormalise(geometry.normalise(frames))
  np.testing.assert_allclose(back, frames, atol=1e-6)


def test_points_survive_a_round_trip_through_another_size():
  points_xy = jnp.array([[0.0, 0.0], [0.5, 0.5], [853.9, 479.9], [100.25, 7.75]])
  small = geometry.scale_points_xy(points_xy, (480, 854), (256, 256))
  assert float(small[2, 0]) < 256 and float(small[2, 1]) < 256
  back = geometry.scale_points_xy(small, (256, 256), (480, 854))
  np.testing.assert_allclose(back, points_xy, atol=1e-3)


def test_an_index_is_reported_as_its_pixels_centre_and_found_again():
  index_yx = jnp.array([[0, 0], [3, 6], [4, 0]])
  points_xy = geometry.index_to_point_xy(index_yx)
  np.testing.assert_array_equal(points_xy, [[0.5, 0.5], [6.5, 3.5], [0.5, 4.5]])
  np.testing.assert_array_equal(geometry.point_to_index_yx(points_xy, (5, 7)), index_yx)


def test_points_outside_fall_on_the_border_pixel():
  outside = jnp.array([[-3.0, 2.0], [7.0, 5.0], [6.999, 4.999]])
  got = geometry.point_to_index_yx(outside, (5, 7))
  np.testing.assert_array_equal(got, [[2, 0], [4, 6], [4, 6]])


@pytest.mark.parametrize("size_hw", [(24, 40), (36, 20), (18, 50), (6, 10)])
def test_a_blob_keeps_its_place_through_a_resize(size_hw):
  """Its centre of mass moves by exactly the size ratio: no half-pixel drift."""
  centre_xy = jnp.array([7.6, 5.3])
  distance = geometry.pixel_centres(12, 20) - centre_xy
  image = jnp.exp(-(distance**2).sum(-1, keepdims=True) / 4)
  resized = geometry.resize(image, size_hw, antialias=True)
  moved_xy = (resized * geometry.pixel_centres(*size_hw)).sum((0, 1)) / resized.sum()
  expected = geometry.scale_points_xy(centre_xy, (12, 20), size_hw)
  np.testing.assert_allclose(moved_xy, expected, atol=0.05)


def test_resizing_to_the_same_size_changes_nothing():
  image = jax.random.uniform(jax.random.key(1), (2, 6, 8, 3))
  assert geometry.resize(image, (6, 8)) is image


def test_antialiased_shrinking_averages_all_pixels():
  image = jnp.zeros((8, 8, 1)).at[::2].set(1.0)
  np.testing.assert_allclose(geometry.resize(image, (2, 2), antialias=True), 0.5, atol=0.1)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size_hw", [(5, 9), (24, 40), (12, 7), (30, 20)])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_a_resize_on_the_host_is_that_on_the_device(antialias, size_hw, batch):
  image = np.random.default_rng(2).integers(0, 256, (*batch, 12, 20, 3)).astype(np.uint8)
  found = geometry.resize_on_host(image, size_hw, antialias=antialias)
  expected = geometry.resize(jnp.asarray(image, jnp.float32), size_hw, antialias=antialias)
  assert found.dtype == np.float32 and found.shape == (*batch, *size_hw, 3)
  np.testing.assert_allclose(found, expected, atol=255e-6)


@pytest.mark.parametrize("floats", [False, True])
def test_frames_prepared_on_the_host_are_those_prepared_on_the_device(floats):
  frame = np.random.default_rng(3).integers(0, 256, (12, 20, 3)).astype(np.uint8)
  if floats:
    frame = np.asarray(geometry.to_normalised(jnp.asarray(frame)))
  found = geometry.prepare_on_host(frame, (8, 8), antialias=True)
  expected = geometry.resize(geometry.to_normalised(jnp.asarray(frame)), (8, 8), antialias=True)
  np.testing.assert_allclose(found, expected, atol=5e-6)


def test_what_is_near_a_pixel_is_a_square_that_the_border_cuts():
  near = geometry.near(jnp.array([[0, 4], [2, 1]]), (4, 6), radius=1)
  expected = np.zeros((2, 4, 6), bool)
  expected[0, :2, 3:6] = True
  expected[1, 1:4, :3] = True
  np.testing.assert_array_equal(near, expected)


def test_sampling_at_pixel_centres_returns_the_pixels():
  image = jax.random.uniform(jax.random.key(2), (5, 7, 2))
  sampled = geometry.sample_bilinear(image, geometry.pixel_centres(5, 7))
  np.testing.assert_allclose(sampled, image, atol=1e-6)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.25, -0.5), (2.0, 1.0), (1.3, 0.7)])
def test_a_known_sub_pixel_shift_is_undone_by_warping(shift):
  """A linear ramp is exact under bilinear sampling, so the shift is recovered to rounding."""
  x, y = jnp.moveaxis(geometry.pixel_centres(9, 11), -1, 0)
  frame1 = jnp.stack([x, y], -1)
  frame2 = jnp.stack([x - shift[0], y - shift[1]], -1)
  flow_xy = jnp.broadcast_to(jnp.array(shift), (9, 11, 2))
  warped = geometry.warp_backward(frame2, flow_xy)
  np.testing.assert_allclose(warped[3:6, 3:8], frame1[3:6, 3:8], atol=1e-5)


def test_argmax_takes_the_first_maximum_in_raster_order():
  heat = jnp.zeros((2, 4, 5)).at[0, 2, 3].set(1.0).at[0, 3, 1].set(1.0).at[1, 0, 4].set(2.0)
  np.testing.assert_array_equal(geometry.argmax_yx(heat), [[2, 3], [0, 4]])


def test_soft_argmax_of_a_sharp_peak_is_the_peak_and_has_a_gradient():
  heat = jnp.zeros((6, 8)).at[4, 2].set(1.0)
  np.testing.assert_allclose(geometry.soft_argmax_yx(heat), [4, 2], atol=1e-4)
  soft = jnp.zeros((6, 8)).at[4, 2].set(0.01)
  gradient = jax.grad(lambda h: geometry.soft_argmax_yx(h)[0])(soft)
  assert float(jnp.abs(gradient).max()) > 0


@pytest.mark.parametrize("centre_yx", [(4.0, 5.0), (4.3, 5.2), (3.75, 6.4)])
def test_the_window_read_out_finds_sub_pixel_centres(centre_yx):
  y, x = jnp.meshgrid(jnp.arange(10), jnp.arange(12), indexing="ij")
  heat = jnp.exp(-((y - centre_yx[0]) ** 2 + (x - centre_yx[1]) ** 2) / 2)
  # A lone bright pixel far away must not pull the answer.
  heat = heat.at[0, 11].set(0.7)
  np.testing.assert_allclose(geometry.window_argmax_yx(heat, radius=2), centre_yx, atol=0.1)


def test_an_empty_response_reads_out_without_nan():
  assert np.all(np.isfinite(geometry.window_argmax_yx(jnp.zeros((4, 4)))))


def test_a_resize_by_corners_keeps_corners_and_straight_lines_and_comes_back():
  y, x = np.mgrid[:5, :7].astype(np.float32)
  ramp = jnp.asarray(np.stack([y, x], axis=-1))
  np.testing.assert_array_equal(geometry.resize_corners(ramp, (5, 7)), ramp)
  large = geometry.resize_corners(ramp, (9, 25))
  np.testing.assert_allclose(large[:, 0, 0], np.linspace(0, 4, 9), atol=1e-6)
  np.testing.assert_allclose(large[0, :, 1], np.linspace(0, 6, 25), atol=1e-6)
  np.testing.assert_allclose(geometry.resize_corners(large, (5, 7)), ramp, atol=1e-5)


def test_a_known_sub_pixel_shift_is_undone_inside_and_what_lies_outside_is_nothing():
  y, x = np.mgrid[:6, :8].astype(np.float32)
  image = jnp.asarray(np.stack([3 * x, 5 * y], axis=-1)) + 1.0
  warped = geometry.warp_inside(image, jnp.full((6, 8, 2), jnp.array([2.25, -0.5])))
  want = image + jnp.array([3 * 2.25, -5 * 0.5])
  np.testing.assert_allclose(warped[1:, :5], want[1:, :5], atol=1e-4)
  np.testing.assert_allclose(warped[:, 7], 0.0)
  shifted = image[0, :5] + jnp.array([3 * 2.25, 0.0])
  np.testing.assert_allclose(warped[0, :5], shifted / 2, atol=1e-4)


@pytest.mark.parametrize("relative", [False, True])
def test_what_goes_forward_and_comes_back_is_seen(relative):
  there = jnp.full((8, 8, 2), jnp.array([2.0, 1.0]))
  ratio, seen = geometry.round_trip(there, -there, threshold=0.01, relative=relative)
  assert seen[:6, :5].all() and not seen[:, 7].any()
  np.testing.assert_allclose(ratio[:6, :5], 0.0, atol=1e-6)
  _, seen = geometry.round_trip(there, -there + 1.0, threshold=0.01, relative=relative)
  assert not seen[:6, :5].any()
