"""Pixels, coordinates and resizes. Every resize that touches a coordinate goes through here.

Convention: coordinates are continuous, the image's corner is (0, 0), the centre of the pixel with
index i is i + 0.5. Names carry the order: `_xy`, `_yx`, `size_hw`. The public release of Opt-CWM
counts in bare indices instead; `rescale_index_yx` and `resize_window` are its way of resizing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from scipy import sparse

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WEIGHTINGS = ("softmax", "linear", "squared")


def normalise(frames: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
  """RGB in [0, 1] to ImageNet-normalised."""
  return (frames - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)


def unnormalise(frames: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
  """ImageNet-normalised to RGB in [0, 1] (not clipped)."""
  return frames * jnp.array(IMAGENET_STD) + jnp.array(IMAGENET_MEAN)


def to_normalised(frames: UInt8[Array, "*b 3"] | Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
  """Frames as a video holds them (uint8) to ImageNet-normalised; floats are taken as that."""
  if jnp.issubdtype(frames.dtype, jnp.floating):
    return frames
  return normalise(frames.astype(jnp.float32) / 255.0)


def prepare_on_host(
  frame: UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"],
  size_hw: tuple[int, int],
  *,
  antialias: bool,
) -> Float32[np.ndarray, "h2 w2 3"]:
  """A frame, as `to_normalised` takes it, normalised and in another size; see `resize_on_host`."""
  small = resize_on_host(frame, size_hw, antialias=antialias)
  if np.issubdtype(frame.dtype, np.floating):
    return small
  return (small / 255.0 - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)


def pixel_centres(h: int, w: int) -> Float[Array, "h w 2"]:
  """(x, y) of every pixel's centre."""
  y, x = jnp.meshgrid(jnp.arange(h) + 0.5, jnp.arange(w) + 0.5, indexing="ij")
  return jnp.stack([x, y], axis=-1)


def scale_points_xy(
  points_xy: Float[Array, "*n 2"], from_hw: Any, to_hw: Any
) -> Float[Array, "*n 2"]:
  """Moves continuous (x, y) from an image of size `from_hw` to the same image at `to_hw`.

  Sizes are (height, width); both may be traced.
  """
  factor = jnp.array([to_hw[1] / from_hw[1], to_hw[0] / from_hw[0]], points_xy.dtype)
  return points_xy * factor


def point_to_index_yx(points_xy: Float[Array, "*n 2"], size_hw: Any) -> Int[Array, "*n 2"]:
  """The (row, column) index of the pixel that holds each (x, y); clamped to the image.

  The size, (height, width), may be traced.
  """
  yx = jnp.floor(points_xy[..., ::-1]).astype(jnp.int32)
  return jnp.clip(yx, 0, jnp.array(size_hw, jnp.int32) - 1)


def index_to_point_xy(index_yx: Array) -> Float[Array, "*n 2"]:
  """The continuous (x, y) of a (row, column) pixel index: its centre."""
  return index_yx[..., ::-1].astype(jnp.float32) + 0.5


def rescale_index_yx(
  index_yx: Int[Array, "*n 2"],
  from_hw: Any,
  to_hw: tuple[int, int],
) -> Int[Array, "*n 2"]:
  """Moves (row, column) indices to another image size as the public release does.

  The index times the ratio of the sizes, truncated and clamped to the image; no half pixels, so
  indices drift towards the corner. Sizes are (height, width); the first may be traced.
  """
  # One float32 ratio and one product, in this order: truncation shows every last bit.
  ratio = jnp.asarray(to_hw, jnp.float32) / jnp.asarray(from_hw, jnp.float32)
  moved = (index_yx.astype(jnp.float32) * ratio).astype(jnp.int32)
  return jnp.clip(moved, 0, jnp.array(to_hw, jnp.int32) - 1)


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


def resize_on_host(
  image: UInt8[np.ndarray, "*b h w c"] | Float[np.ndarray, "*b h w c"],
  size_hw: tuple[int, int],
  *,
  antialias: bool = False,
) -> Float32[np.ndarray, "*b h2 w2 c"]:
  """`resize` in NumPy, to float accuracy: nothing is compiled, whatever the sizes."""
  out = np.asarray(image, np.float32)
  for axis, to_length in zip((-3, -2), size_hw):
    if out.shape[axis] != to_length:
      first = np.moveaxis(out, axis, 0)
      mixed = _linear_weights(len(first), to_length, antialias) @ first.reshape(len(first), -1)
      out = np.moveaxis(mixed.reshape(to_length, *first.shape[1:]), 0, axis)
  return np.ascontiguousarray(out)


@functools.cache
def _linear_weights(length: int, to_length: int, antialias: bool) -> Any:
  """Each new pixel as a weighted sum of the old ones, along one axis, as `jax.image.resize` has it.

  Shrinking with antialias, the triangle is as much wider as the image gets smaller. Sparse: a
  product of full matrices would also wake NumPy's threads, which then stand in the way of JAX's for
  tens of milliseconds.
  """
  step = np.float32(length / to_length)
  place = (np.arange(to_length, dtype=np.float32) + 0.5) * step - 0.5
  away = np.abs(place[:, None] - np.arange(length, dtype=np.float32))
  width = max(step, np.float32(1)) if antialias else np.float32(1)
  weights = np.maximum(0, 1 - away / width)
  return sparse.csr_array(weights / weights.sum(axis=1, keepdims=True))


def resize_corners(
  image: Float[Array, "*b h w c"], size_hw: tuple[int, int]
) -> Float[Array, "*b h2 w2 c"]:
  """Bilinear resize that keeps the corner pixels in the corners (torch's `align_corners=True`)."""

  def weights(length, out_length):
    place = jnp.arange(out_length) * ((length - 1) / max(1, out_length - 1))
    low = jnp.clip(jnp.floor(place), 0, max(0, length - 2))
    share, pixels = (place - low)[:, None], jnp.arange(length)
    return jnp.where(pixels == low[:, None], 1 - share, 0.0) + jnp.where(
      pixels == low[:, None] + 1, share, 0.0
    )

  rows, columns = (weights(*sizes) for sizes in zip(image.shape[-3:-1], size_hw))
  exact = jax.lax.Precision.HIGHEST
  return jnp.einsum("ih,jw,...hwc->...ijc", rows, columns, image, precision=exact)


def resize_window(
  image: Float[Array, "*b h w c"],
  corner_yx: Int[Array, " 2"],
  window: Any,
  size_hw: Any,
  *,
  canvas_hw: tuple[int, int],
) -> Float[Array, "*b h2 w2 c"]:
  """A square or oblong window cut out and then resized, bilinear without antialias.

  As slicing and torch's `F.interpolate`: half-pixel centres, the window's own border goes on
  outside it. All but the canvas may be traced, so that windows of every size share one program.

  Args:
    corner_yx: the window's upper left pixel.
    window: (height, width) of the window in pixels, inside the image.
    size_hw: (height, width) to resize to, at most the canvas; what is left of the canvas is 0.
    canvas_hw: size of the result.
  """

  def weights(start, length, total, out_length, out_total):
    index = jnp.arange(out_total)
    place = (index + 0.5) * (jnp.float32(length) / out_length) - 0.5
    place = jnp.clip(place, 0, length - 1)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.asarray(length, jnp.int32) - 1)
    share = (place - low)[:, None]
    pixels = jnp.arange(total) - start
    near, far = pixels == low[:, None], pixels == high[:, None]
    return jnp.where(index[:, None] < out_length, (1 - share) * near + share * far, 0.0)

  h, w = image.shape[-3:-1]
  rows = weights(corner_yx[0], window[0], h, size_hw[0], canvas_hw[0])
  cols = weights(corner_yx[1], window[1], w, size_hw[1], canvas_hw[1])
  # The full precision of float32 on every device, as `jax.image.resize` has it.
  exact = jax.lax.Precision.HIGHEST
  tall = jnp.einsum("ih,...hwc->...iwc", rows, image, precision=exact)
  return jnp.einsum("jw,...iwc->...ijc", cols, tall, precision=exact)


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


def warp_inside(
  image: Float[Array, "h w c"], flow_xy: Float[Array, "h w 2"]
) -> Float[Array, "h w c"]:
  """As `warp_backward`, but what lies outside the image is 0 (torch's `grid_sample`)."""
  h, w = flow_xy.shape[:2]
  # A frame of zeros one pixel wide; beyond it there is nothing to tell apart.
  padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
  return sample_bilinear(padded, pixel_centres(h, w) + flow_xy + 1.0)


def round_trip(
  flow_xy: Float[Array, "*b h w 2"],
  back_xy: Float[Array, "*b h w 2"],
  *,
  threshold: float = 6.0,
  relative: bool = False,
) -> tuple[Float[Array, "*b h w"], Bool[Array, "*b h w"]]:
  """How far each pixel lands from itself, forward by one flow and back by the other.

  Args:
    flow_xy: from frame 1 to frame 2.
    back_xy: from frame 2 to frame 1; 0 outside the frame.
    threshold: absolute, in pixels; or a share of the squared lengths of both flows.
    relative: the squared distance may be `threshold` times the squared lengths, and 0.5 more.

  Returns:
    Distance over what is allowed (squares of both when relative), and whether the pixel is within
    it, that is, not occluded in frame 2.
  """
  warped = jnp.vectorize(warp_inside, signature="(h,w,c),(h,w,d)->(h,w,c)")(back_xy, flow_xy)
  squared = jnp.sum((flow_xy + warped) ** 2, axis=-1)
  if relative:
    lengths = jnp.sum(flow_xy**2, axis=-1) + jnp.sum(warped**2, axis=-1)
    ratio = squared / (threshold * lengths + 0.5)
  else:
    ratio = jnp.sqrt(squared) / threshold
  return ratio, ratio <= 1.0


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


def near(
  index_yx: Int[Array, "*b 2"], size_hw: tuple[int, int], *, radius: int
) -> Bool[Array, "*b h w"]:
  """The pixels within `radius` rows and columns of a (row, column) index."""
  rows = jnp.abs(jnp.arange(size_hw[0]) - index_yx[..., :1]) <= radius
  cols = jnp.abs(jnp.arange(size_hw[1]) - index_yx[..., 1:]) <= radius
  return rows[..., :, None] & cols[..., None, :]


def heat_distribution(
  heat: Float[Array, "*b h w"], *, weighting: str = "softmax", inverse_temperature: float = 200.0
) -> Float[Array, "*b h w"]:
  """A heat map turned into probabilities over its pixels.

  Args:
    heat: not negative.
    weighting: "softmax" of inverse_temperature * heat, "linear" (heat over its sum) or "squared"
      (its square over the sum of squares).

  Raises:
    ValueError: an unknown weighting.
  """
  if weighting not in WEIGHTINGS:
    raise ValueError(f"the weighting is {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
  if weighting == "softmax":
    return jax.nn.softmax(inverse_temperature * heat, axis=(-2, -1))
  if weighting == "squared":
    heat = heat**2
  return heat / jnp.sum(heat, axis=(-2, -1), keepdims=True)


def mean_yx(weights: Float[Array, "*b h w"]) -> Float[Array, "*b 2"]:
  """Expected (row, column) index under probabilities over pixels."""
  h, w = weights.shape[-2:]
  row = jnp.sum(weights * jnp.arange(h, dtype=weights.dtype)[:, None], axis=(-2, -1))
  col = jnp.sum(weights * jnp.arange(w, dtype=weights.dtype), axis=(-2, -1))
  return jnp.stack([row, col], axis=-1)


def spread(weights: Float[Array, "*b h w"]) -> Float[Array, "*b"]:
  """Root mean square distance, in pixels, from the mean under probabilities over pixels."""
  h, w = weights.shape[-2:]
  mean = mean_yx(weights)[..., None, None, :]
  squared = (jnp.arange(h)[:, None] - mean[..., 0]) ** 2 + (jnp.arange(w) - mean[..., 1]) ** 2
  return jnp.sqrt(jnp.sum(weights * squared, axis=(-2, -1)))


def soft_argmax_yx(
  heat: Float[Array, "*b h w"], *, weighting: str = "softmax", inverse_temperature: float = 200.0
) -> Float[Array, "*b 2"]:
  """Expected (row, column) index under `heat_distribution`; differentiable."""
  return mean_yx(
    heat_distribution(heat, weighting=weighting, inverse_temperature=inverse_temperature)
  )


def window_argmax_yx(
  heat: Float[Array, "*b h w"], *, radius: int = 3, power: float = 2.0
) -> Float[Array, "*b 2"]:
  """Sub-pixel (row, column) index: the mean of heat ** power in a window round the maximum."""
  h, w = heat.shape[-2:]
  peak = argmax_yx(heat)
  inside = near(peak, (h, w), radius=radius)
  top = jnp.max(heat, axis=(-2, -1), keepdims=True)
  weights = jnp.where(inside, (heat / jnp.maximum(top, 1e-12)) ** power, 0.0)
  # An all-zero heat map has its "maximum" at (0, 0); give that answer, not a division by zero.
  total = jnp.sum(weights, axis=(-2, -1))
  safe = jnp.maximum(total, 1e-12)
  row = jnp.sum(weights * jnp.arange(h)[:, None], axis=(-2, -1)) / safe
  col = jnp.sum(weights * jnp.arange(w), axis=(-2, -1)) / safe
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
