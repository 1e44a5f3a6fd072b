"""Psi-flow: predicts frame 2 from frame 1 and the flow of a few of its points, and nothing else.

Trained jointly with a perturber, it is the judge of the flow it is given: the better the flow, the
better it predicts. Every one here is called as `apply(variables, frame1, points_xy, flow_xy)` and
returns a picture, so that a task need not know which it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cwm_jax import geometry
from cwm_jax.models import layers, positions, two_stream
from cwm_jax.models.predictor import patchify, unpatchify

SETTINGS = ("release", "plain")


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
      around = layers.context_embedding(self.width, self.patch, self.context, self.dtype)
      seen = seen + around(frame1.astype(self.dtype)).reshape(b, n, -1)
    # In patches, whole numbers being the centres of patches, as the grid's own positions are.
    from_yx = points_xy[..., ::-1] / self.patch - 0.5
    flow_yx = flow_xy[..., ::-1] / self.patch
    places_yx = jnp.concatenate(
      [jnp.broadcast_to(layers.grid_yx(grid_hw), (b, n, 2)), from_yx], axis=1
    )
    encoding = layers.sine_encoding(places_yx, self.width)
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
    )(tokens, layers.rotary_encoding(places_yx, self.width // self.heads))
    x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")(tokens[:, :n])
    # The head's output is read as pixels: keep it in float32.
    change = nn.Dense(
      self.patch**2 * 3, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name="head"
    )(x)
    return geometry.unnormalise(frame1) + unpatchify(change, grid_hw, self.patch)


class FlowConditionedPredictor(nn.Module):
  """The public release's: frame 1 in one stream, its patches that carry a flow in the other.

  A point's flow counts for the whole patch it lies in. The encoder's secondary stream has a token
  for each point, that patch's pixels and flow; the decoder's has one for every patch, those without
  a point being one learned token. Positions are a fixed table over the running number of a patch.

  Attributes:
    patch: patch side in pixels; image sides must be multiples of it.
    grid_hw: the one grid of patches that it takes, for its table knows no other; None takes any.
    setting: "release": frame 1 is normalised a second time, and attention across streams has one
      head, as the release's weights want it; "plain": once, and as many heads as within a stream.
    encoder_links, decoder_links: of each block; see `two_stream`.
    attention_impl, remat, dtype: as in `SingleStreamFlowPredictor`.
  """

  patch: int = 8
  grid_hw: tuple[int, int] | None = None
  setting: str = "release"
  encoder_width: int = 768
  encoder_heads: int = 12
  encoder_links: Sequence[str] = ("o<->o", "o-_", "o-_", "o-_") * 3
  decoder_width: int = 384
  decoder_heads: int = 6
  decoder_links: Sequence[str] = ("o<->o", "o<-_", "o-_", "o-_")
  mlp_ratio: float = 4.0
  attention_impl: str | None = None
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32

  def __call__(
    self,
    frame1: Float[Array, "b h w 3"],
    points_xy: Float[Array, "b n 2"],
    flow_xy: Float[Array, "b n 2"],
  ) -> Float[Array, "b h w 3"]:
    """Frame 2, RGB in [0, 1] (not clipped).

    Args:
      frame1: ImageNet-normalised.
      points_xy: continuous (x, y), pixels of frame 1, clamped to it; in distinct patches. Where two
        share one, the decoder has the mean of what the encoder made of both.
      flow_xy: (dx, dy) of each point, pixels of frame 1.

    Raises:
      ValueError: sizes that do not fit, or an unknown `setting`.
    """
    _, columns = check_sizes(frame1.shape, points_xy.shape, self.patch)
    index_yx = geometry.point_to_index_yx(points_xy, frame1.shape[1:3]) // self.patch
    flow = jnp.broadcast_to(flow_xy[:, :, None], (*flow_xy.shape[:2], self.patch**2, 2))
    return self.with_flow_patches(frame1, index_yx[..., 0] * columns + index_yx[..., 1], flow)

  @nn.compact
  def with_flow_patches(
    self,
    frame1: Float[Array, "b h w 3"],
    patches: Int[Array, "b n"],
    flow_xy: Float[Array, "b n d 2"],
  ) -> Float[Array, "b h w 3"]:
    """As a call, with a flow for every pixel of the patches that carry one.

    Args:
      frame1: ImageNet-normalised.
      patches: which patches, by their number in raster order.
      flow_xy: (dx, dy) of the patch * patch pixels of each, raster order.

    Raises:
      ValueError: as a call.
    """
    grid_hw = check_sizes(frame1.shape, patches.shape, self.patch)
    if self.setting not in SETTINGS:
      raise ValueError(f"the setting is {self.setting!r}; choose one of {', '.join(SETTINGS)}")
    if self.grid_hw is not None and tuple(self.grid_hw) != grid_hw:
      raise ValueError(
        f"this flow predictor is for {self.grid_hw} patches, the image has {grid_hw}"
      )
    release = self.setting == "release"
    n = grid_hw[0] * grid_hw[1]
    dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
    norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=jnp.float32)

    def stack(half, heads, links):
      return two_stream.TwoStreamStack(
        links=links,
        heads=heads,
        cross_heads=1 if release else heads,
        mlp_ratio=self.mlp_ratio,
        attention_impl=self.attention_impl,
        dtype=self.dtype,
        remat=self.remat,
        name=half,
      )

    seen = patchify(geometry.normalise(frame1) if release else frame1, self.patch)
    pixels = jnp.take_along_axis(seen, patches[..., None], axis=1)
    pixels = pixels.reshape(*patches.shape, self.patch**2, 3)
    moved = jnp.concatenate([pixels, flow_xy], axis=-1).reshape(*patches.shape, -1)
    table = positions.token_sine_positions(n, self.encoder_width).astype(self.dtype)
    primary = dense(self.encoder_width, name="primary_embed")(seen.astype(self.dtype)) + table
    secondary = dense(self.encoder_width, name="secondary_embed")(moved.astype(self.dtype))
    encoder = stack("encoder", self.encoder_heads, self.encoder_links)
    primary, secondary = encoder(primary, secondary + table[patches])
    primary, secondary = norm(name="primary_norm")(primary), norm(name="secondary_norm")(secondary)
    self.sow("intermediates", "encoder_tokens", (primary, secondary))

    bridge = partial(dense, self.decoder_width, use_bias=False)
    primary = bridge(name="primary_bridge")(primary.astype(self.dtype))
    secondary = bridge(name="secondary_bridge")(secondary.astype(self.dtype))
    # Nothing of frame 1 is hidden, so nothing reads the primary stream's token for what is. It is
    # here because the release's files hold one.
    self.param("primary_mask_token", nn.initializers.normal(0.02), (self.decoder_width,))
    mask_token = self.param(
      "secondary_mask_token", nn.initializers.normal(0.02), (self.decoder_width,)
    )
    secondary = fill_up(secondary, patches, n, jnp.asarray(mask_token, self.dtype))
    table = positions.token_sine_positions(n, self.decoder_width).astype(self.dtype)
    decoder = stack("decoder", self.decoder_heads, self.decoder_links)
    primary, _ = decoder(primary + table, secondary + table)
    # The head's output is read as pixels: keep it in float32.
    head = nn.Dense(self.patch**2 * 3, dtype=jnp.float32, name="head")
    return unpatchify(head(norm(name="decoder_norm")(primary)), grid_hw, self.patch)


def fill_up(
  tokens: Float[Array, "b n c"],
  patches: Int[Array, "b n"],
  count: int,
  mask_token: Float[Array, " c"],
) -> Float[Array, "b count c"]:
  """Tokens of some patches to tokens of all: the mean of a patch's own, or the mask token."""
  row = jnp.arange(tokens.shape[0])[:, None]
  total = jnp.zeros((tokens.shape[0], count, tokens.shape[-1]), tokens.dtype)
  total = total.at[row, patches].add(tokens)
  times = jnp.zeros((tokens.shape[0], count, 1), tokens.dtype).at[row, patches].add(1)
  return jnp.where(times > 0, total / jnp.maximum(times, 1), mask_token)


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
