"""Tasks: what a training run learns, one file each; `train.py` knows only this contract.

A task has
  init(key) -> params
  loss(params, pair, keys) -> (loss, metrics)      keys: one per pair, so that a pair's randomness
                                                   does not depend on how the batch is split
  pictures(params, pair, keys) -> {name: images float32 [B, H, W, 3] in [0, 1]}
  evals(params) -> iterator of (name, value)
  image_hw                                         size of the frames it wants, pixels
"""

from __future__ import annotations

from typing import Any

from cwm_jax.types import InputError


def build(config: Any) -> Any:
  """Makes the task that `config.task` names.

  Raises:
    InputError: no such task, or settings it cannot work with.
  """
  from cwm_jax import models
  from cwm_jax.tasks import pretrain

  if config.task != "pretrain":
    raise InputError(f"config.task is {config.task!r}; the tasks are: pretrain")
  try:
    model = models.build(config.model)
  except (ValueError, ZeroDivisionError) as error:
    raise InputError(f"config.model cannot be built: {error}") from None
  return pretrain.Pretrain(
    model=model,
    image_hw=tuple(config.model.image_hw),
    mask_ratio=config.model.mask_ratio,
    loss_on=config.pretrain.loss_on,
    target=config.pretrain.target,
  )
