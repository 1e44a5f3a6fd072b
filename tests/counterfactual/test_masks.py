import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.counterfactual import masks
from cwm_jax.types import InputError


def test_the_visible_count_follows_the_truncating_rule():
  assert masks.num_visible_patches((32, 32), 0.9) == 103
  assert masks.num_visible_patches((8, 8), 0.9) == 7
  assert masks.num_visible_patches((4, 5), 1.0) == 0


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, 0.01])
def test_a_ratio_that_hides_nothing_or_too_much_is_refused(ratio):
  with pytest.raises(InputError, match="mask ratio"):
    masks.num_visible_patches((4, 4), ratio)


def test_frame_1_is_visible_and_frame_2_has_exactly_the_asked_number_of_visible_patches():
  got = np.asarray(masks.sample_masks(jax.random.key(0), (5, 7), 9, (3, 4)))
  assert got.shape == (3, 4, 2, 5, 7)
  assert not got[..., 0, :, :].any()
  assert ((~got[..., 1, :, :]).sum((-2, -1)) == 9).all()


def test_every_patch_is_visible_equally_often():
  got = np.asarray(masks.sample_masks(jax.random.key(1), (4, 6), 6, (4000,)))
  share = (~got[:, 1]).mean(axis=0)
  # Six of 24: a quarter; three and a half standard deviations of 4,000 draws.
  assert np.abs(share - 0.25).max() < 3.5 * np.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize("centre", [(0, 0), (3, 4), (7, 7)])
def test_the_neighbourhood_is_hidden_and_the_count_stays(centre):
  before = masks.sample_masks(jax.random.key(2), (8, 8), 20, (30,))
  after = np.asarray(masks.hide_neighbourhood(before, jnp.array(centre)))
  r, c = centre
  assert after[:, 1, max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].all()
  assert ((~after[:, 1]).sum((-2, -1)) == 20).all()
  # What was visible elsewhere still is.
  far = np.ones((8, 8), bool)
  far[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2] = False
  assert not (after[:, 1] & ~np.asarray(before)[:, 1] & far).any()


def test_what_is_revealed_instead_leans_to_no_side():
  before = masks.sample_masks(jax.random.key(3), (8, 8), 20, (300,))
  after = np.asarray(masks.hide_neighbourhood(before, jnp.array([4, 4])))
  rows, cols = np.nonzero((~after[:, 1]).sum(0) - (~np.asarray(before)[:, 1]).sum(0) > 0)
  assert abs(rows.mean() - 3.5) < 1.5 and abs(cols.mean() - 3.5) < 1.5
