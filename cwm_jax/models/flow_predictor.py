"""Psi-flow: predicts frame 2 from frame 1 and the flow of a few of its points, and nothing else.

Trained jointly with a perturber, it is the judge of the flow it is given: the better the flow, the
better it predicts. Every one here is called as `apply(variables, frame1, points_xy, flow_xy)` and
returns a picture, so that a task need not know which it has.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax import geometry
from cwm_jax.models import layers
from cwm_jax.models.predictor import patchify, unpatchify


class SingleStreamFlowPredictor(nn.Module):
  """Frame 1's patches and the points' flows as the tokens of one transformer stack.

  What it predicts is frame 1 plus a change, so that it begins as a copy of frame 1 and learns from
  the first step on what motion changes.

  Attributes:
    patch: patch side in pixels; image sides must be multiples of it.
    context: pixels round each patch that its token sees too; it begins at zero weight.
    attention_impl: see `layers.attend`.
    remat: "none", "full", or "dots" (keep matrix products, recompute the rest).
    dtype: compute dtype; parameters and norms are float32.
  """

  patch: int = 8
  width: int = 192
  depth: int = 6
  heads: int = 6
  mlp_ratio: float = 4.0
  context: int = 0
  attention_impl: str | None = None
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    frame1: Float[Array, "b h w 3"],
    points_xy: Float[Array, "b n 2"],
    flow_xy: Float[Array, "b n 2"],
  ) -> Float[Array, "b h w 3"]:
    """Frame 2, RGB in [0, 1] (not clipped).

    Args:
      frame1: ImageNet-normalised.
      points_xy: continuous (x, y), pixels of frame 1; anywhere in it, their order means nothing.
      flow_xy: (dx, dy) of each point, pixels of frame 1.

    Raises:
      ValueError: sizes that do not fit.
    """
    grid_hw = check_sizes(frame1.shape, points_xy.shape, self.patch)
    b, n = frame1.shape[0], grid_hw[0] * grid_hw[1]
    dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
    seen = dense(self.width, name="patch_embed")(patchify(frame1, self.patch).astype(self.dtype))
    if self.context:
      around = nn.Conv(
        self.width,
        (self.patch + 2 * self.context,) * 2,
        strides=self.patch,
        padding=self.context,
        use_bias=False,
        kernel_init=nn.initializers.zeros,
        dtype=self.dtype,
        name="context_embed",
      )(frame1.astype(self.dtype))
      seen = seen + around.reshape(b, n, -1)
    # In patches, whole numbers being the centres of patches, as the grid's own positions are.
    from_yx = points_xy[..., ::-1] / self.patch - 0.5
    flow_yx = flow_xy[..., ::-1] / self.patch
    places = jnp.concatenate(
      [jnp.broadcast_to(layers.grid_yx(grid_hw), (b, n, 2)), from_yx], axis=1
    )
    encoding = layers.sine_encoding(places, self.width)
    # The flow in numbers, and where it leads in the terms in which patches know their own place.
    told = jnp.concatenate([flow_yx, layers.sine_encoding(from_yx + flow_yx, self.width)], axis=-1)
    moved = nn.gelu(dense(self.width, name="flow_fc1")(told.astype(self.dtype)), approximate=False)
    moved = dense(self.width, name="flow_fc2")(moved)
    tokens = jnp.concatenate([seen, moved], axis=1) + encoding.astype(self.dtype)
    tokens = layers.Stack(
      depth=self.depth,
      heads=self.heads,
      mlp_ratio=self.mlp_ratio,
      attention_impl=self.attention_impl,
      dtype=self.dtype,
      remat=self.remat,
      name="stack",
    )(tokens, layers.rotary_encoding(places, self.width // self.heads))
    x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")(tokens[:, :n])
    # The head's output is read as pixels: keep it in float32.
    change = nn.Dense(
      self.patch**2 * 3, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name="head"
    )(x)
    return geometry.unnormalise(frame1) + unpatchify(change, grid_hw, self.patch)


def check_sizes(
  frame_shape: tuple[int, ...], points_shape: tuple[int, ...], patch: int
) -> tuple[int, int]:
  """Patches per column and per row of a frame [b, h, w, 3] with points [b, n, 2].

  Raises:
    ValueError: the frame does not divide into patches, or there is no point.
  """
  h, w = frame_shape[1:3]
  if h % patch or w % patch:
    raise ValueError(f"an image of {h} x {w} does not divide into patches of {patch}")
  if points_shape[1] == 0:
    raise ValueError("a flow predictor needs the flow of at least one point")
  return h // patch, w // patch
