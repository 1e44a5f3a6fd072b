"""SEA-RAFT (Wang, Lipson and Deng, 2024): a first flow from the context, then ConvNeXt updates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax.models.flow_encoders import conv
from cwm_jax.models.flow_network import STRIDE, FlowNetwork
from cwm_jax.models.flow_updates import ConvNeXtBlock, Head, MotionEncoder, upsample_convex
from cwm_jax.types import FlowEstimate


class SeaRaft(FlowNetwork):
  """The context of both frames together tells a first flow; `info` says how sure each flow is.

  There is one estimate more than iterations.

  Attributes:
    refine_blocks: ConvNeXt blocks of an iteration.
  """

  refine_blocks: int = 2

  def setup(self):
    self.context_encoder = self.encoder(self.hidden_width + self.context_width, self.context_norm)
    self.feature_encoder = self.encoder(self.feature_width, self.feature_norm)
    self.context_conv = conv(self.hidden_width + self.context_width, (3, 3), dtype=self.dtype)
    self.motion_encoder = MotionEncoder(
      self.corr_widths, self.flow_widths, self.motion_width, dtype=self.dtype
    )
    self.refine = [
      ConvNeXtBlock(self.hidden_width, 4 * self.hidden_width, dtype=self.dtype)
      for _ in range(self.refine_blocks)
    ]
    self.flow_head = Head(self.head_width, 6, dtype=self.dtype)
    self.upsample_head = Head(2 * self.hidden_width, 9 * STRIDE**2, (1, 1), dtype=self.dtype)

  def estimate(
    self,
    first: Float[Array, "b h w 3"],
    second: Float[Array, "b h w 3"],
    iterations: int,
    every: bool,
  ) -> FlowEstimate:
    context = self.context_conv(self.context_encoder(jnp.concatenate([first, second], axis=-1)))
    hidden, context = context[..., : self.hidden_width], context[..., self.hidden_width :]
    told = self.flow_head(hidden)
    carry = (told[..., :2], told[..., 2:], hidden)
    initial = self._enlarge(*carry) if every or not iterations else None
    if not iterations and not self.is_initializing():
      return jax.tree.map(lambda x: x[None], initial) if every else initial
    features = self.feature_encoder(jnp.concatenate([first, second]))
    correlated = self.correlate(*jnp.split(features, 2))

    def step(self, carry, _):
      flow_xy, _, hidden = carry
      flow_xy = jax.lax.stop_gradient(flow_xy)
      motion = self.motion_encoder(self.look_up(correlated, flow_xy), flow_xy)
      for block in self.refine:
        hidden = block(jnp.concatenate([hidden, context, motion], axis=-1))
      told = self.flow_head(hidden)
      carry = (flow_xy + told[..., :2], told[..., 2:], hidden)
      return carry, self._enlarge(*carry) if every else None

    carry, estimates = self.repeat(step, carry, iterations)
    if not every or self.is_initializing():
      return self._enlarge(*carry)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), initial, estimates)

  def _enlarge(self, flow_xy, info, hidden) -> FlowEstimate:
    """Flow in the frames' pixels, and what is said of it, at the frames' size."""
    both = jnp.concatenate([STRIDE * flow_xy, info], axis=-1)
    both = upsample_convex(both, 0.25 * self.upsample_head(hidden), factor=STRIDE)
    return FlowEstimate(both[..., :2], both[..., 2:])
