"""The bottleneck's metrics on a Psi-flow whose need for flow is known."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.tasks import bottleneck
from cwm_jax.types import FramePair


class Shifter:
  """Stands in for a task: predicts frame 1 shifted by the first point's flow, which is right."""

  def queries(self, keys):
    return jnp.full((keys.shape[0], 1, 2), 4.5)

  def flow(self, params, frames, points, keys):
    return types.SimpleNamespace(flow_xy=self.truth[:, None], spread=jnp.full((4, 1), 2.0))

  def prediction_loss(self, params, pair, points, flow_xy):
    roll = jax.vmap(lambda image, by: jnp.roll(image, by[::-1].astype(int), axis=(0, 1)))
    predicted = roll(pair.frames[:, 0], flow_xy[:, 0])
    return 0.01 + jnp.mean(jnp.square(predicted - pair.frames[:, 1]), axis=(1, 2, 3))


def test_taking_the_flow_away_or_exchanging_it_raises_the_loss_of_one_that_needs_it():
  task = Shifter()
  task.truth = jnp.array([[2.0, 1.0], [3.0, 0.0], [-1.0, 2.0], [0.0, -3.0]])
  first = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
  second = jnp.stack(
    [jnp.roll(f, (int(y), int(x)), (0, 1)) for f, (x, y) in zip(first, task.truth)]
  )
  pair = FramePair(jnp.stack([first, second], axis=1))
  found = bottleneck.measure(task, {}, pair, jax.random.split(jax.random.key(1), 4))
  found = jax.tree.map(np.asarray, found)
  np.testing.assert_allclose(found["loss"], 0.01, rtol=1e-5)
  np.testing.assert_allclose(found["spread_px"], 2.0)
  np.testing.assert_allclose(found["zeroed"] - 0.01, found["copy"], rtol=1e-5)
  for name in ("zeroed", "exchanged"):
    rise, low, high = bottleneck.relative_rise(found[name], found["loss"])
    assert 5 < low < rise < high


def test_the_interval_holds_the_true_ratio_in_about_19_of_20_samples():
  rng = np.random.default_rng(0)
  held = 0
  for _ in range(400):
    loss = rng.gamma(2.0, 1.0, 200)
    worse = loss * 1.1 + rng.normal(0, 0.3, 200)
    _, low, high = bottleneck.relative_rise(worse, loss)
    held += low < 0.1 < high
  assert held / 400 == pytest.approx(0.95, abs=0.03)


def test_no_rise_is_zero():
  losses = np.array([1.0, 2.0, 4.0])
  np.testing.assert_allclose(bottleneck.relative_rise(losses, losses), 0.0, atol=1e-12)
