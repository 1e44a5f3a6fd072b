import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import geometry
from cwm_jax.counterfactual import zoom


def test_windows_start_at_the_shorter_side_and_shrink_by_a_quarter_truncated():
  assert zoom.crop_sizes((96, 128), 4) == [96, 72, 54, 40]
  assert zoom.crop_sizes((480, 854), 0) == []


@pytest.mark.parametrize(
  "centre, corner",
  [
    ((30.5, 20.5), (20, 10)),
    ((3.0, 2.0), (0, 0)),
    ((63.9, 47.9), (44, 28)),
    ((10.0, 40.0), (0, 28)),
  ],
)
def test_a_window_lies_round_its_point_and_inside_the_video(centre, corner):
  got = zoom.window_corner_xy(jnp.array(centre), jnp.float32(20), (48, 64))
  np.testing.assert_array_equal(got, corner)


def test_a_window_that_is_the_whole_image_is_resized_as_the_whole_image_is():
  image = jnp.asarray(np.random.default_rng(0).uniform(size=(40, 40, 3)), jnp.float32)
  for size_hw in ((16, 24), (40, 40), (64, 80)):
    got = geometry.crop_resize(image, jnp.zeros(2), jnp.float32(40), size_hw)
    want = geometry.resize(image, size_hw, antialias=True)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_point_lands_where_the_window_says():
  y, x = np.mgrid[:60, :80] + 0.5
  image = jnp.asarray(np.stack([x, y], axis=-1), jnp.float32)
  corner, size = np.array([20.0, 15.0]), 30
  crop = geometry.crop_resize(image, jnp.array(corner, jnp.float32), jnp.float32(size), (12, 20))
  # Each pixel of the crop holds the place in the image that it shows. The averaging kernel has few
  # taps and is off by some hundredths; another pixel convention would be off by a quarter.
  rows, cols = np.mgrid[:12, :20] + 0.5
  want = np.stack([cols * size / 20, rows * size / 12], axis=-1) + corner
  np.testing.assert_allclose(crop, want, atol=0.05)
