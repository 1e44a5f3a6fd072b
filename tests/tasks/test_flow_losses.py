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
  np.testing.assert_allclose(found, 0.5 * 4 + 1, rtol=1e-6)
  nothing = flow_losses.sequence_loss(flow, None, told, 0 * weight, kind="l1", gamma=0.5)
  assert float(nothing) == 0.0


@pytest.mark.parametrize("kind", flow_losses.LOSSES)
def test_what_is_not_finite_counts_neither_in_the_mean_nor_in_its_gradient(kind):
  told = jnp.array([[0.0, 0.0], [jnp.nan, 1.0], [0.0, 0.0], [jnp.nan, jnp.inf]])
  flow = jnp.array([[[1.0, 2.0], [9.0, 4.0], [jnp.inf, 6.0], [3.0, 3.0]]])
  info = jnp.zeros((1, 4, 4))
  weight = jnp.array([1.0, 2.0, 1.0, 0.0])

  @jax.jit
  def loss(flow, info):
    return flow_losses.sequence_loss(flow, info, told, weight, kind=kind, gamma=0.5)

  # Both components of the first point, dy of the second (twice as much) and of the third.
  error, shares = np.array([1.0, 2.0, 3.0, 6.0]), np.array([1.0, 1.0, 2.0, 1.0])
  cost = error if kind == "l1" else error + np.log(2)
  np.testing.assert_allclose(loss(flow, info), (cost * shares).sum() / 5, rtol=1e-6)
  grads = jax.jit(jax.grad(loss))(flow, info)
  want = [[[0.2, 0.2], [0.0, 0.4], [0.0, 0.2], [0.0, 0.0]]]
  np.testing.assert_allclose(grads, want, rtol=1e-6)


def test_a_mixture_that_is_not_finite_takes_its_point_out():
  info = jnp.zeros((1, 2, 4)).at[0, 1, 2].set(jnp.nan)
  flow, told = jnp.array([[[1.0, 2.0], [5.0, 5.0]]]), jnp.zeros((2, 2))

  @jax.jit
  def loss(flow, info):
    return flow_losses.sequence_loss(flow, info, told, jnp.ones(2), kind="laplace", gamma=0.5)

  np.testing.assert_allclose(loss(flow, info), 1.5 + np.log(2), rtol=1e-6)
  for grads in jax.jit(jax.grad(loss, argnums=(0, 1)))(flow, info):
    assert np.isfinite(grads).all() and not grads[0, 1].any()


def test_a_network_that_says_nothing_finite_has_no_finite_loss():
  flow, told = jnp.full((1, 3, 2), jnp.nan), jnp.zeros((3, 2))
  found = flow_losses.sequence_loss(flow, None, told, jnp.ones(3), kind="l1", gamma=0.5)
  assert np.isnan(found)
