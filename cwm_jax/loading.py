"""What a `Tracker` is made of, from a weights file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial

from cwm_jax import models
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.pretrained import learned_marks, mark_files, sections, weights
from cwm_jax.types import InputError, Prediction

_LOG = logging.getLogger(__name__)


class Parts(NamedTuple):
  """Arguments of `Tracker` that a weights file settles."""

  predict_fn: Callable[[Any, Any], Prediction]
  image_hw: tuple[int, int]
  patch: int
  mask_ratio: float
  mark: Any


@dataclass(frozen=True)
class _Apply:
  """`model.apply` at one number of visible patches; equal ones share their compiled programs."""

  model: Any
  num_visible: int

  def __call__(self, params: Any, frames: Any, mask: Any) -> Prediction:
    return self.model.apply({"params": params}, frames, mask, num_visible=self.num_visible)


def predictor(
  path: Path,
  params: Any,
  config: Mapping[str, Any],
  *,
  mask_ratio: float | None,
  mark: Any,
  dtype: str | None,
  attention_dtype: str | None,
) -> Parts:
  """A predictor with its mark; the arguments after the file's content are those of `Tracker.load`.

  Raises:
    InputError: a mark or a setting that cannot be.
  """
  if isinstance(mark, str | Path):
    mark = mark_files.load(mark, model=config["model"])
  elif mark is None and learned_marks.is_learned(config):
    mark = learned_marks.build(config, jax.device_put(weights.load_perturber(path)))
  elif mark is None and "mark" in config:
    mark = config["mark"]
  model = models.in_dtype(config["model"], dtype, attention_dtype)
  ratio = model["mask_ratio"] if mask_ratio is None else mask_ratio
  if not sections.predicts_colours(config):
    _LOG.warning(
      "%s predicts patches without their brightness and contrast (pretrain.target), and so they "
      "are drawn",
      path,
    )
  (h, w), patch = model["image_hw"], model["patch"]
  grid_hw = (h // patch, w // patch)
  num_visible = grid_hw[0] * grid_hw[1] + masks_lib.num_visible_patches(grid_hw, ratio)
  try:
    apply = _Apply(models.build(model), num_visible)
  except ValueError as error:  # what the file says was built before
    raise InputError(str(error)) from None
  return Parts(Partial(apply, jax.device_put(params)), (h, w), patch, ratio, mark)
