"""The optimizer: AdamW with warm-up and cosine, decay and freezing chosen by parameter path."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cwm_jax.types import InputError

SCHEDULES = ("cosine", "one_cycle")
_FIRST_OF_CYCLE = 1 / 25  # rate at the start, as a share of the peak
# Stored statistics of batch normalisation, which are measured and not learned: no gradient reaches
# them, and weight decay must not either.
_STATISTICS = r"(^|/)batch/(mean|var)$"


def learning_rate(
  *,
  peak: float,
  warmup_steps: int,
  total_steps: int,
  final_ratio: float = 0.0,
  warmup_from_zero: bool = False,
  schedule: str = "cosine",
) -> Callable[[Any], Any]:
  """Linear warm-up to `peak`, then a half cosine down to `peak * final_ratio` at `total_steps`.

  The schedule "one_cycle" (RAFT's) begins at 1/25 of the peak instead, and goes down straight.

  The returned function takes the number of updates done. The first update already has
  peak / warmup_steps, so that it is not wasted; past the end the last value stays. With
  `warmup_from_zero`, the public release's way, the first update has 0 and the warm-up's last the
  peak, which the update after it has once more.

  Raises:
    InputError: an unknown schedule, or a warm-up that is not shorter than the whole.
  """
  if schedule not in SCHEDULES:
    raise InputError(f"optim.schedule is {schedule!r}; choose one of {', '.join(SCHEDULES)}")
  if warmup_steps and warmup_steps >= total_steps:
    raise InputError(
      f"optim.warmup is {warmup_steps} steps and the run only {total_steps}: shorten the warm-up"
    )

  def rate(count):
    count = jnp.asarray(count, jnp.float32)
    if warmup_steps and warmup_from_zero:
      warm = jnp.minimum(1.0, count / max(1, warmup_steps - 1))
    else:
      warm = jnp.minimum(1.0, (count + 1) / max(1, warmup_steps))
    done = jnp.clip((count - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
    if schedule == "one_cycle":
      warm = _FIRST_OF_CYCLE + (1 - _FIRST_OF_CYCLE) * warm
      return peak * warm * (final_ratio + (1 - final_ratio) * (1 - done))
    cosine = final_ratio + (1 - final_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return peak * warm * cosine

  return rate


def decay_mask(params: Any, exclude: str) -> Any:
  """Like `params`, True where weight decay applies: where the path does not match `exclude`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not (exclude and re.search(exclude, _path_name(path))), params
  )


def _path_name(path: Any) -> str:
  """A pytree path as 'encoder/blocks/fc1/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def labels(params: Any, freeze: str) -> Any:
  """Like `params`: "frozen" where the path matches the regex `freeze`, else "trained".

  Stored statistics of batch normalisation are frozen whatever `freeze` says.

  Raises:
    InputError: `freeze` matches no parameter, or every one but those.
  """
  chosen = []

  def label(path, _):
    name = _path_name(path)
    if re.search(_STATISTICS, name):
      return "frozen"
    chosen.append(bool(freeze and re.search(freeze, name)))
    return "frozen" if chosen[-1] else "trained"

  tree = jax.tree_util.tree_map_with_path(label, params)
  if freeze and len(set(chosen)) < 2:
    what = "every parameter" if all(chosen) else "no parameter"
    raise InputError(f"optim.freeze {freeze!r} matches {what}")
  return tree


def make(
  *,
  total_steps: int,
  warmup_steps: int,
  batch_size: int,
  peak_lr: float,
  scale_lr: bool,
  final_lr_ratio: float,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  decay_exclude: str,
  freeze: str,
  clip_norm: float,
  warmup_from_zero: bool = False,
  schedule: str = "cosine",
  slow: Sequence[tuple[str, float, int]] = (),
) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
  """Builds the optimizer from the `optim` section of a config.

  Args:
    total_steps, warmup_steps: of the learning rate.
    batch_size: pairs a step.
    peak_lr: highest learning rate; times batch_size / 256 where `scale_lr`.
    clip_norm: largest global norm of the trained parameters' gradient; 0 never clips.
    warmup_from_zero, schedule: see `learning_rate`.
    slow: (regex, share, wait): where the path matches, the first that does, parameters learn at
      `share` of the rate, and not at all in the first `wait` steps.
    The rest: see `configs/base.py`.

  Returns:
    (transformation, rate): the optax transformation, whose statistics are float32, and the learning
    rate as a function of the number of updates done.

  Raises:
    InputError: the warm-up is not shorter than the run.
  """
  rate = learning_rate(
    peak=peak_lr * (batch_size / 256 if scale_lr else 1.0),
    warmup_steps=warmup_steps,
    total_steps=total_steps,
    final_ratio=final_lr_ratio,
    warmup_from_zero=warmup_from_zero,
    schedule=schedule,
  )
  trained = optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32),
    optax.add_decayed_weights(weight_decay, mask=lambda tree: decay_mask(tree, decay_exclude)),
    _by_rate(rate, slow) if slow else optax.scale_by_learning_rate(rate),
  )
  transforms = {"trained": trained, "frozen": optax.set_to_zero()}
  # The wrapper stays when nothing is frozen, so that a checkpoint's layout does not depend on it.
  return optax.partition(transforms, lambda params: labels(params, freeze)), rate


def _by_rate(
  rate: Callable[[Any], Any], slow: Sequence[tuple[str, float, int]]
) -> optax.GradientTransformation:
  """`optax.scale_by_learning_rate` with a rate that depends on the path; its state is the same."""

  def factor(path, count):
    name = _path_name(path)
    for regex, share, wait in slow:
      if re.search(regex, name):
        return share * (count >= wait)
    return 1.0

  def init(_):
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    step = -rate(state.count)
    scale = lambda path, u: u * (step * factor(path, state.count)).astype(u.dtype)  # noqa: E731
    return (
      jax.tree_util.tree_map_with_path(scale, updates),
      optax.ScaleByScheduleState(state.count + 1),
    )

  return optax.GradientTransformation(init, update)
