"""What a flow network's estimates cost at points whose flow is told, iteration by iteration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOSSES = ("laplace", "l1")
# Of the logarithm of the wide component's scale in pixels; the narrow one's scale is 1.
_LOG_SCALES = (0.0, 10.0)


def sequence_loss(
  flow_xy: Float[Array, "i *n 2"],
  info: Float[Array, "i *n 4"] | None,
  told_xy: Float[Array, "*n 2"],
  weight: Float[Array, "*n"],
  *,
  kind: str,
  gamma: float,
) -> Float[Array, ""]:
  """The weighted mean over points, of each estimate gamma times as much as of the one after it.

  Args:
    flow_xy: estimates in their order.
    info: what SEA-RAFT says of them, see `FlowEstimate`; "laplace" needs it.
    told_xy: what the flow is said to be.
    weight: of each point.
    kind: "l1" (RAFT's) or "laplace" (SEA-RAFT's: the negative logarithm of the probability of what
      is told under the mixture of two Laplacians, of which a wide one takes up what is wrong).
    gamma: below 1.
  """
  error = jnp.abs(flow_xy - told_xy)
  cost = laplace_cost(error, info) if kind == "laplace" else error
  cost = jnp.sum(cost, axis=-1)
  total = jnp.maximum(jnp.sum(weight), 1e-6)
  mean = jnp.sum(cost * weight, axis=tuple(range(1, cost.ndim))) / total
  count = flow_xy.shape[0]
  return jnp.sum(mean * gamma ** jnp.arange(count - 1, -1, -1))


def laplace_cost(error: Float[Array, "*n 2"], info: Float[Array, "*n 4"]) -> Float[Array, "*n 2"]:
  """-log p(error) of each component under the mixture that `info` describes.

  The scale of the wide Laplacian is at least the narrow one's, which is 1 pixel.
  """
  log_weights = jax.nn.log_softmax(info[..., :2], axis=-1)
  wide = jnp.clip(info[..., 2], *_LOG_SCALES)
  log_scales = jnp.stack([wide, jnp.zeros_like(wide)], axis=-1)
  terms = log_weights - jnp.log(2.0) - log_scales
  parts = terms[..., None, :] - error[..., None] * jnp.exp(-log_scales)[..., None, :]
  return -jax.nn.logsumexp(parts, axis=-1)
