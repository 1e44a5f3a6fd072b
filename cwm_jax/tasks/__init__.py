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

import jax

from cwm_jax.types import InputError


def build(config: Any) -> Any:
  """Makes the task that `config.task` names.

  Raises:
    InputError: no such task, or settings it cannot work with.
  """
  from cwm_jax import models
  from cwm_jax.tasks import pretrain, readout

  if config.task != "pretrain":
    raise InputError(f"config.task is {config.task!r}; the tasks are: pretrain")
  try:
    model = models.build(config.model)
  except (ValueError, ZeroDivisionError) as error:
    raise InputError(f"config.model cannot be built: {error}") from None
  image_hw, scenes = tuple(config.model.image_hw), config.data.sources.scenes
  stages = [stage for _, stage in scenes.curriculum] if scenes.weight > 0 else ["worlds"]
  # A stage is a preset's name, or (name, weight) pairs; each preset is asked once.
  presets = dict.fromkeys(
    name for stage in stages for name in ([stage] if isinstance(stage, str) else dict(stage))
  )
  held_out = readout.HeldOutReadout(
    model=model,
    image_hw=image_hw,
    mask_ratio=config.model.mask_ratio,
    presets=list(presets),
    num_scenes=config.log.eval_scenes,
    num_masks=config.log.eval_masks,
    before_seed=scenes.first_seed,
    max_objects=scenes.max_objects,
    texture_size=scenes.texture_size or min(image_hw),
  )
  task = pretrain.Pretrain(
    model=model,
    image_hw=image_hw,
    mask_ratio=config.model.mask_ratio,
    held_out=held_out,
    loss_on=config.pretrain.loss_on,
    target=config.pretrain.target,
  )
  _check_model(task)
  return task


def _check_model(task: Any) -> None:
  """Traces the network once, without computing: much of what it cannot do shows only then.

  Raises:
    InputError: sizes that do not go together, unknown choices, or an attention implementation that
      this machine does not have.
  """
  try:
    jax.eval_shape(task.init, jax.random.key(0))
  except (ValueError, TypeError, ZeroDivisionError, RuntimeError, NotImplementedError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise InputError(f"config.model cannot be built: {reason}") from error
