"""Psi-RGB: a two-frame masked autoencoder that sees frame 1 and a few patches of frame 2.

`masking="drop"` encodes visible tokens only (VideoMAE's design, the paper's text); "token" encodes
all tokens, the hidden ones replaced by one learned token (the design of the released weights).
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cwm_jax.models import layers
from cwm_jax.models import positions as position_tables
from cwm_jax.types import Prediction

MASKINGS = ("drop", "token")
POSITIONS = ("learned", "rotary", "sine")


def patchify(frames: Float[Array, "*b h w 3"], patch: int) -> Float[Array, "*b n d"]:
  """Splits images into raster-ordered patches; inside a patch row-major pixels, channel fastest."""
  *b, h, w, c = frames.shape
  x = frames.reshape(*b, h // patch, patch, w // patch, patch, c)
  return jnp.swapaxes(x, -4, -3).reshape(*b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(
  patches: Float[Array, "*b n d"], grid_hw: tuple[int, int], patch: int
) -> Float[Array, "*b h w 3"]:
  """Inverse of `patchify`."""
  *b, _, d = patches.shape
  gh, gw = grid_hw
  x = patches.reshape(*b, gh, gw, patch, patch, d // patch**2)
  return jnp.swapaxes(x, -4, -3).reshape(*b, gh * patch, gw * patch, d // patch**2)


class Predictor(nn.Module):
  """Predicts frame 2 from frame 1 and the visible patches of frame 2.

  Attributes:
    patch: patch side in pixels; image sides must be multiples of it.
    grid_hw: patches per column and per row that positions are made for; they are resized where the
      image has another grid: tables between their values, rotary ones by smaller steps.
    masking: "drop", or "token". There a hidden token carries no position through the encoder, and
      the decoder's positions are added to all tokens.
    positions: "learned"; "rotary" (2-D rotary in attention, each frame counted from its own corner,
      and fixed sine tables added to the tokens of encoder and decoder); or "sine" (a fixed table
      over the running number of the token, as in the two-frame CWM releases).
    context: pixels round each patch of frame 1 that its token sees too; frame 1 is wholly visible,
      so nothing leaks. What moved by part of a patch then lies within one token of frame 1. It
      begins at zero weight.
    attention_impl: None, "einsum", "xla" or "cudnn"; see `layers.attend`.
    remat: "none", "full", or "dots" (keep matrix products, recompute the rest).
    dtype: compute dtype of the dense layers; parameters, norms, embeddings and the sums along the
      residual stream are float32.
    attention_dtype: compute dtype of attention; None takes `dtype`. A mark's response is a small
      difference of two predictions, and bfloat16 queries and keys change what matches what.
  """

  patch: int = 8
  grid_hw: tuple[int, int] = (32, 32)
  masking: str = "drop"
  positions: str = "learned"
  encoder_width: int = 768
  encoder_depth: int = 12
  encoder_heads: int = 12
  decoder_width: int = 384
  decoder_depth: int = 4
  decoder_heads: int = 6
  mlp_ratio: float = 4.0
  context: int = 0
  attention_impl: str | None = None
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32
  attention_dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(
    self,
    frames: Float[Array, "b 2 h w 3"],
    mask: Bool[Array, "b 2 gh gw"] | Float[Array, "b 2 gh gw"],
    *,
    num_visible: int | None = None,
    predict_frame: int = 2,
    keep_revealed: bool = False,
  ) -> Prediction:
    """One prediction for each pair.

    Args:
      frames: ImageNet-normalised.
      mask: True where a patch is hidden; frame 1 is wholly visible. With masking="token" it may be
        a share, 0 (visible) to 1, beyond which it is clipped: so much of the token is replaced.
      num_visible: how many patches of both frames together are visible; the same for every pair,
        static under jit. Only masking="drop" needs it.
      predict_frame: 2, or 1 to predict frame 1 from a wholly visible frame 2.
      keep_revealed: leave the prediction of revealed patches in the image (for a loss on all).

    Returns:
      The predicted frame (0 on revealed patches) and the other frame's encoder tokens. What the
      encoder said of all its tokens is sown as the intermediate "encoder_tokens".

    Raises:
      ValueError: sizes that do not fit, an unknown `masking` or `positions`, or an argument that
        goes with another `masking`.
    """
    b, _, h, w, _ = frames.shape
    gh, gw = self._check(h, w, mask.shape)
    self._check_call(mask, num_visible, predict_frame)
    n = gh * gw
    dense = partial(nn.Dense, dtype=jnp.float32, kernel_init=nn.initializers.xavier_uniform())
    norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=jnp.float32)
    stack = partial(
      layers.Stack,
      mlp_ratio=self.mlp_ratio,
      attention_impl=self.attention_impl,
      dtype=self.dtype,
      attention_dtype=self.attention_dtype,
      remat=self.remat,
    )
    hidden = mask.reshape(b, 2 * n)
    drop = self.masking == "drop"
    tokens = dense(self.encoder_width, name="patch_embed")(
      patchify(frames, self.patch).reshape(b, 2 * n, -1)
    )
    if self.context:
      around = layers.context_embedding(self.encoder_width, self.patch, self.context, jnp.float32)(
        frames[:, 0]
      )
      tokens = tokens.at[:, :n].add(around.reshape(b, n, -1))
    tokens = tokens + self._positions("encoder_positions", (gh, gw), self.encoder_width)
    rotary = self._rotary((gh, gw), self.encoder_width // self.encoder_heads)
    if drop:
      # A stable sort of the flags lists visible tokens first, each group in raster order.
      order = jnp.argsort(hidden, axis=1, stable=True)
      restore = jnp.argsort(order, axis=1)
      shown = order[:, :num_visible]
      tokens = jnp.take_along_axis(tokens, shown[:, :, None], axis=1)
      rotary = None if rotary is None else rotary[shown]
    else:
      mask_token = self._mask_token(self.encoder_width)
      visible = 1 - jnp.clip(hidden.astype(jnp.float32), 0, 1)
      tokens = mask_token + visible[:, :, None] * (tokens - mask_token)
      rotary = _for_each(b, rotary)
    tokens = stack(self.encoder_depth, self.encoder_heads, name="encoder")(tokens, rotary)
    tokens = norm(name="encoder_norm")(tokens)
    self.sow("intermediates", "encoder_tokens", tokens)

    x = dense(self.decoder_width, name="encoder_to_decoder")(tokens)
    if drop:
      filler = jnp.broadcast_to(
        self._mask_token(self.decoder_width), (b, 2 * n - num_visible, self.decoder_width)
      )
      x = jnp.take_along_axis(jnp.concatenate([x, filler], axis=1), restore[:, :, None], axis=1)
    x = x + self._positions("decoder_positions", (gh, gw), self.decoder_width)
    rotary = _for_each(b, self._rotary((gh, gw), self.decoder_width // self.decoder_heads))
    first, last = slice(n), slice(-n, None)
    predicted, other = (last, first) if predict_frame == 2 else (first, last)
    x = stack(self.decoder_depth, self.decoder_heads, name="decoder")(x, rotary, wanted=predicted)
    x = norm(name="decoder_norm")(x)
    # The head's output is read as pixels: keep it in float32.
    pixels = nn.Dense(self.patch**2 * 3, dtype=jnp.float32, name="head")(x)
    if not keep_revealed:
      pixels = jnp.where(hidden[:, predicted, None] > 0, pixels, 0.0)
    image = unpatchify(pixels, (gh, gw), self.patch)
    # Of a dropping encoder's tokens, the wholly visible frame's are the first or the last n.
    return Prediction(image, tokens[:, other].reshape(b, gh, gw, self.encoder_width))

  def _check(self, h: int, w: int, mask_shape: tuple[int, ...]) -> tuple[int, int]:
    if self.masking not in MASKINGS:
      raise ValueError(f"model.masking is {self.masking!r}; choose one of {', '.join(MASKINGS)}")
    if self.positions not in POSITIONS:
      raise ValueError(
        f"model.positions is {self.positions!r}; choose one of {', '.join(POSITIONS)}"
      )
    if h % self.patch or w % self.patch:
      raise ValueError(f"an image of {h} x {w} does not divide into patches of {self.patch}")
    grid = (h // self.patch, w // self.patch)
    if tuple(mask_shape[-2:]) != grid:
      raise ValueError(f"the mask has {mask_shape[-2:]} patches, the image has {grid}")
    return grid

  def _check_call(self, mask: Array, num_visible: int | None, predict_frame: int) -> None:
    if predict_frame not in (1, 2):
      raise ValueError(f"predict_frame is {predict_frame}; a pair has the frames 1 and 2")
    if predict_frame == 1 and self.context:
      raise ValueError("model.context shows frame 1; a predictor that has it cannot predict it")
    if self.masking == "drop" and num_visible is None:
      raise ValueError('masking="drop" needs num_visible, the number of visible patches')
    if self.masking == "drop" and mask.dtype != jnp.bool_:
      raise ValueError('masking="drop" needs a mask of True and False; shares go with "token"')

  def _mask_token(self, width: int) -> Float[Array, " c"]:
    return jnp.asarray(self.param("mask_token", nn.initializers.normal(0.02), (width,)))

  def _positions(self, name: str, grid_hw: tuple[int, int], width: int):
    """[1, 2n, width]: a position table for both frames, plus which frame it is."""
    n = grid_hw[0] * grid_hw[1]
    if self.positions == "rotary":
      frame = self.param(name, nn.initializers.normal(0.02), (2, width))
      table = layers.sine_positions(grid_hw, width, of_hw=self.grid_hw) + frame[:, None]
      return table.reshape(1, 2 * n, width)
    count = 2 * self.grid_hw[0] * self.grid_hw[1]
    if self.positions == "learned":
      table = self.param(name, nn.initializers.normal(0.02), (count, width))
    else:
      table = position_tables.token_sine_positions(count, width)
    return position_tables.resize_positions(jnp.asarray(table), tuple(self.grid_hw), grid_hw)[None]

  def _rotary(self, grid_hw: tuple[int, int], head_dim: int):
    if self.positions != "rotary":
      return None
    table = layers.rotary_table(grid_hw, head_dim, of_hw=self.grid_hw)
    return jnp.concatenate([table, table])


def _for_each(batch: int, table: Array | None) -> Array | None:
  return None if table is None else jnp.broadcast_to(table, (batch, *table.shape))
