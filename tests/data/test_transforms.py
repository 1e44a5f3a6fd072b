"""Crops, resizes and mirroring keep points on the pixels that they belong to."""

from __future__ import annotations

import numpy as np
import pytest

from cwm_jax.data import transforms
from cwm_jax.types import InputError


@pytest.mark.parametrize("crop", ["random", "centre", "none"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size_hw", [(32, 32), (48, 30), (20, 90)])
def test_points_come_back_from_a_view(crop, flip, size_hw):
  rng = np.random.default_rng(0)
  points = rng.random((50, 2)) * (80, 60)
  for seed in range(4):
    view = transforms.draw_view(
      np.random.default_rng(seed), (60, 80), size_hw, crop=crop, flip=flip
    )
    back = transforms.from_view(transforms.to_view(points, view), view)
    np.testing.assert_allclose(back, points, atol=1e-9)


@pytest.mark.parametrize("flip_wanted", [False, True])
def test_a_spot_and_its_point_move_together(flip_wanted):
  rows, columns = np.mgrid[:96, :128] + 0.5
  spot_xy = np.array([70.0, 40.0])
  blob = np.exp(-((columns - spot_xy[0]) ** 2 + (rows - spot_xy[1]) ** 2) / (2 * 6.0**2))
  frames = np.repeat((255 * blob)[None, ..., None], 3, axis=-1).astype(np.uint8)
  seeds = range(20)
  views = (
    transforms.draw_view(np.random.default_rng(s), (96, 128), (48, 40), flip=True) for s in seeds
  )
  view = next(view for view in views if view.flip == flip_wanted)
  seen = transforms.apply_view(frames, view)[0, ..., 0].astype(float)
  rows, columns = np.mgrid[:48, :40] + 0.5
  found = np.array([np.sum(columns * seen), np.sum(rows * seen)]) / np.sum(seen)
  np.testing.assert_allclose(found, transforms.to_view(spot_xy, view), atol=0.1)


def test_all_frames_get_the_same_crop():
  rng = np.random.default_rng(0)
  frames = np.repeat(rng.integers(0, 256, (1, 40, 70, 3), np.uint8), 3, axis=0)
  view = transforms.draw_view(np.random.default_rng(1), (40, 70), (16, 16), flip=True)
  seen = transforms.apply_view(frames, view)
  assert seen.shape == (3, 16, 16, 3)
  assert np.array_equal(seen[0], seen[1]) and np.array_equal(seen[0], seen[2])


def test_the_largest_box_of_the_right_aspect_is_taken():
  view = transforms.draw_view(None, (100, 200), (10, 10), crop="centre")
  assert view.box == (50.0, 0.0, 150.0, 100.0)
  view = transforms.draw_view(None, (100, 50), (20, 30), crop="centre")
  assert view.box == pytest.approx((0.0, 100 / 3, 50.0, 200 / 3))


def test_shrinking_averages_what_it_drops():
  checkers = np.zeros((1, 64, 64, 3), np.uint8)
  checkers[:, ::2, 1::2] = checkers[:, 1::2, ::2] = 200
  view = transforms.draw_view(None, (64, 64), (16, 16), crop="centre")
  seen = transforms.apply_view(checkers, view)
  assert abs(seen.astype(int)[0, 2:-2, 2:-2] - 100).max() <= 2


def test_a_frame_of_the_right_size_is_left_as_it_is():
  frames = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
  view = transforms.draw_view(None, (24, 24), (24, 24), crop="centre")
  assert np.array_equal(transforms.apply_view(frames, view), frames)


def test_an_unknown_crop_is_named():
  with pytest.raises(InputError, match="crop 'center' is not known"):
    transforms.draw_view(None, (8, 8), (8, 8), crop="center")
