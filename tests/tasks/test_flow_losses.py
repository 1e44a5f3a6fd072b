"""What estimates of flow cost where the flow is told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.tasks import flow_losses


def test_the_cost_is_the_negative_logarithm_of_a_mixture_of_two_laplacians():
  random = np.random.default_rng(0)
  error = random.exponential(3.0, (5, 2)).astype(np.float32)
  info = random.normal(0, 2, (5, 4)).astype(np.float32)
  share = np.exp(info[:, :2]) / np.exp(info[:, :2]).sum(axis=1, keepdims=True)
  wide = np.exp(np.clip(info[:, 2], 0, 10))[:, None]
  density = share[:, :1] / (2 * wide) * np.exp(-error / wide)
  density += share[:, 1:] / 2 * np.exp(-error)
  found = flow_losses.laplace_cost(jnp.asarray(error), jnp.asarray(info))
  np.testing.assert_allclose(found, -np.log(density), rtol=1e-5)


def test_what_is_far_off_pulls_less_than_what_is_near():
  info = jnp.array([0.0, 0.0, 3.0, 0.0])

  def cost(x):
    return flow_losses.laplace_cost(jnp.abs(jnp.array([x, 0.0])), info)[0]

  near, far = jax.grad(cost)(1.0), jax.grad(cost)(40.0)
  assert 0 < far < 0.1 * near


def test_a_loss_that_is_unknown_or_lacks_the_mixture_is_refused():
  flow, told = jnp.zeros((2, 3, 2)), jnp.zeros((3, 2))
  for kind in ("l2", "laplace"):
    with pytest.raises(ValueError, match=f"no loss '{kind}'"):
      flow_losses.sequence_loss(flow, None, told, jnp.ones(3), kind=kind, gamma=0.5)


def test_later_estimates_weigh_more_and_points_of_no_weight_nothing():
  told = jnp.zeros((3, 2))
  flow = jnp.stack([jnp.full((3, 2), 4.0), jnp.full((3, 2), 1.0)])
  flow = flow.at[:, 2].set(1e6)
  weight = jnp.array([1.0, 3.0, 0.0])
  found = flow_losses.sequence_loss(flow, None, told, weight, kind="l1", gamma=0.5)
  np.testing.assert_allclose(found, 0.5 * 8 + 2, rtol=1e-6)
  nothing = flow_losses.sequence_loss(flow, None, told, 0 * weight, kind="l1", gamma=0.5)
  assert float(nothing) == 0.0
