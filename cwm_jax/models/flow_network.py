"""What RAFT and SEA-RAFT have in common: sizes, the way in and out, resizes and padding.

A network works on features at an eighth of the frames' size, which it pads to a multiple of 8; it
starts from some flow and improves it for a number of iterations.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax import geometry
from cwm_jax.models import correlation
from cwm_jax.models.flow_encoders import Encoder
from cwm_jax.types import FlowEstimate

STRIDE = 8
PADDINGS = ("split", "bottom")


class FlowNetwork(nn.Module):
  """Dense flow between two frames; `Raft` and `SeaRaft` fill in the middle.

  Attributes:
    stem_width, widths, depths, block: of both encoders, see `Encoder`.
    feature_norm, context_norm: of the encoder of features and of that of context.
    feature_width: channels of the features that are correlated.
    hidden_width, context_width: channels that the iterations change, and that they only read.
    corr_widths, flow_widths, motion_width: see `MotionEncoder`.
    head_width: channels inside the heads.
    radius, levels: of the correlation's windows and pyramid.
    iterations: unless a call says otherwise.
    correlation: one of `correlation.WAYS`.
    padding: "split" between both sides, or rows at the "bottom" only; by repeated border pixels.
    scale: the network sees frames 2^scale times their size.
    image_hw: the network sees frames at this size, whatever theirs; () leaves that to `scale`.
    remat: recompute each iteration in the backward pass.
    dtype: of convolutions; correlations, flow and heads' outputs stay float32.
  """

  stem_width: int
  widths: tuple[int, int, int]
  depths: tuple[int, int, int]
  feature_width: int
  hidden_width: int
  context_width: int
  corr_widths: tuple[int, ...]
  flow_widths: tuple[int, int]
  motion_width: int
  head_width: int
  block: str = "residual"
  feature_norm: str = "instance"
  context_norm: str = "batch"
  radius: int = 4
  levels: int = 4
  iterations: int = 12
  correlation: str = "auto"
  padding: str = "split"
  scale: int = 0
  image_hw: tuple[int, ...] = ()
  remat: bool = False
  dtype: jnp.dtype = jnp.float32

  def __call__(
    self,
    frames: Float[Array, "b 2 h w 3"],
    *,
    iterations: int | None = None,
    every: bool = False,
  ) -> FlowEstimate:
    """Flow from frame 1 to frame 2.

    Args:
      frames: RGB in [0, 1], of any size.
      iterations: None takes the network's own number.
      every: return the flow after every iteration, which training needs, instead of the last.

    Returns:
      flow_xy [b, h, w, 2], pixels of the frames; info [b, h, w, 4], see `FlowEstimate`, or None.
      With `every` both begin with an axis of the estimates in order.
    """
    h, w = frames.shape[2:4]
    count = self.iterations if iterations is None else iterations
    images = 2.0 * frames.astype(jnp.float32) - 1.0
    if self.image_hw:
      images = geometry.resize(images, tuple(self.image_hw), antialias=True)
    elif self.scale:
      factor = 2.0**self.scale
      images = geometry.resize(images, (max(1, int(h * factor)), max(1, int(w * factor))))
    seen_hw = images.shape[2:4]
    rows, columns = pad_amounts(seen_hw, self.padding)
    images = jnp.pad(images, ((0, 0), (0, 0), rows, columns, (0, 0)), mode="edge")
    estimate = self.estimate(images[:, 0], images[:, 1], count, every)

    def back(image):
      image = image[..., rows[0] : rows[0] + seen_hw[0], columns[0] : columns[0] + seen_hw[1], :]
      return geometry.resize(image, (h, w))

    ratio = jnp.array([w / seen_hw[1], h / seen_hw[0]], jnp.float32)
    info = None if estimate.info is None else back(estimate.info)
    return FlowEstimate(back(estimate.flow_xy) * ratio, info)

  def estimate(
    self,
    first: Float[Array, "b h w 3"],
    second: Float[Array, "b h w 3"],
    iterations: int,
    every: bool,
  ) -> FlowEstimate:
    """As `__call__` for images in [-1, 1] whose sides divide by 8."""
    raise NotImplementedError

  def encoder(self, out_width: int, norm: str) -> Encoder:
    """An encoder of this network's sizes."""
    return Encoder(
      stem_width=self.stem_width,
      widths=self.widths,
      depths=self.depths,
      out_width=out_width,
      block=self.block,
      norm=norm,
      dtype=self.dtype,
    )

  def correlate(
    self, first: Float[Array, "b h w c"], second: Float[Array, "b h w c"]
  ) -> correlation.Correlation:
    """See `correlation.correlate`."""
    return correlation.correlate(first, second, levels=self.levels, way=self.correlation)

  def look_up(
    self, correlated: correlation.Correlation, flow_xy: Float[Array, "b h w 2"]
  ) -> Float[Array, "b h w n"]:
    """The correlations round where a flow leads."""
    here = geometry.pixel_centres(*flow_xy.shape[1:3]) - 0.5
    return correlation.look_up(correlated, here + flow_xy, radius=self.radius)

  def repeat(self, step, carry, length: int):
    """`lax.scan` of `step(self, carry, None) -> (carry, out)` with this network's parameters."""
    if self.is_initializing():  # parameters are made outside the loop
      return step(self, carry, None)
    if self.remat:
      step = nn.remat(step, prevent_cse=False)
    looped = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, length=length)
    return looped(self, carry, None)


def pad_amounts(size_hw: tuple[int, int], padding: str) -> tuple[tuple[int, int], tuple[int, int]]:
  """How many ((rows above, below), (columns left, right)) make both sides divide by 8.

  Raises:
    ValueError: an unknown padding.
  """
  if padding not in PADDINGS:
    raise ValueError(f"the padding is {padding!r}; choose one of {', '.join(PADDINGS)}")
  rows, columns = (-side % STRIDE for side in size_hw)
  top = rows // 2 if padding == "split" else 0
  return (top, rows - top), (columns // 2, columns - columns // 2)
