"""One training step as a pure function: gradients, micro-batches, optimizer, running average."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cwm_jax.types import FramePair, TrainState


def init_state(task: Any, tx: Any, key: Any, *, keep_ema: bool) -> TrainState:
  """A state at step 0, from scratch."""
  params = task.init(key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    ema=jax.tree.map(jnp.copy, params) if keep_ema else None,
  )


def make_update(
  task: Any, tx: Any, rate: Any, *, seed: int, accumulate: int = 1, ema_decay: float = 0.0
) -> Any:
  """The training step: update(state, pair) -> (state, metrics), to be jitted.

  All randomness comes from `seed` and the step, one key a pair, so neither resuming nor the number
  of devices or micro-batches changes what is drawn.

  Args:
    task: see `tasks`.
    tx, rate: as `optim.make` gives them.
    accumulate: micro-batches that the batch is cut into, one after the other.
    ema_decay: of the running average; early on the decay is (1 + step) / (10 + step) where lower.
  """

  def gradient(params, pair, keys):
    return jax.grad(task.loss, has_aux=True)(params, pair, keys)

  def split(leaf):
    # Interleaved, so that every device keeps its own share of each micro-batch.
    return jnp.swapaxes(leaf.reshape(-1, accumulate, *leaf.shape[1:]), 0, 1)

  def update(state: TrainState, pair: FramePair):
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    work = (pair, jax.random.split(step_key, pair.frames.shape[0]))
    if accumulate == 1:
      grads, metrics = gradient(state.params, *work)
    else:
      micro = jax.tree.map(split, work)
      shapes = jax.eval_shape(gradient, state.params, *jax.tree.map(lambda x: x[0], micro))
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
      add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(state.params, *part)), None)  # noqa: E731
      sums, _ = jax.lax.scan(add, zeros, micro)
      grads, metrics = jax.tree.map(lambda leaf: leaf / accumulate, sums)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
      ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
    watched = {f"{name}_grad_norm": optax.tree.norm(grads[name]) for name in task.watched}
    metrics = dict(
      metrics,
      **watched,
      grad_norm=optax.tree.norm(grads),
      update_norm=optax.tree.norm(updates),
      param_norm=optax.tree.norm(params),
      learning_rate=rate(state.step),
    )
    return TrainState(state.step + 1, params, opt_state, ema), metrics

  return update
