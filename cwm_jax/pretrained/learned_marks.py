"""Learned marks in weights files: the perturber's parameters beside the predictor's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.tree_util import Partial

from cwm_jax.pretrained import sections
from cwm_jax.types import InputError

PERTURBER = "perturber"  # the folder of parameter names that is the perturber's
KIND = "learned"
_SETTINGS = ("hidden_width", "size", "scale")
# Of a file that does not say these.
_AS_RELEASED = {"on_pixel": True, "reach": 1.0}


def is_learned(config: Mapping[str, Any]) -> bool:
  """Whether a weights file's config recommends the mark that is stored beside its predictor."""
  return sections.kind_of(config, "mark") == KIND


def build(config: Mapping[str, Any], params: Any) -> Partial:
  """The mark: a function of (frame1, point_xy, token), as `counterfactual.perturb` has them.

  Args:
    config: of a weights file for which `is_learned`.
    params: the perturber's parameters.

  Raises:
    InputError: settings that describe no mark.
  """
  from cwm_jax.counterfactual import gaussian

  module, settings = _described(config)
  return Partial(gaussian.GaussianMark(module, **settings), params)


def expected_shapes(config: Mapping[str, Any], *, token_width: int) -> dict[str, Any]:
  """The perturber's parameters, nested, as shapes.

  Raises:
    InputError: settings that describe no mark.
  """
  import jax

  module, _ = _described(config)
  token = jax.ShapeDtypeStruct((token_width,), "float32")
  return jax.eval_shape(lambda token: module.init(jax.random.key(0), token), token)["params"]


def _described(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  from cwm_jax.models.perturber import Perturber

  mark = {**_AS_RELEASED, **config["mark"]}
  settings = [mark.get(name) for name in _SETTINGS]
  if not all(type(value) is int and 0 < value < 1 << 16 for value in settings):
    raise InputError(f"a learned mark has the whole numbers {', '.join(_SETTINGS)}")
  hidden_width, size, scale = settings
  on_pixel, reach = mark["on_pixel"], mark["reach"]
  if type(on_pixel) is not bool:
    raise InputError(f"a learned mark's on_pixel is true or false, not {on_pixel!r}")
  if type(reach) not in (int, float) or not 0 <= reach <= 1:
    raise InputError(f"a learned mark's reach is from 0 to 1, not {reach!r}")
  settings = dict(size=size, scale=scale, on_pixel=on_pixel, reach=reach)
  return Perturber(hidden_width=hidden_width), settings
