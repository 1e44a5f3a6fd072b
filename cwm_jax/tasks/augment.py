"""Augmentations of frame pairs with labelled points: points move with the pixels they lie on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cwm_jax import geometry


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """How far pairs are changed; every range is symmetric about "as it was".

  Attributes:
    turn_over: mirror and turn by right angles, and exchange the frames, each as often as not.
    turn: radians, of both frames alike.
    zoom: of both frames alike, the logarithm.
    shift: of both frames alike, as a share of the image's side.
    motion: frame 2 moves by up to this share of the image's side more than frame 1, and turns and
      zooms by as much; labels say so.
    light: change of gain and of offset, of each channel; frames differ by a third of it.
    noise: standard deviation.
  """

  turn_over: bool = True
  turn: float = 0.15
  zoom: float = 0.15
  shift: float = 0.05
  motion: float = 0.08
  light: float = 0.15
  noise: float = 0.02

  def __call__(
    self,
    key: Array,
    frames: Float[Array, "2 h w 3"],
    points_xy: Float[Array, "n 2"],
    flow_xy: Float[Array, "n 2"],
  ) -> tuple[Float[Array, "2 h w 3"], Float[Array, "n 2"], Float[Array, "n 2"], Bool[Array, " n"]]:
    """One pair changed at random.

    Args:
      key: of this pair.
      frames: RGB in [0, 1].
      points_xy, flow_xy: pixels of frame 1; from there to frame 2.

    Returns:
      (frames, points_xy, flow_xy, inside): inside is False where a point or its end left the frame.
    """
    h, w = frames.shape[1:3]
    keys = jax.random.split(key, 4)
    ends = jnp.stack([points_xy, points_xy + flow_xy])
    if self.turn_over:
      swap = jax.random.bernoulli(keys[0])
      frames, ends = (jnp.where(swap, both[::-1], both) for both in (frames, ends))
    middle = jnp.array([w / 2, h / 2])
    maps = self._maps(keys[1], min(h, w))
    # A map says where a pixel goes; pictures are drawn by asking where each pixel comes from.
    back = jnp.linalg.inv(maps[:, :, :2])
    here = geometry.pixel_centres(h, w) - middle

    def draw(frame, matrix, shift):
      from_xy = jnp.einsum("ij,hwj->hwi", matrix, here - shift) + middle
      return geometry.sample_bilinear(frame, from_xy)

    frames = jax.vmap(draw)(frames, back, maps[:, :, 2])
    ends = jnp.einsum("fij,fnj->fni", maps[:, :, :2], ends - middle) + maps[:, None, :, 2] + middle
    inside = jnp.all((ends >= 0) & (ends <= jnp.array([w, h])), axis=(0, 2))
    return self._relight(keys[2:], frames), ends[0], ends[1] - ends[0], inside

  def _maps(self, key: Array, side: int) -> Float[Array, "2 2 3"]:
    """Of each frame a linear map about the middle, and a shift in pixels."""
    u = jax.random.uniform(key, (14,), minval=-1.0, maxval=1.0)
    common = _similar(u[0] * self.turn, u[1] * self.zoom)
    if self.turn_over:
      quarter = jnp.round(2 + 1.999 * u[2]) * (jnp.pi / 2)
      mirror = jnp.where(u[3] > 0, 1.0, -1.0)
      common = common @ _similar(quarter, 0.0) @ jnp.diag(jnp.stack([mirror, jnp.ones(())]))
    own = _similar(u[4] * self.motion, u[5] * self.motion)
    shift = u[6:8] * self.shift * side
    more = shift + u[8:10] * self.motion * side
    first = jnp.concatenate([common, shift[:, None]], axis=1)
    return jnp.stack([first, jnp.concatenate([own @ common, more[:, None]], axis=1)])

  def _relight(self, keys: Array, frames: Float[Array, "2 h w 3"]) -> Float[Array, "2 h w 3"]:
    u = jax.random.uniform(keys[0], (3, 2, 3), minval=-1.0, maxval=1.0)
    change = self.light * jnp.stack([u[0] + u[1] / 3, u[0] + u[2] / 3])
    gain, offset = (change[:, i, None, None] for i in (0, 1))
    noise = self.noise * jax.random.normal(keys[1], frames.shape)
    return jnp.clip((frames - 0.5) * jnp.exp(gain) + 0.5 + offset / 2 + noise, 0.0, 1.0)


def _similar(angle: Array, log_zoom: Array | float) -> Float[Array, "2 2"]:
  """The map that turns by an angle and zooms."""
  c, s = jnp.cos(angle), jnp.sin(angle)
  return jnp.exp(log_zoom) * jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])
