"""A learned mark in a small file of its own, to be used with the predictor it was trained through.

The format is that of weights files: the config's section `model` says which predictor the mark
reads its tokens from, `mark` what it is, and of the parameters only the perturber's are there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cwm_jax.pretrained import learned_marks, weights
from cwm_jax.pretrained.merge import check_names
from cwm_jax.types import InputError


def save(
  path: str | os.PathLike,
  params: dict[str, Any],
  *,
  model: Mapping[str, Any],
  size: int,
  scale: int = 1,
  on_pixel: bool = True,
  reach: float = 1.0,
  extra: dict[str, Any] | None = None,
  dtype: str = "float32",
) -> Path:
  """Writes a mark, whole or not at all.

  Args:
    path: where to; its folder must exist.
    params: the perturber's parameters.
    model: JSON-ready `model` section of the predictor that it was trained through.
    size, scale, on_pixel, reach: see `gaussian.GaussianMark`, for that predictor's images.
    extra, dtype: as `weights.save`.

  Raises:
    InputError: as `weights.save`, or parameters that are not a perturber's for that predictor.
  """
  hidden_width = _hidden_width(params)
  mark = dict(kind=learned_marks.KIND, hidden_width=hidden_width)
  mark |= dict(size=size, scale=scale, on_pixel=on_pixel, reach=reach)
  config = {"model": dict(model), "mark": mark}
  stored = {learned_marks.PERTURBER: params}
  expected = learned_marks.expected_shapes(config, token_width=model["encoder_width"])
  check_names(
    {name: value.shape for name, value in weights.flatten(params).items()},
    {name: value.shape for name, value in weights.flatten(expected).items()},
    where="the perturber",
  )
  return weights.save(path, stored, config, extra=extra, dtype=dtype)


def read(
  path: str | os.PathLike, *, model: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads the learned mark of a mark file, or of a weights file that has one beside its predictor.

  Args:
    model: the `model` section of the predictor that is to be marked. Where its images are a whole
      number of times larger than those the mark is for, the mark is enlarged as much.

  Returns:
    (params, config): nested dict of float32 NumPy arrays, and what `learned_marks.build` takes.

  Raises:
    InputError: not such a file, no learned mark in it, or one for another kind of predictor.
  """
  params = weights.load_perturber(path)
  if params is None:
    raise InputError(f"{path} holds no learned mark")
  config = weights.read_header(path).config
  theirs = config["model"]
  for key in ("encoder_width", "patch"):
    if theirs[key] != model[key]:
      raise InputError(
        f"the mark of {path} is for a predictor of {key} {theirs[key]}, this one has {model[key]}"
      )
  (h, w), (own_h, own_w) = theirs["image_hw"], model["image_hw"]
  factor = own_h // h
  if factor < 1 or (own_h, own_w) != (h * factor, w * factor):
    raise InputError(
      f"the mark of {path} is for images of {h} x {w}; {own_h} x {own_w} are no multiple of them"
    )
  mark = dict(config["mark"], scale=config["mark"]["scale"] * factor)
  return params, {"model": dict(model), "mark": mark}


def load(path: str | os.PathLike, *, model: Mapping[str, Any]) -> Any:
  """The mark of a file, ready for `Tracker`; the arguments and errors are those of `read`."""
  import jax

  params, config = read(path, model=model)
  return learned_marks.build(config, jax.tree.map(jax.numpy.asarray, params))


def _hidden_width(params: Mapping[str, Any]) -> int:
  try:
    return int(params["fc1"]["kernel"].shape[1])
  except (KeyError, TypeError, AttributeError, IndexError):
    raise InputError("these are not a perturber's parameters") from None
