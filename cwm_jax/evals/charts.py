"""Line charts as pictures, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from cwm_jax import viz

_SMOOTH = 2  # drawn this many times larger and averaged down
_INK, _GRID, _PAPER = (28, 28, 32), (226, 226, 230), (255, 255, 255)
_TEXT = 13  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 40  # margins, pixels

Colour = tuple[int, int, int]


class Line(NamedTuple):
  """One curve: x and y, as many of each; not-finite points are left out."""

  x: Sequence[float]
  y: Sequence[float]


def line_chart(
  lines: Mapping[str, Line],
  *,
  x_label: str,
  y_label: str,
  size_hw: tuple[int, int] = (320, 460),
  colours: Sequence[Colour] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
  """Curves over one pair of axes that begin at 0.

  Args:
    lines: {name: curve}.
    colours: RGB, 0 to 255, one a curve; None takes colours by order, the same as in `legend`.
  """
  h, w = size_hw
  known = [np.array([line.x, line.y], float) for line in lines.values()]
  known = [points[:, np.isfinite(points).all(axis=0)] for points in known]
  everything = np.concatenate([np.zeros((2, 1)), *known], axis=1)
  x_ticks, y_ticks = (_ticks(float(top)) for top in everything.max(axis=1))

  def place(x: float, y: float) -> tuple[float, float]:
    across = _LEFT + (w - _LEFT - _RIGHT) * x / x_ticks[-1]
    down = h - _BOTTOM - (h - _TOP - _BOTTOM) * y / y_ticks[-1]
    return across * _SMOOTH, down * _SMOOTH

  picture = Image.new("RGB", (w * _SMOOTH, h * _SMOOTH), _PAPER)
  pen = ImageDraw.Draw(picture)
  font = ImageFont.load_default(_TEXT * _SMOOTH)
  for tick in y_ticks:
    pen.line([*place(0, tick), *place(x_ticks[-1], tick)], _INK if tick == 0 else _GRID, _SMOOTH)
    at = place(0, tick)
    pen.text((at[0] - 6 * _SMOOTH, at[1]), f"{tick:g}", _INK, font, anchor="rm")
  for tick in x_ticks:
    at = place(tick, 0)
    pen.text((at[0], at[1] + 6 * _SMOOTH), f"{tick:g}", _INK, font, anchor="mt")
  below = (h - 6) * _SMOOTH
  pen.text((place(x_ticks[-1] / 2, 0)[0], below), x_label, _INK, font, anchor="mb")
  _write_upwards(picture, y_label, (4 * _SMOOTH, place(0, y_ticks[-1] / 2)[1]), font)
  for points, colour in zip(known, colours or viz.track_colours(len(known))):
    path = [place(x, y) for x, y in points.T]
    if len(path) > 1:
      pen.line([c for at in path for c in at], colour, 2 * _SMOOTH, joint="curve")
    for at in path:
      pen.circle(at, 2.5 * _SMOOTH, fill=colour)
  return np.asarray(picture.resize((w, h), Image.Resampling.BOX))


def legend(
  names: Sequence[str], *, colours: Sequence[Colour] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
  """The names in the colours of `line_chart`, which takes the same ones, one below the other."""
  font, line = ImageFont.load_default(_TEXT * _SMOOTH), _TEXT + 7
  w = 30 + math.ceil(max((font.getlength(name) for name in names), default=0) / _SMOOTH)
  h = max(1, len(names)) * line + _TOP
  picture = Image.new("RGB", (w * _SMOOTH, h * _SMOOTH), _PAPER)
  pen = ImageDraw.Draw(picture)
  colours = colours or viz.track_colours(len(names))
  for row, (name, colour) in enumerate(zip(names, colours)):
    y = (_TOP + (row + 0.5) * line) * _SMOOTH
    pen.line([0, y, 18 * _SMOOTH, y], colour, 3 * _SMOOTH)
    pen.text((26 * _SMOOTH, y), name, _INK, font, anchor="lm")
  return np.asarray(picture.resize((w, h), Image.Resampling.BOX))


def _ticks(top: float) -> list[float]:
  """0 and up, at steps of 1, 2 or 5 times a power of ten, the last at `top` or just above."""
  top = top if top > 0 else 1.0
  rough = top / 5
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
  return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def _write_upwards(picture: Image.Image, text: str, at: tuple[float, float], font) -> None:
  """Text that reads from below, its left edge's middle at `at`."""
  left, top, right, bottom = font.getbbox(text)
  label = Image.new("RGB", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2), _PAPER)
  ImageDraw.Draw(label).text((1 - left, 1 - top), text, _INK, font)
  turned = label.rotate(90, expand=True)
  picture.paste(turned, (round(at[0]), round(at[1] - turned.height / 2)))
