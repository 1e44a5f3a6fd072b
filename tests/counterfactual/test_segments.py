"""What moves along with a patch, by a predictor that knows its objects."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import toy_predictors as toys

from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.counterfactual import segments

PATCH, HW = 4, (32, 48)
OBJECT = np.zeros(HW, bool)
OBJECT[10:22, 14:30] = True
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


def _frame():
  rng = np.random.default_rng(2)
  coarse = rng.normal(size=(HW[0] // 2, HW[1] // 2, 3)).astype(np.float32)
  return jnp.asarray(np.kron(coarse, np.ones((2, 2, 1), np.float32)))


def knows_objects(frames, mask):
  """Moves the whole of OBJECT by the move that explains the patches of frame 2 that changed."""

  def predict(pair, hidden):
    first, second = pair
    pixels = masks_lib.patches_to_pixels(hidden[1], PATCH)
    changed = ~pixels & (jnp.abs(second - first).sum(-1) > 0)
    shifts = PATCH * jnp.array(((0, 0), *MOVES))

    def away(shift):
      return jnp.sum(changed * jnp.abs(second - jnp.roll(first, shift, (0, 1))).sum(-1))

    shift = shifts[jnp.argmin(jax.lax.map(away, shifts))]
    covered = jnp.roll(jnp.asarray(OBJECT), shift, (0, 1))[..., None]
    left = jnp.where(jnp.asarray(OBJECT)[..., None], 0.0, first)
    return jnp.where(covered, jnp.roll(first, shift, (0, 1)), left)

  return toys.hidden_only(jax.vmap(predict)(frames, mask), mask)


def _masks(count=2):
  grid_hw = (HW[0] // PATCH, HW[1] // PATCH)
  return masks_lib.sample_masks(jax.random.key(0), grid_hw, 12, (count,))


def _ask(predict_fn, point_xy, **named):
  frames = jnp.stack([_frame()] * 2)
  point = jnp.asarray(point_xy, jnp.float32)
  return np.asarray(
    segments.moves_along(predict_fn, frames, _masks(), point, patch=PATCH, moves=MOVES, **named)
  )


def test_the_whole_object_of_the_point_moves_along_and_nothing_else():
  along = _ask(knows_objects, [20.5, 14.5]) > 0
  both = (along & OBJECT).sum() / (along | OBJECT).sum()
  assert both > 0.85


def test_a_predictor_that_moves_nothing_else_moves_nothing_else():
  stays = lambda frames, mask: toys.hidden_only(frames[:, 0], mask)  # noqa: E731
  along = _ask(stays, [20.5, 14.5])
  # Only where the patch was moved to does the picture differ from frame 1.
  away = np.ones(HW, bool)
  away[8:20, 16:28] = False
  assert (along[away] <= 0).all()


def test_as_many_patches_are_shown_as_the_masks_show_and_none_near_the_point_but_the_moved_one():
  seen = []

  def spy(frames, mask):
    jax.debug.callback(lambda m, pair: seen.append((np.asarray(m), np.asarray(pair))), mask, frames)
    return toys.hidden_only(frames[:, 0], mask)

  _ask(spy, [20.5, 14.5], reach=0.3)
  assert len(seen) == 2 * len(MOVES)
  first = np.asarray(_frame())
  rows, cols = np.mgrid[: HW[0] // PATCH, : HW[1] // PATCH]
  near = np.hypot(rows - 3, cols - 5) <= 0.3 * 12
  for mask, pair in seen:
    shown = ~mask[0, 1]
    assert shown.sum() == 12 and not mask[0, 0].any()
    ((row, col),) = np.argwhere(shown & near)
    assert (row - 3, col - 5) in MOVES
    square = np.s_[row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH]
    np.testing.assert_array_equal(pair[0, 1][square], first[12:16, 20:24])


def test_it_can_be_compiled_and_asked_at_the_border():
  point = jnp.array([0.5, 0.5])
  frames = jnp.stack([_frame()] * 2)
  asked = jax.jit(lambda p: segments.moves_along(knows_objects, frames, _masks(1), p, patch=PATCH))
  assert np.isfinite(np.asarray(asked(point))).all()
