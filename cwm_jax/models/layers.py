"""Transformer parts shared by the predictors: positions, attention, blocks, the scanned stack."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cwm_jax.models import cached_attention, split

REMAT_POLICIES = ("none", "full", "dots")
# On a CPU: scores of one head (queries x keys) from which on they are kept in cache. Where a batch
# may be split, and how is not known, only large ones are: each device would loop over all heads.
_MANY_SCORES, _MANY_SCORES_SPLIT = 64 * 64, 1024 * 1024
_ALL = slice(None)


def grid_yx(grid_hw: tuple[int, int]) -> Float[np.ndarray, "n 2"]:
  """(row, column) of every patch, raster order, in patches.

  A constant, and so is what is made of it here: on several devices the making of a table would be
  split, and its parts exchanged.
  """
  return np.stack(np.indices(grid_hw), axis=-1).reshape(-1, 2).astype(np.float32)


def resize_places(
  places_yx: Float[Array, "*b 2"] | Float[np.ndarray, "*b 2"],
  grid_hw: tuple[int, int],
  of_hw: tuple[int, int],
) -> Float[Array, "*b 2"] | Float[np.ndarray, "*b 2"]:
  """Where places in a grid over an image are in another grid over the same image.

  Args:
    places_yx: (row, column) in patches of the grid, whole numbers being patches' centres.
    grid_hw, of_hw: patches per column and per row, of the one grid and the other.
  """
  if tuple(grid_hw) == tuple(of_hw):
    return places_yx
  share = np.array(of_hw, np.float32) / np.array(grid_hw, np.float32)
  return (places_yx + 0.5) * share - 0.5


def sine_positions(
  grid_hw: tuple[int, int], width: int, *, of_hw: tuple[int, int]
) -> Float[Array, "n width"]:
  """`sine_encoding` of every patch of a grid, raster order, at its place in the grid `of_hw`."""
  return jnp.asarray(sine_encoding(resize_places(grid_yx(grid_hw), grid_hw, of_hw), width))


def sine_encoding(
  places_yx: Float[Array, "*b 2"] | Float[np.ndarray, "*b 2"], width: int
) -> Float[Array, "*b width"] | Float[np.ndarray, "*b width"]:
  """Fixed 2-D sine and cosine encoding: half the channels for the row, half for the column.

  Args:
    places_yx: (row, column) in patches, fractions allowed; whole numbers are patches' centres.

  Raises:
    ValueError: `width` is not a multiple of 4.
  """
  if width % 4:
    raise ValueError(f"sine positions need a width that is a multiple of 4, not {width}")
  xp = np if isinstance(places_yx, np.ndarray) else jnp
  freqs = 1.0 / 10000.0 ** (xp.arange(width // 4, dtype=xp.float32) / (width // 4))
  angles = places_yx[..., None] * freqs
  both = xp.concatenate([xp.sin(angles), xp.cos(angles)], axis=-1)
  return both.reshape(*places_yx.shape[:-1], width)


def rotary_table(
  grid_hw: tuple[int, int], head_dim: int, *, of_hw: tuple[int, int], base: float = 100.0
) -> Float[Array, "n half 2"]:
  """`rotary_encoding` of every patch of a grid, raster order, at its place in the grid `of_hw`.

  Both frames use the same table, so that equal positions in two frames are at relative offset zero.
  """
  return jnp.asarray(
    rotary_encoding(resize_places(grid_yx(grid_hw), grid_hw, of_hw), head_dim, base=base)
  )


def rotary_encoding(
  places_yx: Float[Array, "*b 2"] | Float[np.ndarray, "*b 2"],
  head_dim: int,
  *,
  base: float = 100.0,
) -> Float[Array, "*b half 2"] | Float[np.ndarray, "*b half 2"]:
  """(cos, sin) of the rotation of each channel pair; the row turns one half, the column the other.

  Args:
    places_yx: as in `sine_encoding`.

  Raises:
    ValueError: `head_dim` is not a multiple of 4.
  """
  if head_dim % 4:
    raise ValueError(f"rotary positions need a head size that is a multiple of 4, not {head_dim}")
  xp = np if isinstance(places_yx, np.ndarray) else jnp
  freqs = base ** -(xp.arange(head_dim // 4, dtype=xp.float32) / (head_dim // 4))
  angles = (places_yx[..., None] * freqs).reshape(*places_yx.shape[:-1], head_dim // 2)
  return xp.stack([xp.cos(angles), xp.sin(angles)], axis=-1)


def rotate(x: Float[Array, "b n heads d"], table: Float[Array, "b n half 2"]):
  """Turns the channel pairs (i, i + d/2) of queries or keys by their positions' angles."""
  first, second = jnp.split(x, 2, axis=-1)
  cos, sin = table[:, :, None, :, 0].astype(x.dtype), table[:, :, None, :, 1].astype(x.dtype)
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def similarity_init(key, shape, dtype=jnp.float32):
  """Fused query, key, value kernel [c, 3c] whose queries and keys begin equal.

  A token then looks at tokens like itself from the first step on. Finding a patch of frame 2 in
  frame 1 is what the predictor must learn first, and this is where it starts.
  """
  kernel = nn.initializers.xavier_uniform()(key, shape, dtype)
  query, _, value = jnp.split(kernel, 3, axis=1)
  return jnp.concatenate([query, query, value], axis=1)


def attend(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  implementation: str | None = None,
) -> Float[Array, "b n h d"]:
  """softmax(q k / sqrt(d)) v, with float32 scores.

  Args:
    implementation: "einsum", "cached" (the same numbers, one head and some queries at a time), or
      what `jax.nn.dot_product_attention` takes ("xla", "cudnn"). None is JAX's own choice, except
      on a CPU: "cached" there, but "einsum" for few tokens (up to a thousand on several devices
      without a mesh that `split` knows).
  """
  if implementation is None and jax.default_backend() == "cpu":
    own = jax.device_count() == 1 or split.known()
    many = _MANY_SCORES if own else _MANY_SCORES_SPLIT
    implementation = "cached" if q.shape[1] * k.shape[1] >= many else "einsum"
  if implementation == "einsum":
    scores = jnp.einsum(
      "bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)
  if implementation == "cached":
    return split.each_its_own(_attend_by_heads, q * q.shape[-1] ** -0.5, k, v)
  return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _attend_by_heads(q, k, v):
  """`cached_attention.attend` of [b, n, h, d]."""
  b, n, h, d = q.shape
  heads = (jnp.moveaxis(x, 2, 1).reshape(b * h, -1, d) for x in (q, k, v))
  return jnp.moveaxis(cached_attention.attend(*heads).reshape(b, h, n, d), 1, 2)


class _Fused(nn.Module):
  """`nn.Dense` of width 3c as queries, keys and values by heads; its parameters are the same."""

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n 3 heads d"]:
    c = x.shape[-1]
    kernel = self.param("kernel", similarity_init, (c, 3 * c))
    bias = self.param("bias", nn.initializers.zeros, (3 * c,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    kernel, bias = split.by_heads(kernel, self.heads), split.by_heads(bias, self.heads)
    return jnp.einsum("bnc,cshd->bnshd", x, kernel) + bias


class Attention(nn.Module):
  """Multi-head self-attention in `dtype`, with rotary positions where a table is given."""

  heads: int
  attention_impl: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n c"], rotary=None, *, wanted: slice = _ALL
  ) -> Float[Array, "b m c"]:
    """What the `wanted` tokens gather from all tokens."""
    b, _, c = x.shape
    qkv = _Fused(self.heads, self.dtype, name="qkv")(x)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if rotary is not None:
      q, k = rotate(q, rotary), rotate(k, rotary)
    out = attend(q[:, wanted], k, v, self.attention_impl)
    proj = nn.Dense(c, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="proj")
    return proj(out.reshape(b, -1, c))


def mlp(
  x: Float[Array, "b n c"], ratio: float, dtype: Any, *, prefix: str = ""
) -> Float[Array, "b n c"]:
  """A block's two dense layers, exact GELU between; for use within a module's compact method."""
  c = x.shape[-1]
  dense = partial(nn.Dense, dtype=dtype, kernel_init=nn.initializers.xavier_uniform())
  x = nn.gelu(dense(int(c * ratio), name=f"{prefix}fc1")(x), approximate=False)
  return dense(c, name=f"{prefix}fc2")(x)


def context_embedding(width: int, patch: int, context: int, dtype: Any) -> nn.Conv:
  """What each patch's token sees of `context` pixels more on every side; begins at zero weight.

  Frames [b, h, w, 3] to [b, h / patch, w / patch, width].
  """
  return nn.Conv(
    width,
    (patch + 2 * context,) * 2,
    strides=patch,
    padding=context,
    use_bias=False,
    kernel_init=nn.initializers.zeros,
    dtype=dtype,
    name="context_embed",
  )


class Block(nn.Module):
  """Pre-norm transformer block: x + attention(norm(x)), x + mlp(norm(x)); exact GELU."""

  heads: int
  mlp_ratio: float = 4.0
  attention_impl: str | None = None
  dtype: jnp.dtype = jnp.float32
  attention_dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n c"], rotary=None, *, wanted: slice = _ALL
  ) -> Float[Array, "b m c"]:
    """The `wanted` tokens after this block, in x's dtype or a wider one."""
    # Norms run in float32 whatever the compute dtype: their sums lose the signal in bfloat16.
    norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=jnp.float32)
    dtype = self.dtype if self.attention_dtype is None else self.attention_dtype
    attention = Attention(self.heads, self.attention_impl, dtype, name="attn")
    x = x[:, wanted] + attention(norm(name="norm1")(x).astype(dtype), rotary, wanted=wanted)
    return x + mlp(norm(name="norm2")(x).astype(self.dtype), self.mlp_ratio, self.dtype)


class _ScanBlock(Block):
  """`Block` in the form `nn.scan` wants: (carry, broadcast) -> (carry, None)."""

  @nn.compact
  def __call__(self, x, rotary=None):
    return Block.__call__(self, x, rotary), None


class Stack(nn.Module):
  """`depth` blocks under one scan; their parameters are stacked along axis 0.

  Tokens keep the dtype they come in; `dtype` and `attention_dtype` (None: the same) are what the
  blocks compute in, and no wider than the tokens'.
  """

  depth: int
  heads: int
  mlp_ratio: float = 4.0
  attention_impl: str | None = None
  dtype: jnp.dtype = jnp.float32
  attention_dtype: jnp.dtype | None = None
  remat: str = "none"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n c"], rotary=None, *, wanted: slice = _ALL
  ) -> Float[Array, "b m c"]:
    """All tokens through the blocks; the last block works out the `wanted` ones only."""
    settings = (self.heads, self.mlp_ratio, self.attention_impl, self.dtype, self.attention_dtype)
    remat = remat_settings(self.remat)
    if self.is_initializing():
      scanned = repeated(_ScanBlock, self.depth, remat="none", broadcast=1)
      x, _ = scanned(*settings, name="blocks")(x, rotary)
      return x[:, wanted]
    # Not `nn.scan` here, since all of its steps would have to be alike.
    params = self.variables["params"]["blocks"]

    def apply(params, x, wanted):
      return Block(*settings, parent=None).apply({"params": params}, x, rotary, wanted=wanted)

    in_scan, alone = apply, apply
    if remat is not None:
      in_scan = jax.checkpoint(apply, static_argnums=2, **remat)
      # Outside a loop the compiler would merge what is recomputed with what it was computed from.
      alone = jax.checkpoint(apply, static_argnums=2, **remat | {"prevent_cse": True})
    before = jax.tree.map(lambda p: p[:-1], params)
    last = jax.tree.map(lambda p: p[-1], params)
    x, _ = jax.lax.scan(lambda x, params: (in_scan(params, x, _ALL), None), x, before)
    return alone(last, x, wanted)


def repeated(block: type[nn.Module], depth: int, *, remat: str, broadcast: int = 0) -> Any:
  """`depth` of a module in a row under one `nn.scan`; parameters are stacked along axis 0.

  Args:
    block: its call takes (carry, *what all of them share) and returns (carry, None).
    remat: what the backward pass recomputes; one of `REMAT_POLICIES`.
    broadcast: how many arguments they share.

  Raises:
    ValueError: an unknown `remat`.
  """
  settings = remat_settings(remat)
  block = block if settings is None else nn.remat(block, **settings)
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(nn.broadcast,) * broadcast,
    length=depth,
  )


def remat_settings(remat: str) -> dict[str, Any] | None:
  """Arguments of `jax.checkpoint` for one of `REMAT_POLICIES`; None where nothing is recomputed.

  Raises:
    ValueError: an unknown `remat`.
  """
  if remat not in REMAT_POLICIES:
    raise ValueError(f"model.remat is {remat!r}; choose one of {', '.join(REMAT_POLICIES)}")
  if remat == "none":
    return None
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return {"prevent_cse": False, "policy": policy if remat == "dots" else None}
