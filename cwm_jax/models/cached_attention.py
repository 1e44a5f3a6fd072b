"""Attention whose scores stay in a CPU's cache: one head and some rows at a time.

The score matrix of 16 pairs of 512 tokens and 8 heads takes 128 MB and is read and written several
times; one head's takes 1 MB. The gradient works its scores out again, once by rows of queries and
once by rows of keys, since a product that sums over the rows of its left side is four times slower.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Scores of one step: 2 MB in float32.
_SCORES = 512 * 1024


@jax.custom_vjp
def attend(
  q: Float[Array, "heads n d"], k: Float[Array, "heads m d"], v: Float[Array, "heads m d"]
) -> Float[Array, "heads n d"]:
  """softmax(q k) v of each head, with float32 scores; `q` comes scaled by 1 / sqrt(d)."""
  return _forward(q, k, v)[0]


def _forward(q, k, v):
  def some_queries(q, k, v):
    scores = _dot(q, k)
    most = jnp.max(scores, axis=1, keepdims=True)
    weights = jnp.exp(scores - most)
    total = jnp.sum(weights, axis=1, keepdims=True)
    out = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.astype(v.dtype), (most + jnp.log(total))[:, 0]

  head = lambda x: _by_rows(some_queries, x[:1], x[1:])  # noqa: E731
  out, log_total = jax.lax.map(head, (q, k, v))
  return out, (q, k, v, out, log_total)


def _backward(kept, grad_out):
  *inputs, out, log_total = kept
  # What each query's weights lose because they add up to one.
  shared = jnp.sum(out.astype(jnp.float32) * grad_out, axis=-1)

  def some_queries(q, grad_out, log_total, shared, k, v):
    weights = jnp.exp(_dot(q, k) - log_total[:, None])
    grad_scores = weights * (_dot(grad_out, v) - shared[:, None])
    return jnp.dot(grad_scores.astype(k.dtype), k)

  def some_keys(k, v, q, grad_out, log_total, shared):
    weights = jnp.exp(_dot(k, q) - log_total)
    grad_scores = weights * (_dot(v, grad_out) - shared)
    return jnp.dot(grad_scores.astype(q.dtype), q), jnp.dot(weights.astype(q.dtype), grad_out)

  def head(x):
    q, k, v, *of_queries = x
    grad_q = _by_rows(some_queries, (q, *of_queries), (k, v))
    return grad_q, *_by_rows(some_keys, (k, v), (q, *of_queries))

  return jax.lax.map(head, (*inputs, grad_out, log_total, shared))


attend.defvjp(_forward, _backward)


def _dot(rows, columns):
  return jnp.dot(rows, columns.T, preferred_element_type=jnp.float32)


def _by_rows(fn, rows, whole):
  """fn(*rows, *whole), some of the rows at a time where all their scores would be too many."""
  n, others = rows[0].shape[0], whole[0].shape[0]
  steps = -(-n * others // _SCORES)
  if steps == 1:
    return fn(*rows, *whole)
  size = -(-n // steps)

  def split(x):
    x = jnp.pad(x, ((0, steps * size - n), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(steps, size, *x.shape[1:])

  out = jax.lax.map(lambda some: fn(*some, *whole), jax.tree.map(split, tuple(rows)))
  return jax.tree.map(lambda x: x.reshape(steps * size, *x.shape[2:])[:n], out)
