"""Occlusion: a mark whose echo is weak under every mask went nowhere that can be seen."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax.types import InputError

_REDUCTIONS = {"max": jnp.max, "mean": jnp.mean, "min": jnp.min}
OVER_PIXELS = ("max", "mean")
OVER_MASKS = ("mean", "max", "min")


def measure(
  responses: Float[Array, "m *n h w"], *, over_pixels: str = "max", over_masks: str = "mean"
) -> Float[Array, "*n"]:
  """How strongly a mark was answered; below a threshold its point counts as occluded.

  `multimask.respond` computes the default measure (the public release's) as its masks go by; this
  is the plain form, and the other measures that the release knows.

  Args:
    responses: L1 over channels of each mask's difference, in normalised units.
    over_pixels: "max" or "mean" over each response's pixels.
    over_masks: "mean", "max" or "min" over masks of that.

  Raises:
    InputError: an unknown reduction.
  """
  for name, choices in ((over_pixels, OVER_PIXELS), (over_masks, OVER_MASKS)):
    if name not in choices:
      raise InputError(f"the reduction is {name!r}; choose one of {', '.join(choices)}")
  of_each = _REDUCTIONS[over_pixels](responses, axis=(-2, -1))
  return _REDUCTIONS[over_masks](of_each, axis=0)
