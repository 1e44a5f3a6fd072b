import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_predictors as toys

from cwm_jax.counterfactual import many, masks, perturb
from cwm_jax.types import InputError, Prediction

GRID, PATCH, HW = (8, 8), 4, (32, 32)


def _points(rows, cols):
  x, y = (np.arange(cols) + 0.5) * HW[1] / cols, (np.arange(rows) + 0.5) * HW[0] / rows
  return np.stack(np.meshgrid(x, y), axis=-1).astype(np.float32)


def _ask(predict, settings, *, grid_hw=(8, 8), mark=None, seed=0, chunk=4, visible=16):
  keys = jax.random.split(jax.random.key(seed))
  frames = jax.random.uniform(keys[0], (2, *HW, 3))
  sampled = masks.sample_masks(keys[1], GRID, visible, (settings.rounds,))
  dealt = many.deal(grid_hw, settings, seed=seed)
  points = _points(*grid_hw)
  xy, confidence = many.flow_grid(
    predict,
    mark or perturb.WhiteGaussian(1.0, 1.0),
    frames,
    sampled,
    jnp.array(dealt),
    jnp.array(points),
    step_yx=(HW[0] / grid_hw[0], HW[1] / grid_hw[1]),
    votes=settings.votes,
    chunk=chunk,
    readout="window",
  )
  return np.asarray(xy) - points, np.asarray(confidence)


def _inside(dy, dx, grid_hw=(8, 8)):
  """Points whose destination lies well inside the image, which a toy wraps round."""
  moved = _points(*grid_hw) + (dx, dy)
  return ((moved > 3) & (moved < np.array(HW[::-1]) - 3)).all(-1)


@pytest.mark.parametrize("votes", [0.0, 1.0])
def test_marks_that_share_a_pass_are_told_apart(votes):
  motion, confidence = _ask(toys.shifted_by(3, -2), many.Settings((2, 2), 12, votes))
  inside = _inside(3, -2)
  error = np.abs(motion[inside] - (-2, 3)).max(-1)
  # Marks in neighbouring blocks may lie side by side in a round.
  assert np.median(error) < 0.1 and error.max() < 0.5
  assert (confidence[inside] > 0.3).all()


def test_one_round_of_many_marks_cannot_be_told_apart_and_votes_help():
  # Else the test above would hold for any decoding.
  alone, _ = _ask(toys.shifted_by(3, -2), many.Settings((4, 4), 2, 0.0))
  voted, _ = _ask(toys.shifted_by(3, -2), many.Settings((4, 4), 2, 1.0))
  right = lambda m: np.mean(np.abs(m - (-2, 3)).max(-1)[_inside(3, -2)] < 0.5)  # noqa: E731
  assert right(alone) < 0.8 < right(voted)


def test_each_round_holds_every_point_once_and_companions_change():
  settings = many.Settings((2, 3), 4)
  dealt = many.deal((5, 7), settings, seed=1)
  assert dealt.shape[0] * (dealt.shape[1] + 1) == many.num_passes((5, 7), settings)
  for this_round in dealt:
    assert sorted(this_round[this_round >= 0]) == list(range(35))
  assert not np.array_equal(np.sort(dealt[0], axis=1), np.sort(dealt[1], axis=1))
  np.testing.assert_array_equal(dealt, many.deal((5, 7), settings, seed=1))


def test_marks_of_one_pass_lie_in_blocks_of_their_own():
  dealt = many.deal((8, 8), many.Settings((2, 2), 3), seed=0)
  for numbers in dealt.reshape(-1, 4):
    blocks = {(n // 8 // 4, n % 8 // 4) for n in numbers}
    assert len(blocks) == 4


def test_grids_that_blocks_do_not_divide_are_answered_whole():
  motion, _ = _ask(toys.shifted_by(2, 1), many.Settings((3, 2), 10), grid_hw=(7, 5))
  inside = _inside(2, 1, (7, 5))
  np.testing.assert_allclose(motion[inside], np.broadcast_to((1, 2), (inside.sum(), 2)), atol=0.6)


def test_how_many_passes_run_together_does_not_matter():
  one, _ = _ask(toys.shifted_by(1, 1), many.Settings((2, 2), 4), chunk=1)
  all_, _ = _ask(toys.shifted_by(1, 1), many.Settings((2, 2), 4), chunk=64)
  np.testing.assert_allclose(one, all_, atol=1e-4)


def test_dark_and_coloured_marks_are_found_by_their_own_colour():
  for mark in (perturb.WhiteGaussian(-1.0, 1.0), perturb.Square(colour=(255, 0, 0), size=2)):
    motion, _ = _ask(toys.shifted_by(3, -2), many.Settings((2, 2), 12, 1.0), mark=mark)
    inside = _inside(3, -2)
    assert np.median(np.abs(motion[inside] - (-2, 3))) < 0.6


def test_a_mark_that_reads_tokens_gets_those_of_its_own_point():
  def with_tokens(frames, mask):
    # A patch's token is its row and column.
    rows, cols = jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0), indexing="ij")
    tokens = jnp.broadcast_to(jnp.stack([rows, cols], -1), (len(frames), 8, 8, 2))
    return Prediction(toys.shifted_by(2, 2)(frames, mask).image, tokens)

  def mark(frame, point_xy, token):
    # Only where the token fits the point does it mark anything.
    fits = jnp.all(jnp.floor(point_xy[::-1] / PATCH) == token)
    return perturb.WhiteGaussian(1.0, 1.0)(frame, point_xy) * fits + frame * ~fits

  mark.on_pixel = False
  motion, _ = _ask(with_tokens, many.Settings((2, 2), 8, 0.0), mark=mark)
  inside = _inside(2, 2)
  error = np.abs(motion[inside] - 2).max(-1)
  assert np.median(error) < 0.1 and error.max() < 1.0


def test_votes_move_along_by_parts_of_a_pixel():
  # Three points 1.5 pixels apart that all moved by (2, 0): the outer ones' peaks lie 1.5 aside.
  heat = jnp.zeros((1, 3, 1, 16)).at[0, jnp.arange(3), 0, jnp.array([4, 6, 7])].set(1.0)
  voted = many.vote(heat, step_yx=(1.0, 1.5), sigma=3.0)[0, 1, 0]
  weight = np.exp(-0.5 * (1.5 / 3) ** 2)
  want = np.zeros(16)
  want[6] = 1.0 + weight * 0.5
  want[5] += weight * 0.5
  want[5] += weight * 0.5
  want[6] += weight * 0.5
  np.testing.assert_allclose(voted, want, atol=1e-6)


def test_settings_that_cannot_be_are_refused():
  for settings in (many.Settings((0, 4)), many.Settings(rounds=0), many.Settings(votes=-1.0)):
    with pytest.raises(InputError, match="or more"):
      many.check(settings)
