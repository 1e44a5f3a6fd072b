"""Psi-flow that begins as a trained Psi-RGB: it sees frame 1's patches where the flow puts them.

A predictor that has learned from visible patches of frame 2 what moved where needs no training to
heed a flow that is told in its own terms: "this patch of frame 1 is now there". Positions may be
fractions of a patch, so the prediction is differentiable in the flow.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax import geometry
from cwm_jax.models import layers
from cwm_jax.models.flow_predictor import check_sizes
from cwm_jax.models.predictor import Predictor, patchify, unpatchify


class MovedPatchesFlowPredictor(nn.Module):
  """A `predictor.Predictor` with rotary positions, told flow instead of frame 2.

  For each point the patch of frame 1 that holds it is one more token, at the place where the flow
  puts it in frame 2. Of frame 2 itself nothing is seen: each of its patches is predicted.

  Attributes:
    predictor: whose sizes it has and whose parameters it takes; it is not called, and attention
      computes in its `dtype`.
  """

  predictor: Predictor

  @property
  def patch(self) -> int:
    """Side of a patch, pixels."""
    return self.predictor.patch

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
      points_xy: continuous (x, y), pixels of frame 1; their order means nothing.
      flow_xy: (dx, dy) of each point, pixels of frame 1; it counts for the patch that holds it.

    Raises:
      ValueError: sizes that do not fit.
    """
    like, patch = self.predictor, self.patch
    gh, gw = grid_hw = check_sizes(frame1.shape, points_xy.shape, patch)
    b, n = frame1.shape[0], gh * gw
    dense = partial(nn.Dense, dtype=jnp.float32, kernel_init=nn.initializers.xavier_uniform())
    norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=jnp.float32)
    stack = partial(
      layers.Stack,
      mlp_ratio=like.mlp_ratio,
      attention_impl=like.attention_impl,
      dtype=like.dtype,
      remat=like.remat,
    )
    cell_yx = jnp.floor(points_xy[..., ::-1] / patch).astype(jnp.int32)
    cell_yx = jnp.clip(cell_yx, 0, jnp.array([gh - 1, gw - 1]))
    index = cell_yx[..., 0] * gw + cell_yx[..., 1]
    moved_yx = cell_yx + flow_xy[..., ::-1] / patch
    grid_yx = jnp.broadcast_to(layers.grid_yx(grid_hw), (b, n, 2))

    seen = dense(like.encoder_width, name="patch_embed")(patchify(frame1, patch))
    moved = jnp.take_along_axis(seen, index[..., None], axis=1)
    if like.context:
      # A predictor sees the surroundings of frame 1's patches only.
      around = layers.context_embedding(like.encoder_width, patch, like.context, jnp.float32)
      seen = seen + around(frame1).reshape(b, n, -1)
    frame = self._frames("encoder_positions", like.encoder_width)
    tokens = jnp.concatenate([seen + frame[0], moved + frame[1]], axis=1)
    places_yx = jnp.concatenate([grid_yx, moved_yx], axis=1)
    places_yx = layers.resize_places(places_yx, grid_hw, like.grid_hw)
    tokens = tokens + layers.sine_encoding(places_yx, like.encoder_width)
    rotary = layers.rotary_encoding(places_yx, like.encoder_width // like.encoder_heads)
    tokens = stack(like.encoder_depth, like.encoder_heads, name="encoder")(tokens, rotary)
    tokens = norm(name="encoder_norm")(tokens)
    self.sow("intermediates", "encoder_tokens", tokens)
    x = dense(like.decoder_width, name="encoder_to_decoder")(tokens)

    asked = self.param("mask_token", nn.initializers.normal(0.02), (like.decoder_width,))
    frame = self._frames("decoder_positions", like.decoder_width)
    x = jnp.concatenate(
      [
        x[:, :n] + frame[0],
        x[:, n:] + frame[1],
        jnp.broadcast_to(asked + frame[1], (b, n, like.decoder_width)),
      ],
      axis=1,
    )
    places_yx = jnp.concatenate([places_yx, places_yx[:, :n]], axis=1)
    x = x + layers.sine_encoding(places_yx, like.decoder_width)
    rotary = layers.rotary_encoding(places_yx, like.decoder_width // like.decoder_heads)
    wanted = slice(-n, None)
    x = stack(like.decoder_depth, like.decoder_heads, name="decoder")(x, rotary, wanted=wanted)
    x = norm(name="decoder_norm")(x)
    pixels = nn.Dense(patch**2 * 3, dtype=jnp.float32, name="head")(x)
    return geometry.unnormalise(unpatchify(pixels, grid_hw, patch))

  def _frames(self, name: str, width: int) -> Float[Array, "2 c"]:
    """Which frame a token belongs to."""
    return jnp.asarray(self.param(name, nn.initializers.normal(0.02), (2, width)))
