"""Convolutional encoders of the flow networks: frames in, features at an eighth of the size out.

Convolutions pad as PyTorch does, the same on both sides, which at stride 2 is not Flax's "SAME".
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax.models import convolution

NORMS = ("batch", "instance", "group", "none")
BLOCKS = ("residual", "bottleneck")
_EPS = 1e-5
_of_outputs = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_of_inputs = nn.initializers.lecun_normal()


def conv(
  width: int,
  kernel: tuple[int, int],
  *,
  name: str | None = None,
  stride: int = 1,
  init: Any = _of_inputs,
  dtype: Any = jnp.float32,
) -> nn.Conv:
  """A convolution padded by half its kernel on every side; at stride 1 it keeps the size."""
  padding = [(side // 2, side // 2) for side in kernel]
  return nn.Conv(
    width,
    kernel,
    stride,
    padding=padding,
    kernel_init=init,
    dtype=dtype,
    name=name,
    conv_general_dilated_cls=(lambda: convolution.same) if stride == 1 else None,
  )


class FixedBatchNorm(nn.Module):
  """Batch normalisation by stored statistics, which are parameters that no gradient reaches.

  `optim.labels` knows them by their paths, .../batch/mean and .../batch/var, and keeps them still.
  The released networks end their training so. Statistics of a batch are never taken: a network
  that is trained from scratch has norm "group" or "instance".
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    width = x.shape[-1:]
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale, bias = self.param("scale", ones, width), self.param("bias", zeros, width)
    mean = jax.lax.stop_gradient(self.param("mean", zeros, width))
    var = jax.lax.stop_gradient(self.param("var", ones, width))
    factor = scale * jax.lax.rsqrt(var + _EPS)
    return x * factor.astype(self.dtype) + (bias - mean * factor).astype(self.dtype)


class Norm(nn.Module):
  """One of `NORMS`; "instance" has no parameters, "group" takes groups of 8 channels.

  Raises:
    ValueError: an unknown kind.
  """

  kind: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    if self.kind == "batch":
      return FixedBatchNorm(dtype=self.dtype, name="batch")(x)
    if self.kind == "instance":
      wide = x.astype(jnp.float32)
      mean = jnp.mean(wide, axis=(1, 2), keepdims=True)
      var = jnp.mean((wide - mean) ** 2, axis=(1, 2), keepdims=True)
      return ((wide - mean) * jax.lax.rsqrt(var + _EPS)).astype(self.dtype)
    if self.kind == "group":
      norm = nn.GroupNorm(
        num_groups=None, group_size=8, epsilon=_EPS, dtype=self.dtype, name="group"
      )
      return norm(x)
    if self.kind == "none":
      return x
    raise ValueError(f"the norm is {self.kind!r}; choose one of {', '.join(NORMS)}")


class Block(nn.Module):
  """relu(skip(x) + convolutions(x)), each convolution normalised and rectified.

  Attributes:
    kind: "residual" (3x3, 3x3) or "bottleneck" (1x1, 3x3, 1x1 by a quarter of the width).
    stride: of the block; the skip is a convolution where the stride or the width changes.

  Raises:
    ValueError: an unknown kind.
  """

  width: int
  kind: str = "residual"
  stride: int = 1
  norm: str = "batch"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    if self.kind == "residual":
      layers = [(self.width, (3, 3), self.stride), (self.width, (3, 3), 1)]
    elif self.kind == "bottleneck":
      narrow = self.width // 4
      layers = [(narrow, (1, 1), 1), (narrow, (3, 3), self.stride), (self.width, (1, 1), 1)]
    else:
      raise ValueError(f"the block is {self.kind!r}; choose one of {', '.join(BLOCKS)}")
    settings = dict(init=_of_outputs, dtype=self.dtype)
    y = x
    for i, (width, kernel, stride) in enumerate(layers, start=1):
      y = conv(width, kernel, stride=stride, name=f"conv{i}", **settings)(y)
      y = nn.relu(Norm(self.norm, dtype=self.dtype, name=f"norm{i}")(y))
    if self.stride != 1 or x.shape[-1] != self.width:
      x = conv(self.width, (1, 1), stride=self.stride, name="skip", **settings)(x)
      x = Norm(self.norm, dtype=self.dtype, name="skip_norm")(x)
    return nn.relu(x + y)


class Encoder(nn.Module):
  """A 7x7 convolution of stride 2, stages of blocks (strides 1, 2, 2), a 1x1 convolution.

  Attributes:
    stem_width: channels of the first convolution.
    widths: channels of each stage.
    depths: blocks of each stage.
    out_width: channels of the result.
    block: of `BLOCKS`.
    norm: of `NORMS`.
  """

  stem_width: int
  widths: tuple[int, int, int]
  depths: tuple[int, int, int]
  out_width: int
  block: str = "residual"
  norm: str = "batch"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h8 w8 d"]:
    """
    Args:
      images: in [-1, 1]; height and width divide by 8.
    """
    settings = dict(init=_of_outputs, dtype=self.dtype)
    x = conv(self.stem_width, (7, 7), stride=2, name="stem", **settings)(images)
    x = nn.relu(Norm(self.norm, dtype=self.dtype, name="stem_norm")(x))
    for stage, (width, depth) in enumerate(zip(self.widths, self.depths), start=1):
      for i in range(depth):
        stride = 2 if i == 0 and stage > 1 else 1
        block = Block(
          width,
          kind=self.block,
          stride=stride,
          norm=self.norm,
          dtype=self.dtype,
          name=f"stage{stage}_block{i}",
        )
        x = block(x)
    return conv(self.out_width, (1, 1), name="out", **settings)(x)
