import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_predictors as toys

from cwm_jax.counterfactual import adaptive, masks, multimask, perturb
from cwm_jax.types import InputError, Prediction

GRID, PATCH, HW = (8, 8), 4, (32, 32)
POINTS = ((8.5, 9.5), (20.5, 12.5), (12.5, 24.5), (26.5, 26.5))


def _noisy(frames, mask):
  """Moves frame 1 by (3, -2), and echoes what it sees elsewhere, by the mask's own whim."""
  right = toys.shifted_by(3, -2)(frames, mask).image
  whim = jnp.sin(7.0 * jnp.sum(mask[:, 1] * jnp.arange(64.0).reshape(8, 8), axis=(1, 2)))
  wrong = jax.vmap(lambda f, s: jnp.roll(f, (s * 9).astype(int), axis=(0, 1)))(frames[:, 0], whim)
  return Prediction(jnp.where(right != 0, right + 0.6 * wrong, 0.0))


def _ask(
  predict, rule, *, pairs=1, points=POINTS, valid=None, bank=None, chunk=3, mark=None, **how
):
  keys = jax.random.split(jax.random.key(0))
  frames = jax.random.uniform(keys[0], (pairs, 2, *HW, 3))
  sampled = masks.sample_masks(keys[1], GRID, 16, (rule.bank,))
  if bank is None:
    bank = adaptive.empty_bank(predict, frames, sampled, keep_tokens=False)
  points = jnp.array(points)
  return adaptive.flow_points(
    predict,
    mark or perturb.WhiteGaussian(1.0, 1.0),
    frames,
    sampled,
    bank,
    jnp.arange(len(points)) % pairs,
    points,
    jnp.ones(len(points), bool) if valid is None else jnp.array(valid),
    rule=rule,
    chunk=chunk,
    **{"order": "release", "average": "hidden", "readout": "window"} | how,
  )


@pytest.mark.parametrize("order", multimask.ORDERS)
def test_points_are_found_with_fewer_masks_than_allowed(order):
  rule = adaptive.Rule(bank=16, most=12)
  answer, asked, _ = _ask(_noisy, rule, order=order)
  np.testing.assert_allclose(answer.xy, np.array(POINTS) + (-2, 3), atol=0.6)
  assert (asked >= rule.least).all() and (asked <= rule.most).all()


def test_a_point_whose_peak_is_plain_stops_at_the_least():
  rule = adaptive.Rule(bank=16, least=4, most=12)
  _, asked, bank = _ask(toys.shifted_by(3, -2), rule)
  assert list(asked) == [4] * len(POINTS)
  # Two masks in common, two of each point's choice: no clean pass is done that nobody asked for.
  assert 2 <= int(bank.known.sum()) <= 2 + 2 * len(POINTS)


def test_a_point_that_never_settles_stops_at_the_most():
  rule = adaptive.Rule(bank=16, most=7, margin=1e6)
  _, asked, _ = _ask(_noisy, rule)
  assert list(asked) == [7] * len(POINTS)


def test_without_a_choice_it_is_multi_mask_inference():
  rule = adaptive.Rule(bank=6, first=6, least=6, most=6)
  answer, _, _ = _ask(_noisy, rule)
  keys = jax.random.split(jax.random.key(0))
  frames = jax.random.uniform(keys[0], (1, 2, *HW, 3))
  sampled = masks.sample_masks(keys[1], GRID, 16, (6,))
  from cwm_jax.counterfactual import flow

  want = flow.flow_pair(
    _noisy,
    perturb.WhiteGaussian(1.0, 1.0),
    frames[0],
    sampled,
    jnp.array(POINTS),
    order="release",
    average="hidden",
    readout="window",
  )
  for got, known in zip(answer, want):
    np.testing.assert_allclose(got, known, atol=1e-4)


def test_the_next_mask_hides_the_peak_and_reveals_what_is_round_it():
  sampled = jnp.ones((3, 5, 5), bool)
  sampled = sampled.at[1, 1:4, 1:4].set(False).at[1, 2, 2].set(True)  # hides the middle only
  sampled = sampled.at[2, 2, 2].set(False)
  # The second point has had one neighbour hidden so far, the third lies in a corner.
  hidden = jnp.ones((3, 5, 5)).at[1].set(0).at[1, 2, 3].set(4)
  worth = adaptive._worth(sampled, hidden, jnp.array([2, 2, 0]), jnp.array([2, 2, 0]))
  np.testing.assert_allclose(worth, [[1, 2, 0], [1, 1.125, 0], [1, 1.125, 1]])


def test_padding_takes_no_masks_and_changes_nothing():
  rule = adaptive.Rule(bank=16, most=12)
  alone, asked, _ = _ask(_noisy, rule, points=POINTS[:2])
  padded, with_padding, _ = _ask(_noisy, rule, valid=[True, True, False, False])
  np.testing.assert_allclose(padded.xy[:2], alone.xy, atol=1e-5)
  assert list(with_padding) == [*map(int, asked), 0, 0]


def test_a_bank_that_is_known_is_not_filled_again():
  calls = []

  def counting(frames, mask):
    jax.debug.callback(lambda m: calls.append(len(m)), mask)
    return _noisy(frames, mask)

  rule = adaptive.Rule(bank=8, most=6)
  first, _, bank = _ask(counting, rule, chunk=1)
  jax.effects_barrier()
  once = len(calls)
  again, asked, same = _ask(counting, rule, bank=bank, chunk=1)
  jax.effects_barrier()
  np.testing.assert_array_equal(first.xy, again.xy)
  np.testing.assert_array_equal(bank.known, same.known)
  assert len(calls) - once == int(asked.sum()) == once - int(bank.known.sum())


def test_pairs_have_banks_of_their_own():
  rule = adaptive.Rule(bank=8, most=6)
  both, _, bank = _ask(_noisy, rule, pairs=2)
  assert bank.known.shape == (2, 8) and bank.known.any(axis=1).all()
  np.testing.assert_allclose(both.xy, np.array(POINTS) + (-2, 3), atol=1.0)


@pytest.mark.parametrize(
  ("rule", "said"),
  [
    (adaptive.Rule(bank=8), "bank"),
    (adaptive.Rule(first=0), "first"),
    (adaptive.Rule(margin=0.5), "margin"),
    (adaptive.Rule(still=0), "still"),
  ],
)
def test_rules_that_cannot_be_followed_are_refused(rule, said):
  with pytest.raises(InputError, match=said):
    adaptive.check(rule)
