"""Tasks: what a training run learns, one file each; `train.py` knows only this contract.

A task has
  init(key) -> params
  given                                            {first name: params} that replace init's, such as
                                                   a frozen network's; may be empty
  loss(params, pair, keys) -> (loss, metrics)      keys: one per pair, so that a pair's randomness
                                                   does not depend on how the batch is split
  watched                                          first names of parameters whose gradient norms
                                                   are metrics of their own
  pictures(params, pair, keys) -> {name: images float32 [B, H, W, 3] in [0, 1]}
  evals(params) -> iterator of (name, value)
  image_hw                                         size of the frames it wants, pixels
  wants                                            what it reads of a pair beside the frames: "", or
                                                   "labels" or "truth", see `types.FramePair`
"""

from __future__ import annotations

from typing import Any

import jax

from cwm_jax.types import InputError

TASKS = ("pretrain", "joint", "distill", "supervised")


def build(config: Any) -> Any:
  """Makes the task that `config.task` names.

  Raises:
    InputError: no such task, or settings it cannot work with.
  """
  if config.task not in TASKS:
    raise InputError(f"config.task is {config.task!r}; the tasks are: {', '.join(TASKS)}")
  if config.task == "joint":
    from cwm_jax.tasks import joint_building

    return joint_building.build(config)
  if config.task in ("distill", "supervised"):
    from cwm_jax.tasks import distill

    return distill.build(config)
  from cwm_jax import models
  from cwm_jax.tasks import pretrain, readout

  try:
    model = models.build(config.model)
  except (ValueError, ZeroDivisionError) as error:
    raise InputError(f"config.model cannot be built: {error}") from None
  image_hw = tuple(config.model.image_hw)
  task = pretrain.Pretrain(
    model=model,
    image_hw=image_hw,
    mask_ratio=config.model.mask_ratio,
    held_out=readout.build(config, model, image_hw=image_hw, mask_ratio=config.model.mask_ratio),
    loss_on=config.pretrain.loss_on,
    target=config.pretrain.target,
  )
  trace(task.init, jax.random.key(0), what="config.model")
  return task


def trace(function: Any, *arguments: Any, what: str) -> Any:
  """Traces a function once, without computing: much of what a network cannot do shows only then.

  Args:
    what: the sections of the config that describe it.

  Returns:
    The shapes of its results.

  Raises:
    InputError: sizes that do not go together, unknown choices, or an attention implementation that
      this machine does not have.
  """
  try:
    return jax.eval_shape(function, *arguments)
  except (ValueError, TypeError, ZeroDivisionError, RuntimeError, NotImplementedError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise InputError(f"{what} cannot be built: {reason}") from error
