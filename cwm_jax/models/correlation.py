"""How alike each place of frame 1 is to the places of frame 2 round where it is thought to be.

Two ways to the same numbers. All pairs: every dot product once, in memory that grows with the
square of the pixels. On demand: only those looked up, anew in every iteration, in memory that grows
with the pixels.

Places are bare indices (x, y) of the feature maps. Level i of the pyramid is frame 2's features
averaged over 2^i x 2^i; an odd last row or column is dropped on the way, as the released networks
do, and a level without a single pixel says 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

WAYS = ("auto", "all_pairs", "on_demand")
# "auto" takes all pairs up to this size of the volume, in bytes.
_LARGEST_VOLUME = 2**30
# Pixels of frame 1 whose windows are gathered at once: 26 MB at radius 4 and 256 channels.
_CHUNK = 256
# The full precision of float32 on every device: both ways must give the same numbers.
_EXACT = jax.lax.Precision.HIGHEST


class Correlation(NamedTuple):
  """What a lookup reads.

  levels: all pairs: float32 [b, h w, h_i w_i], dot products; on demand: features [b h_i w_i, c].
  sizes:  (h_i, w_i) of each level.
  first:  None, or on demand frame 1's features [b, h w, c], divided by sqrt(c).
  """

  levels: tuple[Array, ...]
  sizes: tuple[tuple[int, int], ...]
  first: Array | None


def correlate(
  first: Float[Array, "b h w c"],
  second: Float[Array, "b h w c"],
  *,
  levels: int = 4,
  way: str = "auto",
) -> Correlation:
  """Prepares lookups between two feature maps.

  Args:
    first, second: features of the two frames.
    levels: of the pyramid.
    way: one of `WAYS`.

  Raises:
    ValueError: an unknown way.
  """
  if way not in WAYS:
    raise ValueError(f"the correlation is {way!r}; choose one of {', '.join(WAYS)}")
  b, h, w, c = first.shape
  if way == "auto":
    way = "all_pairs" if 4 * b * (h * w) ** 2 * 4 // 3 <= _LARGEST_VOLUME else "on_demand"
  features = first.reshape(b, h * w, c).astype(jnp.float32) * c**-0.5
  second = second.astype(jnp.float32)
  pyramid, sizes = [], []
  for _ in range(levels):
    sizes.append(second.shape[1:3])
    flat = second.reshape(b, -1, c)
    if way == "all_pairs":
      pyramid.append(jnp.einsum("bnc,bmc->bnm", features, flat, precision=_EXACT))
    else:
      pyramid.append(flat.reshape(-1, c))
    second = _halve(second)
  return Correlation(tuple(pyramid), tuple(sizes), features if way == "on_demand" else None)


def look_up(
  correlation: Correlation, places_xy: Float[Array, "b h w 2"], *, radius: int
) -> Float[Array, "b h w n"]:
  """Correlations in a window round each place, on every level; bilinear, 0 outside the frame.

  Args:
    places_xy: where each pixel of frame 1 is in frame 2, bare indices of the feature map.
    radius: the window has 2 radius + 1 places a side.

  Returns:
    Level by level, (2 radius + 1)^2 channels each: the slow index moves along x, the fast one along
    y, which is what the released weights were trained on.
  """
  b, h, w, _ = places_xy.shape
  places_xy = places_xy.reshape(b, h * w, 2)
  found = []
  for i, (level, size_hw) in enumerate(zip(correlation.levels, correlation.sizes)):
    if 0 in size_hw:
      found.append(jnp.zeros((b, h * w, (2 * radius + 1) ** 2)))
      continue
    where_xy = places_xy / 2**i
    if correlation.first is None:
      found.append(_in_volume(level, where_xy, size_hw, radius))
    else:
      found.append(_by_chunks(correlation.first, level, where_xy, size_hw, radius))
  return jnp.concatenate(found, axis=-1).reshape(b, h, w, -1)


def _halve(image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """The mean over 2 x 2 pixels; an odd last row or column is dropped."""
  b, h, w, c = image.shape
  even = image[:, : h // 2 * 2, : w // 2 * 2]
  return even.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class _Window(NamedTuple):
  """The pixels that a window's samples lie between: one more a side than there are samples.

  index:  int32 [..., p, p], of the pixel in a flattened map; the slow axis is x.
  inside: bool [..., p, p].
  share_xy: float32 [..., 2], how far the samples lie from their left and upper pixel.
  """

  index: Array
  inside: Array
  share_xy: Array


def _window(places_xy: Float[Array, "*n 2"], size_hw: tuple[int, int], radius: int) -> _Window:
  h, w = size_hw
  corner_xy = jnp.floor(places_xy)
  # Far outside is as good as just outside, and a diverging network must not overflow an integer.
  low_xy = jnp.clip(corner_xy, -radius - 2.0, jnp.array([w, h], jnp.float32) + radius)
  low_xy = low_xy.astype(jnp.int32)
  offsets = jnp.arange(-radius, radius + 2)
  x, y = low_xy[..., :1] + offsets, low_xy[..., 1:] + offsets
  in_x, in_y = (x >= 0) & (x < w), (y >= 0) & (y < h)
  index = jnp.clip(y, 0, h - 1)[..., None, :] * w + jnp.clip(x, 0, w - 1)[..., :, None]
  return _Window(index, in_x[..., :, None] & in_y[..., None, :], places_xy - corner_xy)


def _blend(values: Array, window: _Window) -> Array:
  """Bilinear samples, [..., (p - 1)^2], between values at a window's pixels, [..., p, p]."""
  values = jnp.where(window.inside, values, 0.0)
  share_x, share_y = window.share_xy[..., 0, None, None], window.share_xy[..., 1, None, None]
  values = values[..., :-1, :] * (1 - share_x) + values[..., 1:, :] * share_x
  values = values[..., :-1] * (1 - share_y) + values[..., 1:] * share_y
  return values.reshape(*values.shape[:-2], -1)


def _in_volume(volume: Any, places_xy: Any, size_hw: tuple[int, int], radius: int) -> Array:
  window = _window(places_xy, size_hw, radius)
  index = window.index.reshape(*window.index.shape[:-2], -1)
  values = jnp.take_along_axis(volume, index, axis=-1, mode="promise_in_bounds")
  return _blend(values.reshape(window.index.shape), window)


def _by_chunks(
  first: Any, level: Any, places_xy: Any, size_hw: tuple[int, int], radius: int
) -> Array:
  b, n, c = first.shape
  count = b * n
  size = min(_CHUNK, count)
  chunks = -(-count // size)

  def in_chunks(array):
    flat = array.reshape(count, *array.shape[2:])
    padded = jnp.pad(flat, ((0, chunks * size - count), *[(0, 0)] * (flat.ndim - 1)))
    return padded.reshape(chunks, size, *flat.shape[1:])

  # Recomputed in the backward pass: what is gathered is what must not all be kept.
  @jax.checkpoint
  def look(chunk):
    features, where_xy, image = chunk
    window = _window(where_xy, size_hw, radius)
    index = window.index + image[:, None, None] * (size_hw[0] * size_hw[1])
    values = jnp.einsum("nc,npqc->npq", features, level[index], precision=_EXACT)
    return _blend(values, window)

  image = jnp.broadcast_to(jnp.arange(b)[:, None], (b, n))
  found = jax.lax.map(look, (in_chunks(first), in_chunks(places_xy), in_chunks(image)))
  return found.reshape(chunks * size, -1)[:count].reshape(b, n, -1)
