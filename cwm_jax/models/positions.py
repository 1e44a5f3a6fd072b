"""Position tables of both frames, [2n, c], frame 1 first, each frame's patches in raster order.

Learned tables belong to one grid of patches; `resize_positions` fits them to another as the public
release does (PyTorch's bicubic interpolation, which differs from `jax.image.resize`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The side of the images, in pixels, that the released position tables were made for.
RELEASE_IMAGE_SIDE = 256


def token_sine_positions(count: int, width: int) -> Float[Array, "count width"]:
  """Fixed sine and cosine table over the running number of a token, in both frames.

  Channels 2i and 2i + 1 are sine and cosine of the number / 10000 ** (2i / width): the table of the
  two-frame CWM releases, which do not store it.
  """
  channel = np.arange(width)
  angles = np.arange(count)[:, None] / 10000.0 ** (2 * (channel // 2) / width)
  return jnp.asarray(np.where(channel % 2, np.cos(angles), np.sin(angles)), jnp.float32)


def resize_positions(
  positions: Float[Array, "n2 c"],
  from_hw: tuple[int, int],
  to_hw: tuple[int, int],
) -> Float[Array, "m2 c"]:
  """Fits a table of both frames to another grid; each frame by itself.

  Bicubic with a = -0.75, patches as pixels with half-pixel centres, border values going on outside,
  no averaging when shrinking, weights as they are: PyTorch's `interpolate(mode="bicubic")`.

  Args:
    positions: table for 2 frames of `from_hw` patches.
    from_hw, to_hw: patches per column and per row.

  Returns:
    A table for 2 frames of `to_hw` patches; `positions` itself where the grids are the same.

  Raises:
    ValueError: a table of another length than 2 frames of `from_hw` patches.
  """
  if positions.shape[0] != 2 * from_hw[0] * from_hw[1]:
    raise ValueError(
      f"a position table of {positions.shape[0]} tokens is not for 2 frames of "
      f"{from_hw[0]} x {from_hw[1]} patches"
    )
  if tuple(from_hw) == tuple(to_hw):
    return positions
  table = positions.reshape(2, *from_hw, -1)
  rows, columns = (_cubic_weights(old, new) for old, new in zip(from_hw, to_hw))
  # Positions are parameters: keep accelerators from rounding them in the product.
  exact = jax.lax.Precision.HIGHEST
  table = jnp.einsum("yh,fhwc->fywc", rows, table, precision=exact)
  table = jnp.einsum("xw,fywc->fyxc", columns, table, precision=exact)
  return table.reshape(2 * to_hw[0] * to_hw[1], -1)


def release_positions(
  positions: Float[Array, "n2 c"], to_hw: tuple[int, int]
) -> Float[Array, "m2 c"]:
  """`resize_positions` with the public release's quirks, for parity.

  A table is taken for a square grid, and returned as it is wherever its number of tokens fits, even
  on a grid of another shape.
  """
  if positions.shape[0] == 2 * to_hw[0] * to_hw[1]:
    return positions
  side = int((positions.shape[0] / 2) ** 0.5)
  return resize_positions(positions, (side, side), to_hw)


def release_grid(patch: int, scale: int) -> tuple[int, int]:
  """The grid that the public release resizes to at `scale`, whatever the image's size."""
  side = int(RELEASE_IMAGE_SIDE // patch * scale)
  return side, side


def _cubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
  """Each new sample as a weighted sum of the old ones; weights of the border pile up on it."""
  a = -0.75
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  first = np.floor(centre).astype(int) - 1
  weights = np.zeros((new, old))
  for tap in range(4):
    x = np.abs(centre - (first + tap))
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    at = np.clip(first + tap, 0, old - 1)
    np.add.at(weights, (np.arange(new), at), np.where(x <= 1, near, far))
  return weights.astype(np.float32)
