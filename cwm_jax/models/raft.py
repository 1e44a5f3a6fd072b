"""RAFT (Teed and Deng, 2020), large and small: flow from nothing, improved by a recurrent unit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax import geometry
from cwm_jax.models.flow_network import STRIDE, FlowNetwork
from cwm_jax.models.flow_updates import ConvGRU, Head, MotionEncoder, upsample_convex
from cwm_jax.types import FlowEstimate

UPSAMPLINGS = ("convex", "bilinear")


class Raft(FlowNetwork):
  """The context of frame 1 starts the hidden state; the flow starts at 0.

  Attributes:
    gru: one of `flow_updates.GRUS`.
    upsampling: "convex" by learned weights, or "bilinear".
  """

  gru: str = "separable"
  upsampling: str = "convex"

  def setup(self):
    if self.upsampling not in UPSAMPLINGS:
      choices = ", ".join(UPSAMPLINGS)
      raise ValueError(f"the upsampling is {self.upsampling!r}; choose one of {choices}")
    self.feature_encoder = self.encoder(self.feature_width, self.feature_norm)
    self.context_encoder = self.encoder(self.hidden_width + self.context_width, self.context_norm)
    self.motion_encoder = MotionEncoder(
      self.corr_widths, self.flow_widths, self.motion_width, dtype=self.dtype
    )
    self.update = ConvGRU(self.gru, dtype=self.dtype)
    self.flow_head = Head(self.head_width, 2, dtype=self.dtype)
    if self.upsampling == "convex":
      self.upsample_head = Head(2 * self.hidden_width, 9 * STRIDE**2, (1, 1), dtype=self.dtype)

  def estimate(
    self,
    first: Float[Array, "b h w 3"],
    second: Float[Array, "b h w 3"],
    iterations: int,
    every: bool,
  ) -> FlowEstimate:
    features = self.feature_encoder(jnp.concatenate([first, second]))
    correlated = self.correlate(*jnp.split(features, 2))
    context = self.context_encoder(first)
    hidden = jnp.tanh(context[..., : self.hidden_width])
    context = jax.nn.relu(context[..., self.hidden_width :])

    def step(self, carry, _):
      flow_xy, hidden = carry
      flow_xy = jax.lax.stop_gradient(flow_xy)
      motion = self.motion_encoder(self.look_up(correlated, flow_xy), flow_xy)
      hidden = self.update(hidden, jnp.concatenate([context, motion], axis=-1))
      flow_xy += self.flow_head(hidden)
      return (flow_xy, hidden), self._enlarge(flow_xy, hidden) if every else None

    start = jnp.zeros((*hidden.shape[:3], 2))
    (flow_xy, hidden), estimates = self.repeat(step, (start, hidden), iterations)
    return FlowEstimate(estimates if every else self._enlarge(flow_xy, hidden))

  def _enlarge(self, flow_xy, hidden):
    """The flow at the frames' size and in their pixels."""
    if self.upsampling == "convex":
      return upsample_convex(STRIDE * flow_xy, 0.25 * self.upsample_head(hidden), factor=STRIDE)
    h, w = flow_xy.shape[1:3]
    return geometry.resize_corners(STRIDE * flow_xy, (STRIDE * h, STRIDE * w))
