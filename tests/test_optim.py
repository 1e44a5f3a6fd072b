"""Schedules, and which parameters are decayed, frozen, clipped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import optim
from cwm_jax.models import flow_encoders
from cwm_jax.types import InputError

SETTINGS = dict(
  total_steps=100,
  warmup_steps=0,
  batch_size=64,
  peak_lr=0.1,
  scale_lr=False,
  final_lr_ratio=1.0,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  weight_decay=0.0,
  decay_exclude="bias|mask_token",
  freeze="",
  clip_norm=0.0,
)


def params():
  return {
    "encoder": {"fc1": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(3)}},
    "mask_token": jnp.ones(4),
  }


def one_update(grads, **changes):
  tx, _ = optim.make(**{**SETTINGS, **changes})
  updates, _ = tx.update(grads, tx.init(params()), params())
  return updates


def test_the_rate_rises_linearly_then_falls_along_a_half_cosine():
  rate = optim.learning_rate(peak=2.0, warmup_steps=4, total_steps=12, final_ratio=0.1)
  np.testing.assert_allclose([rate(i) for i in range(4)], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
  np.testing.assert_allclose(rate(8), 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
  np.testing.assert_allclose([rate(12), rate(50)], [0.2, 0.2], rtol=1e-6)


def test_a_warm_up_from_zero_wastes_the_first_update_and_has_the_peak_twice():
  rate = optim.learning_rate(peak=2.0, warmup_steps=5, total_steps=12, warmup_from_zero=True)
  np.testing.assert_allclose([rate(i) for i in range(6)], [0, 0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
  flat = optim.learning_rate(peak=2.0, warmup_steps=0, total_steps=12, warmup_from_zero=True)
  assert float(flat(0)) == 2.0


def test_without_warm_up_the_first_update_has_the_peak_rate():
  rate = optim.learning_rate(peak=2.0, warmup_steps=0, total_steps=10)
  assert float(rate(0)) == 2.0


def test_one_cycle_begins_at_a_25th_of_the_peak_and_rises_and_falls_straight():
  rate = optim.learning_rate(peak=1.0, warmup_steps=10, total_steps=110, schedule="one_cycle")
  told = np.array([float(rate(count)) for count in range(111)])
  assert told[0] == pytest.approx(1 / 25 + (1 - 1 / 25) / 10)
  assert told[9] == told[10] == told.max() == pytest.approx(1.0)
  np.testing.assert_allclose(np.diff(told[:10]), 0.096, atol=1e-6)
  np.testing.assert_allclose(np.diff(told[10:]), -0.01, atol=1e-6)
  assert told[-1] == pytest.approx(0.0, abs=1e-6)
  with pytest.raises(InputError, match="optim.schedule is 'two_cycles'; choose one of cosine"):
    optim.learning_rate(peak=1.0, warmup_steps=1, total_steps=9, schedule="two_cycles")


def test_a_warm_up_as_long_as_the_run_is_refused():
  with pytest.raises(InputError, match="shorten the warm-up"):
    optim.learning_rate(peak=1.0, warmup_steps=10, total_steps=10)


def test_the_rate_is_scaled_by_the_batch_only_when_asked():
  _, plain = optim.make(**SETTINGS)
  _, scaled = optim.make(**{**SETTINGS, "scale_lr": True, "batch_size": 512})
  np.testing.assert_allclose([plain(0), scaled(0)], [0.1, 0.2], rtol=1e-6)


def test_decay_spares_the_excluded_paths():
  mask = optim.decay_mask(params(), "bias|mask_token")
  assert mask == {"encoder": {"fc1": {"kernel": True, "bias": False}}, "mask_token": False}
  zeros = jax.tree.map(jnp.zeros_like, params())
  updates = one_update(zeros, weight_decay=0.5)
  np.testing.assert_allclose(updates["encoder"]["fc1"]["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
  assert not updates["mask_token"].any() and not updates["encoder"]["fc1"]["bias"].any()


def test_frozen_parameters_do_not_move_and_do_not_count_in_the_clipped_norm():
  grads = jax.tree.map(jnp.ones_like, params())
  grads["encoder"]["fc1"]["kernel"] = jnp.full((2, 3), 1e6)
  settings = dict(freeze="encoder", clip_norm=2.0, eps=1.0, b1=0.0, b2=0.0)
  updates = one_update(grads, **settings)
  assert not updates["encoder"]["fc1"]["kernel"].any()
  # The norm of the trained gradient is 2 and stays; with eps = 1 Adam's step is 1 / (1 + 1).
  np.testing.assert_allclose(updates["mask_token"], -0.1 * 0.5, rtol=1e-5)


def test_clipping_shrinks_a_gradient_that_is_too_long():
  grads = jax.tree.map(jnp.ones_like, params())  # norm sqrt(13)
  settings = dict(clip_norm=0.5, eps=1.0, b1=0.0, b2=0.0)
  clipped = 0.5 / np.sqrt(13)
  expected = -0.1 * clipped / (clipped + 1)
  np.testing.assert_allclose(one_update(grads, **settings)["mask_token"], expected, rtol=1e-5)


@pytest.mark.parametrize("freeze, told", [("nothing_here", "no parameter"), (".", "every")])
def test_a_freeze_that_matches_nothing_or_all_is_refused(freeze, told):
  tx, _ = optim.make(**{**SETTINGS, "freeze": freeze})
  with pytest.raises(InputError, match=told):
    tx.init(params())


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"decay_exclude": ""},
    {"freeze": "stem/"},
    {"slow": [("norm", 0.5, 0)]},
    {"decay_exclude": "", "clip_norm": 1.0, "schedule": "one_cycle"},
  ],
)
def test_nothing_moves_the_stored_statistics_of_batch_normalisation(changes):
  encoder = flow_encoders.Encoder(4, (4, 4, 4), (1, 1, 1), 4, norm="batch")
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  held = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), shapes)
  tx, _ = optim.make(**{**SETTINGS, "weight_decay": 0.5, **changes})
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, held), tx.init(held), held)
  told = jax.tree_util.tree_leaves_with_path(updates)
  statistics = [leaf for path, leaf in told if path[-1].key in ("mean", "var")]
  assert len(statistics) == 18 and not any(leaf.any() for leaf in statistics)
  assert updates["out"]["kernel"].all()


@pytest.mark.parametrize("freeze, told", [("batch/mean", "no parameter"), ("kernel|bias", "every")])
def test_statistics_do_not_count_in_what_a_freeze_matches(freeze, told):
  held = {"kernel": jnp.ones(2), "bias": jnp.ones(2), "batch": {"mean": jnp.ones(2)}}
  with pytest.raises(InputError, match=told):
    optim.labels(held, freeze)


def test_statistics_are_float32_for_bfloat16_gradients():
  tx, _ = optim.make(**SETTINGS)
  state = tx.init(params())
  grads = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
  _, state = tx.update(grads, state, params())
  kinds = {
    leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)
  }
  assert kinds == {jnp.dtype(jnp.float32)}


def test_slow_parameters_learn_at_a_share_of_the_rate_and_not_before_their_time():
  grads = jax.tree.map(jnp.ones_like, params())
  tx, _ = optim.make(**{**SETTINGS, "slow": [("^encoder/", 0.25, 2)], "freeze": "mask_token"})
  plain, _ = optim.make(**{**SETTINGS, "freeze": "mask_token"})
  state, other = tx.init(params()), plain.init(params())
  # A run may take `slow` up or leave it where it goes on: its state is the same.
  assert jax.tree.structure(state) == jax.tree.structure(other)
  for step in range(4):
    updates, state = tx.update(grads, state, params())
    full, other = plain.update(grads, other, params())
    share = 0.25 if step >= 2 else 0.0
    moved, whole = (tree["encoder"]["fc1"]["kernel"] for tree in (updates, full))
    np.testing.assert_allclose(moved, share * whole, rtol=1e-6)
    assert not updates["mask_token"].any()
