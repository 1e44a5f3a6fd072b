"""Marks: small changes of frame 1 at a query point, whose echo in the prediction is the answer.

A mark is a function `(frame1 [h, w, 3] normalised, point_xy [2], token [C] or None) -> frame1`. The
fixed marks here ignore the token. A learned mark is a function `mark_fn(token, point_xy)` that
makes what is added to the normalised frame, [h, w, 3]; `additive(mark_fn)` gives it the form of a
mark, and as a `jax.tree_util.Partial` a mark carries its parameters with it.

Three attributes tell what a mark is like: `reads_token` False, that it is to be spared the tokens;
`on_pixel` False, that it follows the point inside its pixel, and so does its echo; `middle`, where
in the query's pixel its own middle lies otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax import geometry
from cwm_jax.types import InputError

Mark = Callable[[Array, Array, Array | None], Array]


def reads_token(mark: Any) -> bool:
  """Whether a mark, or the function of a `Partial`, asks for tokens; so it is unless it says no."""
  return getattr(getattr(mark, "func", mark), "reads_token", True)


def middle(mark: Any) -> float | None:
  """Where a mark, or the function of a `Partial`, lies in the query's pixel; None: on the query.

  Pixels along both sides from the pixel's upper left corner, so 0.5 is its centre, which is where a
  mark lies that says nothing else.
  """
  made = getattr(mark, "func", mark)
  return getattr(made, "middle", 0.5) if getattr(made, "on_pixel", True) else None


@dataclass(frozen=True)
class Square:
  """Paints a square of one colour over the query's pixel, replacing what was there.

  The query is floored to its pixel (r, c); the square covers `size` rows from r - size // 2 on and
  the same columns, so an odd side is centred on the pixel and an even one reaches one pixel further
  up and left, round the pixel's upper left corner. It is cut at the image's border.

  Attributes:
    colour: RGB, 0 to 255.
    size: side in pixels of the predictor's image.
  """

  colour: tuple[float, float, float] = (255, 0, 0)
  size: int = 4
  reads_token: ClassVar[bool] = False

  @property
  def middle(self) -> float:
    """Where in the query's pixel the square's middle lies: its centre, or its upper left corner."""
    return 0.5 if self.size % 2 else 0.0

  def __call__(
    self, frame1: Float[Array, "h w 3"], point_xy: Float[Array, " 2"], token: Any = None
  ) -> Float[Array, "h w 3"]:
    h, w = frame1.shape[:2]
    top, left = geometry.point_to_index_yx(point_xy, (h, w)) - self.size // 2
    rows, cols = jnp.arange(h), jnp.arange(w)
    inside = ((rows >= top) & (rows < top + self.size))[:, None] & (
      (cols >= left) & (cols < left + self.size)
    )[None]
    colour = geometry.normalise(jnp.array(self.colour, jnp.float32) / 255.0)
    return jnp.where(inside[..., None], colour, frame1).astype(frame1.dtype)


@dataclass(frozen=True)
class WhiteGaussian:
  """Adds a round bump, the same in all three channels, centred on the query itself.

  It is sampled at the pixels' centres, so that a query between them weighs its neighbours.

  Attributes:
    amplitude: height at the query, in normalised units; may be negative.
    sigma: width in pixels of the predictor's image.
  """

  amplitude: float = 1.0
  sigma: float = 1.5
  reads_token: ClassVar[bool] = False
  on_pixel: ClassVar[bool] = False

  def __call__(
    self, frame1: Float[Array, "h w 3"], point_xy: Float[Array, " 2"], token: Any = None
  ) -> Float[Array, "h w 3"]:
    h, w = frame1.shape[:2]
    x, y = point_xy
    squared = (jnp.arange(h) + 0.5 - y)[:, None] ** 2 + (jnp.arange(w) + 0.5 - x)[None] ** 2
    bump = self.amplitude * jnp.exp(-squared / (2.0 * self.sigma**2))
    return (frame1 + bump[..., None]).astype(frame1.dtype)


def default(patch: int) -> Square:
  """The mark where nothing says another: a red square, half as wide as the predictor's patches."""
  return Square(size=max(1, patch // 2))


def additive(mark_fn: Callable[[Array | None, Array], Array]) -> Mark:
  """The mark that adds `mark_fn(token, point_xy) -> [h, w, 3]` to the normalised frame 1."""

  def mark(frame1, point_xy, token=None):
    return frame1 + mark_fn(token, point_xy)

  return mark


def build(spec: Mapping[str, Any]) -> Mark:
  """Makes the mark that a config or a weights file describes.

  Args:
    spec: {"kind": "square", "colour": [r, g, b] 0-255, "size": pixels} or
      {"kind": "gaussian", "amplitude": normalised units, "sigma": pixels}; what is left out takes
      the class's default.

  Raises:
    InputError: an unknown kind or key, or a size that cannot be drawn.
  """
  kinds = {"square": Square, "gaussian": WhiteGaussian}
  named = dict(spec)
  kind = named.pop("kind", None)
  if kind not in kinds:
    raise InputError(f"a mark of kind {kind!r} is unknown; choose one of {', '.join(kinds)}")
  if "colour" in named:
    named["colour"] = tuple(float(c) for c in named["colour"])
    if len(named["colour"]) != 3:
      raise InputError(f"a mark's colour has three numbers (RGB, 0-255), not {named['colour']}")
  try:
    mark = kinds[kind](**named)
  except TypeError as error:
    known = ", ".join(kinds[kind].__dataclass_fields__)
    raise InputError(f"a {kind} mark has the settings {known}; got {', '.join(named)}") from error
  if kind == "square" and (mark.size < 1 or mark.size != int(mark.size)):
    raise InputError(f"a square mark's size is a whole number of pixels from 1 up, not {mark.size}")
  if kind == "gaussian" and mark.sigma <= 0:
    raise InputError(f"a Gaussian mark's sigma is above 0 pixels, not {mark.sigma}")
  return mark
