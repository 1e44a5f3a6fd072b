"""One training step: the same numbers however it is cut, and those of the day it was written."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_job

from cwm_jax import optim, step, tasks
from cwm_jax.types import FramePair


@pytest.fixture(scope="module")
def parts():
  """(task, transformation, rate) of the tiny job."""
  config = tiny_job.get_config()
  names = "peak_lr scale_lr final_lr_ratio b1 b2 eps weight_decay decay_exclude freeze clip_norm"
  tx, rate = optim.make(
    total_steps=6,
    warmup_steps=2,
    batch_size=8,
    **{name: config.optim[name] for name in names.split()},
  )
  return tasks.build(config), tx, rate


@pytest.fixture(scope="module")
def pair():
  frames = np.random.default_rng(0).random((8, 2, 16, 16, 3), np.float32)
  return FramePair(jnp.asarray(frames))


def two_steps(parts, pair, **settings):
  """[(state, metrics)] before, after one, after two steps, with an average."""
  task, tx, rate = parts
  state = jax.jit(partial(step.init_state, task, tx, keep_ema=True))(jax.random.key(0))
  update = jax.jit(step.make_update(task, tx, rate, seed=0, ema_decay=0.99, **settings))
  history = [(state, {})]
  for _ in range(2):
    state, metrics = update(state, pair)
    history.append((state, {name: float(value) for name, value in metrics.items()}))
  return history


@pytest.fixture(scope="module")
def history(parts, pair):
  return two_steps(parts, pair)


def test_a_step_gives_the_stored_numbers(history):
  # Update these when the model's initialisation, the masks or the loss change on purpose.
  golden = dict(
    copy_loss=3.32966,
    grad_norm=2.533467,
    learning_rate=0.001,
    loss=2.548913,
    param_norm=26.00846,
    update_norm=0.1613432,
  )
  state, metrics = history[2]
  for name, value in golden.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-4, err_msg=name)
  assert int(state.step) == 2


def test_micro_batches_give_the_full_batch_s_numbers(parts, pair, history):
  whole, whole_metrics = history[2]
  cut, cut_metrics = two_steps(parts, pair, accumulate=4)[2]
  for name, value in whole_metrics.items():
    np.testing.assert_allclose(cut_metrics[name], value, rtol=1e-4, err_msg=name)
  # Adam's mean gradient, in which an error is as small as in the gradients themselves.
  gradients = [optax.tree.get(state.opt_state, "mu") for state in (whole, cut)]
  assert jax.tree.leaves(gradients[0])
  for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max() + 1e-9)
  gap = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), whole.params, cut.params)
  # Adam divides by the gradient's own size, so a parameter with a gradient of almost nothing may
  # move by as much as its float error says: a share of the rate, 1e-3.
  assert max(jax.tree.leaves(gap)) < 2e-4


def test_the_average_follows_the_parameters_with_a_decay_that_starts_low(history):
  (begun, _), (state, _), _ = history
  blend = partial(jax.tree.map, lambda old, new: 0.1 * old + 0.9 * new)
  expected = blend(begun.params, state.params)  # (1 + 0) / (10 + 0) at the first step
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.ema, expected)
