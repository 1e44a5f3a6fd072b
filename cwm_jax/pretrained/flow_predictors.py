"""Psi-flow in weights files: its parameters beside the predictor's, as joint training has both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from cwm_jax.pretrained.merge import axis_of
from cwm_jax.types import InputError

FLOW_PREDICTOR = "flow_predictor"  # the folder of parameter names, and the config's section
_RGB = 3


def build(config: Mapping[str, Any], *, where: str) -> Any:
  """The module that a file's config describes.

  Raises:
    InputError: a section that describes none.
  """
  from cwm_jax import models

  try:
    return models.build_flow_predictor(config[FLOW_PREDICTOR])
  except KeyError as error:
    raise InputError(f"{where}: its config lacks {error}") from None
  except (ValueError, TypeError, AttributeError) as error:
    raise InputError(f"{where}: its config describes no flow predictor ({error})") from None


def expected_shapes(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
  """Psi-flow's parameters, nested, as shapes.

  Raises:
    InputError: a section that describes none, or one that cannot be built.
  """
  import jax

  module = build(config, where=where)
  # Parameters do not depend on the image's size, except that some modules take one grid only.
  gh, gw = getattr(module, "grid_hw", None) or (1, 1)
  frame = jax.ShapeDtypeStruct((1, gh * module.patch, gw * module.patch, 3), "float32")
  points = jax.ShapeDtypeStruct((1, 1, 2), "float32")
  try:
    return jax.eval_shape(module.init, jax.random.key(0), frame, points, points)["params"]
  except (ValueError, TypeError, ZeroDivisionError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise InputError(f"{where}: its config describes no flow predictor ({reason})") from None


def told_by_shapes(
  shapes: Mapping[str, tuple[int, ...]],
  links: tuple[Sequence[str], Sequence[str]],
  *,
  heads: tuple[int, int] | None,
  predictor_heads: tuple[int, int] | None,
  where: str,
) -> dict[str, Any]:
  """What a release's two-stream Psi-flow has in the `flow_predictor` section.

  Args:
    shapes: '/'-joined path of our parameter, without the folder -> shape.
    links: the encoder's and the decoder's, of each block; see `models.two_stream`.
    heads: (encoder's, decoder's) number of attention heads; None takes the release's where the
      sizes are its own, else `predictor_heads`.
    predictor_heads: those that the predictor beside it was said to have.
    where: names the shapes' origin in messages.

  Raises:
    InputError: patches that are not square, or a number of heads that is not known.
  """
  from cwm_jax.configs import opt_cwm

  pixels, width = shapes["primary_embed/kernel"]
  patch = isqrt(pixels // _RGB)
  if _RGB * patch * patch != pixels:
    raise InputError(f"{where}: the patches of its flow predictor are not square")
  decoder_width = shapes["head/kernel"][0]
  first = next((name for name in shapes if name.endswith("_fc1/bias")), None)
  if first is None or not patch or not decoder_width:
    raise InputError(f"{where}: its flow predictor has no patches, no width or no MLP in any block")
  of_width = width if first.startswith("encoder/") else decoder_width
  section = {
    "kind": "two_stream",
    "patch": patch,
    "mlp_ratio": axis_of(shapes, first, 1, where=where) / of_width,
  }
  sizes = {
    "encoder_width": width,
    "encoder_links": tuple(links[0]),
    "decoder_width": decoder_width,
    "decoder_links": tuple(links[1]),
  }
  released = opt_cwm.TWO_STREAM
  stated = {"setting": released["setting"], "grid_hw": ()}
  if sizes.items() <= released.items() and section == opt_cwm.FLOW_PREDICTOR:
    stated = dict(released)
    heads = heads or (released["encoder_heads"], released["decoder_heads"])
  heads = heads or predictor_heads
  if heads is None:
    raise InputError(
      f"{where} does not tell how many attention heads its flow predictor has: give them "
      "(--flow-heads, or --heads where the predictor has as many)"
    )
  sizes |= {"encoder_heads": heads[0], "decoder_heads": heads[1]}
  for half in ("encoder", "decoder"):
    width, count = sizes[f"{half}_width"], sizes[f"{half}_heads"]
    if count < 1 or width % count:
      raise InputError(f"{where}: a width of {width} does not divide into {count} attention heads")
  return {**section, "two_stream": {**stated, **sizes}}
