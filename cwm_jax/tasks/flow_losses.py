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
  """The weighted mean over dx and dy of points; each estimate counts gamma times the one after it.

  Terms that are not finite are left out of sum and count. So are those of weight 0, for which what
  is told may be anything.

  Args:
    flow_xy: (dx, dy) in pixels, `i` estimates in their order.
    info: what SEA-RAFT says of them, see `FlowEstimate`; "laplace" needs it.
    told_xy: what the flow is said to be, pixels.
    weight: of each point, 0 where it does not count.
    kind: "l1" (RAFT's) or "laplace" (SEA-RAFT's: the negative logarithm of the probability of what
      is told under the mixture of two Laplacians, of which a wide one takes up what is wrong).
    gamma: above 0 and at most 1.

  Returns:
    A scalar; 0 where no point has weight, NaN where some have and an estimate's terms at them are
    none of them finite: the network has diverged.

  Raises:
    ValueError: an unknown kind, or "laplace" without `info`.
  """
  if kind not in LOSSES or (kind == "laplace" and info is None):
    raise ValueError(f"there is no loss {kind!r} of these estimates; there are {LOSSES}")
  gap = flow_xy - told_xy
  finite = jnp.isfinite(gap)
  if kind == "laplace":
    finite &= jnp.all(jnp.isfinite(info[..., :3]), axis=-1, keepdims=True)
    info = jnp.where(jnp.isfinite(info), info, 0.0)
  # Replaced before the cost is taken, not after: 0 times a derivative that is not finite is NaN.
  error = jnp.abs(jnp.where(finite, gap, 0.0))
  cost = laplace_cost(error, info) if kind == "laplace" else error
  shares = finite * weight[..., None]
  terms = tuple(range(1, cost.ndim))
  total = jnp.sum(shares, axis=terms)
  mean = jnp.sum(cost * shares, axis=terms) / jnp.maximum(total, 1e-6)
  mean = jnp.where((total == 0) & (jnp.sum(weight) > 0), jnp.nan, mean)
  count = flow_xy.shape[0]
  return jnp.sum(mean * gamma ** jnp.arange(count - 1, -1, -1))


def laplace_cost(error: Float[Array, "*n 2"], info: Float[Array, "*n 4"]) -> Float[Array, "*n 2"]:
  """-log p(error) of dx and of dy under the mixture that `info` describes.

  Args:
    error: how far each is off, pixels, 0 or more.
    info: logits of the wide and the narrow Laplacian, logarithm of the wide one's scale, and one
      number that is not read: the narrow one's scale is 1 pixel, and the wide one's no less.
  """
  log_weights = jax.nn.log_softmax(info[..., :2], axis=-1)
  wide = jnp.clip(info[..., 2], *_LOG_SCALES)
  log_scales = jnp.stack([wide, jnp.zeros_like(wide)], axis=-1)
  terms = log_weights - jnp.log(2.0) - log_scales
  parts = terms[..., None, :] - error[..., None] * jnp.exp(-log_scales)[..., None, :]
  return -jax.nn.logsumexp(parts, axis=-1)
