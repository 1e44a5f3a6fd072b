"""Pixels, coordinates and resizes. Every resize that touches a coordinate goes through here.

Convention: coordinates are continuous, the image's corner is (0, 0), the centre of the pixel with
index i is i + 0.5. Names carry the order: `_xy`, `_yx`, `size_hw`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(frames: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
  """RGB in [0, 1] to ImageNet-normalised."""
  return (frames - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)


def unnormalise(frames: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
  """ImageNet-normalised to RGB in [0, 1] (not clipped)."""
  return frames * jnp.array(IMAGENET_STD) + jnp.array(IMAGENET_MEAN)


def pixel_centres(h: int, w: int) -> Float[Array, "h w 2"]:
  """(x, y) of every pixel's centre."""
  y, x = jnp.meshgrid(jnp.arange(h) + 0.5, jnp.arange(w) + 0.5, indexing="ij")
  return jnp.stack([x, y], axis=-1)


def scale_points_xy(
  points_xy: Float[Array, "*n 2"], from_hw: tuple[int, int], to_hw: tuple[int, int]
) -> Float[Array, "*n 2"]:
  """Moves continuous (x, y) from an image of size `from_hw` to the same image at `to_hw`."""
  factor = jnp.array([to_hw[1] / from_hw[1], to_hw[0] / from_hw[0]], points_xy.dtype)
  return points_xy * factor


def point_to_index_yx(
  points_xy: Float[Array, "*n 2"], size_hw: tuple[int, int]
) -> Int[Array, "*n 2"]:
  """The (row, column) index of the pixel that holds each (x, y); clamped to the image."""
  yx = jnp.floor(points_xy[..., ::-1]).astype(jnp.int32)
  return jnp.clip(yx, 0, jnp.array(size_hw, jnp.int32) - 1)


def index_to_point_xy(index_yx: Array) -> Float[Array, "*n 2"]:
  """The continuous (x, y) of a (row, column) pixel index: its centre."""
  return index_yx[..., ::-1].astype(jnp.float32) + 0.5


def resize(
  image: Float[Array, "*b h w c"], size_hw: tuple[int, int], *, antialias: bool = False
) -> Float[Array, "*b h2 w2 c"]:
  """Bilinear resize, half-pixel centres (torch's `align_corners=False`).

  Without `antialias` it equals torch's `F.interpolate(mode="bilinear")`; with it, shrinking
  averages over the pixels that are dropped.
  """
  if image.shape[-3:-1] == tuple(size_hw):
    return image
  shape = (*image.shape[:-3], *size_hw, image.shape[-1])
  return jax.image.resize(image, shape, "linear", antialias=antialias)


def sample_bilinear(
  image: Float[Array, "h w c"], points_xy: Float[Array, "*n 2"]
) -> Float[Array, "*n c"]:
  """Bilinear samples at continuous (x, y); the border pixel's value goes on outside the image."""
  h, w = image.shape[:2]
  x = jnp.clip(points_xy[..., 0] - 0.5, 0, w - 1)
  y = jnp.clip(points_xy[..., 1] - 0.5, 0, h - 1)
  x0, y0 = jnp.floor(x).astype(jnp.int32), jnp.floor(y).astype(jnp.int32)
  x1, y1 = jnp.minimum(x0 + 1, w - 1), jnp.minimum(y0 + 1, h - 1)
  wx, wy = (x - x0)[..., None], (y - y0)[..., None]
  top = image[y0, x0] * (1 - wx) + image[y0, x1] * wx
  bottom = image[y1, x0] * (1 - wx) + image[y1, x1] * wx
  return top * (1 - wy) + bottom * wy


def warp_backward(
  image: Float[Array, "h w c"], flow_xy: Float[Array, "h w 2"]
) -> Float[Array, "h w c"]:
  """Samples `image` at p + flow(p): frame 2 drawn back onto frame 1's pixels."""
  h, w = flow_xy.shape[:2]
  return sample_bilinear(image, pixel_centres(h, w) + flow_xy)


def argmax_yx(heat: Float[Array, "*b h w"]) -> Int[Array, "*b 2"]:
  """(row, column) index of the maximum; the first in raster order when several are equal."""
  w = heat.shape[-1]
  flat = jnp.argmax(heat.reshape(*heat.shape[:-2], -1), axis=-1)
  return jnp.stack([flat // w, flat % w], axis=-1).astype(jnp.int32)


def soft_argmax_yx(
  heat: Float[Array, "*b h w"], *, inverse_temperature: float = 200.0
) -> Float[Array, "*b 2"]:
  """Expected (row, column) index under softmax(inverse_temperature * heat); differentiable."""
  h, w = heat.shape[-2:]
  flat = heat.reshape(*heat.shape[:-2], -1)
  weights = jax.nn.softmax(inverse_temperature * flat, axis=-1).reshape(heat.shape)
  row = jnp.sum(weights * jnp.arange(h, dtype=heat.dtype)[:, None], axis=(-2, -1))
  col = jnp.sum(weights * jnp.arange(w, dtype=heat.dtype), axis=(-2, -1))
  return jnp.stack([row, col], axis=-1)


def window_argmax_yx(
  heat: Float[Array, "*b h w"], *, radius: int = 2, power: float = 2.0
) -> Float[Array, "*b 2"]:
  """Sub-pixel (row, column) index: the mean of heat ** power in a window round the maximum."""
  h, w = heat.shape[-2:]
  peak = argmax_yx(heat)
  rows, cols = jnp.arange(h), jnp.arange(w)
  in_row = jnp.abs(rows - peak[..., 0, None]) <= radius
  in_col = jnp.abs(cols - peak[..., 1, None]) <= radius
  inside = in_row[..., :, None] & in_col[..., None, :]
  top = jnp.max(heat, axis=(-2, -1), keepdims=True)
  weights = jnp.where(inside, (heat / jnp.maximum(top, 1e-12)) ** power, 0.0)
  # An all-zero heat map has its "maximum" at (0, 0); give that answer, not a division by zero.
  total = jnp.sum(weights, axis=(-2, -1))
  safe = jnp.maximum(total, 1e-12)
  row = jnp.sum(weights * rows[:, None], axis=(-2, -1)) / safe
  col = jnp.sum(weights * cols, axis=(-2, -1)) / safe
  return jnp.where(total[..., None] > 0, jnp.stack([row, col], axis=-1), peak.astype(heat.dtype))


def crop_resize(
  image: Float[Array, "h w c"],
  corner_xy: Float[Array, " 2"],
  size: Int[Array, ""] | Float[Array, ""],
  size_hw: tuple[int, int],
) -> Float[Array, "h2 w2 c"]:
  """A square window of an image, resized (bilinear, antialiased) to `size_hw`.

  A point (x, y) of the image lands at (x - corner x) * width / size, and so for y. Corner and size
  may be traced, so that windows of every size share one program.

  Args:
    corner_xy: the window's upper left corner, continuous (x, y), pixels of the image.
    size: side of the window in pixels of the image.
  """
  scale = jnp.array(size_hw, jnp.float32) / size
  return jax.image.scale_and_translate(
    image,
    (*size_hw, image.shape[-1]),
    (0, 1),
    scale,
    -corner_xy[::-1] * scale,
    "linear",
    antialias=True,
  )
