"""Learned marks: 18 numbers become three Gaussians, which are drawn and added to frame 1.

The numbers come from a network that reads the token of the query's patch (the paper's MLP_theta);
`GaussianMark` joins it to the rest and has the form of every mark, see `perturb`. Everything else
is a pure function of numbers, differentiable from the marked frame back to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cwm_jax import geometry
from cwm_jax.types import GaussianParams

# At a correlation of 1 the Gaussian is a line, and its density is infinite.
_MAX_CORRELATION = 0.98
_MIN_STD = 1.0


def gaussian_params(
  numbers: Float[Array, "*b 18"], *, size: int = 20, reach: float = 1.0
) -> GaussianParams:
  """What the numbers say.

  Args:
    numbers: in [-1, 1]; for each colour channel mean (row, column), width (row, column),
      correlation and amplitude.
    size: side of the mark's grid in pixels; widths reach to half of it.
    reach: means reach to this share of the way from its middle to its edges.
  """
  x = numbers.reshape(*numbers.shape[:-1], 3, 6)
  half = size / 2
  return GaussianParams(
    mean_yx=x[..., 0:2] * half * reach,
    std_yx=(x[..., 2:4] + 1) * (half - _MIN_STD) / 2 + _MIN_STD,
    correlation=x[..., 4] * _MAX_CORRELATION,
    amplitude=x[..., 5],
  )


def draw(params: GaussianParams, *, size: int = 20) -> Float[Array, "*b size size 3"]:
  """The mark, in normalised units: each channel's density, scaled to peak at its amplitude.

  The peak is the greatest value on the grid, not the density's own. The grid's points run from
  -size / 2 to size / 2 with both ends, so they lie size / (size - 1) apart; of an odd size the
  middle one is at 0, of an even size none is.
  """
  points = jnp.linspace(-size / 2, size / 2, size)
  from_mean = points - params.mean_yx[..., None]  # [..., 3, 2, size]
  rows, columns = jnp.moveaxis(from_mean / params.std_yx[..., None], -2, 0)
  rows, columns = rows[..., :, None], columns[..., None, :]
  correlation = params.correlation[..., None, None]
  squared = (rows**2 - 2 * correlation * rows * columns + columns**2) / (1 - correlation**2)
  # Taking the nearest point's distance off first gives the ratio to the peak without underflow. It
  # is looked up by its index: the gradient of a minimum asks which values equal it, and under jit
  # those may have been computed a second time, with other last bits.
  flat = squared.reshape(*squared.shape[:-2], size * size)
  nearest = jnp.take_along_axis(flat, jnp.argmin(flat, axis=-1, keepdims=True), axis=-1)
  mark = params.amplitude[..., None, None] * jnp.exp((nearest[..., None] - squared) / 2)
  return jnp.moveaxis(mark, -3, -1)


def enlarge(mark: Float[Array, "*b s s 3"], scale: int) -> Float[Array, "*b t t 3"]:
  """Repeats each pixel `scale` times along both sides: the mark for images so much larger."""
  return jnp.repeat(jnp.repeat(mark, scale, axis=-3), scale, axis=-2)


def add_at(
  frame: Float[Array, "h w 3"], mark: Float[Array, "s s 3"], centre_yx: Int[Array, " 2"]
) -> Float[Array, "h w 3"]:
  """Adds the mark to the frame; what reaches over the border is cut off.

  Args:
    centre_yx: (row, column) index of the pixel it is laid on: it covers s rows from row - s // 2
      on, and columns likewise. So an odd mark's middle is the pixel's centre, an even one's is its
      upper left corner.
  """
  h, w = frame.shape[:2]
  size = mark.shape[0]
  canvas = jnp.zeros((h + 2 * size, w + 2 * size, 3), frame.dtype)
  start = jnp.clip(centre_yx, 0, jnp.array([h, w]) - 1) - size // 2 + size
  canvas = jax.lax.dynamic_update_slice(
    canvas, mark.astype(frame.dtype), (start[0], start[1], jnp.zeros_like(start[0]))
  )
  return frame + canvas[size : size + h, size : size + w]


@dataclass(frozen=True)
class GaussianMark:
  """The learned mark; `jax.tree_util.Partial(GaussianMark(...), params)` is a mark of `perturb`.

  Attributes:
    perturber: a module whose `apply({"params": params}, token)` gives the 18 numbers.
    size: side of the grid in pixels of the image that the perturber was trained on.
    scale: how many times larger the predictor's image is than that.
    on_pixel: the mark's grid is laid on the pixel that holds the query (the release's way), see
      `add_at` for where its middle is; else its Gaussians count from the query itself.
    reach: how far from there their means may lie, as a share of half the grid; 1 in the release. A
      mark beside its query offsets the flow, and a Psi-flow that is trained with it gets used to
      that.
  """

  perturber: Any
  size: int = 20
  scale: int = 1
  on_pixel: bool = True
  reach: float = 1.0
  reads_token: ClassVar[bool] = True

  @property
  def middle(self) -> float:
    """Where in the query's pixel the flow counts from, see `perturb.middle`.

    It is where the mark's middle lies; but of an even grid, as the release's is, the pixel's
    centre, from which the flow that its marks were trained by was counted.
    """
    return 0.5 if self._is_centred or not self.size % 2 else 0.0

  @property
  def _is_centred(self) -> bool:
    """Whether the mark's middle is its pixel's centre and not its corner, see `add_at`."""
    return self.size * self.scale % 2 == 1

  def __call__(
    self,
    params: Any,
    frame1: Float[Array, "h w 3"],
    point_xy: Float[Array, " 2"],
    token: Float[Array, " c"],
  ) -> Float[Array, "h w 3"]:
    """Frame 1 (normalised) with the mark that suits `token`, laid on the query.

    Args:
      params: the perturber's.
      point_xy: continuous (x, y), pixels of `frame1`.
      token: the encoder's output at the query's patch in the clean pass.
    """
    numbers = self.perturber.apply({"params": params}, token)
    told = gaussian_params(numbers, size=self.size, reach=self.reach)
    pixel_yx = geometry.point_to_index_yx(point_xy, frame1.shape[:2])
    if not self.on_pixel:
      # From the grid's middle, see `add_at`, in pixels of the grid.
      middle = 0.5 if self._is_centred else 0.0
      inside_yx = (point_xy[::-1] - middle - pixel_yx) / self.scale
      # In steps of the mark's grid, of which there are size - 1 for `size` pixels.
      inside_yx = inside_yx * self.size / (self.size - 1)
      told = told._replace(mean_yx=told.mean_yx + inside_yx)
    mark = enlarge(draw(told, size=self.size), self.scale)
    return add_at(frame1, mark, pixel_yx)
