"""What the flow networks do in every iteration: motion features, the hidden state, the heads."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cwm_jax.models.flow_encoders import conv

GRUS = {"separable": ((1, 5), (5, 1)), "square": ((3, 3),)}
_CONVNEXT_EPS = 1e-6
_DEPTHWISE = 7


class MotionEncoder(nn.Module):
  """Features of the correlations found and of the flow that led to them, and that flow itself.

  Attributes:
    corr_widths: channels after a 1x1 convolution of the correlations, and 3x3 ones after it.
    flow_widths: channels after a 7x7 and a 3x3 convolution of the flow.
    width: channels of the result; the last two are the flow.
  """

  corr_widths: tuple[int, ...]
  flow_widths: tuple[int, int]
  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, correlations: Float[Array, "b h w n"], flow_xy: Float[Array, "b h w 2"]
  ) -> Float[Array, "b h w c"]:
    x = correlations
    for i, width in enumerate(self.corr_widths, start=1):
      kernel = (1, 1) if i == 1 else (3, 3)
      x = nn.relu(conv(width, kernel, name=f"corr{i}", dtype=self.dtype)(x))
    y = flow_xy
    for i, (width, kernel) in enumerate(zip(self.flow_widths, ((7, 7), (3, 3))), start=1):
      y = nn.relu(conv(width, kernel, name=f"flow{i}", dtype=self.dtype)(y))
    both = jnp.concatenate([x, y], axis=-1)
    both = nn.relu(conv(self.width - 2, (3, 3), name="both", dtype=self.dtype)(both))
    return jnp.concatenate([both, flow_xy.astype(both.dtype)], axis=-1)


class ConvGRU(nn.Module):
  """Gated recurrent units of convolutions, one after another.

  Attributes:
    kind: "separable" (along rows, then along columns) or "square" (3x3).

  Raises:
    ValueError: an unknown kind.
  """

  kind: str = "separable"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, hidden: Float[Array, "b h w c"], x: Float[Array, "b h w d"]
  ) -> Float[Array, "b h w c"]:
    if self.kind not in GRUS:
      raise ValueError(f"the GRU is {self.kind!r}; choose one of {', '.join(GRUS)}")
    width = hidden.shape[-1]
    for i, kernel in enumerate(GRUS[self.kind], start=1):
      both = jnp.concatenate([hidden, x], axis=-1)
      gates = conv(2 * width, kernel, name=f"gates{i}", dtype=self.dtype)(both)
      update, reset = jnp.split(nn.sigmoid(gates), 2, axis=-1)
      both = jnp.concatenate([reset * hidden, x], axis=-1)
      candidate = jnp.tanh(conv(width, kernel, name=f"candidate{i}", dtype=self.dtype)(both))
      hidden = (1 - update) * hidden + update * candidate
    return hidden


def depthwise(
  x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
  """A convolution of each channel with its own kernel of odd side, zeros outside.

  A sum of shifted products: XLA's own convolution with as many groups as channels takes several
  times as long on a CPU.
  """
  h, w = x.shape[1:3]
  side = kernel.shape[0]
  half = side // 2
  padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  total = jnp.zeros_like(x)
  for row in range(side):
    for column in range(side):
      total += padded[:, row : row + h, column : column + w] * kernel[row, column, 0]
  return total


class ConvNeXtBlock(nn.Module):
  """Depthwise 7x7, norm, an MLP as a residual, then a 1x1 convolution to another width."""

  width: int
  hidden_width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    c, dtype = x.shape[-1], self.dtype
    kernel = self.param(
      "depthwise_kernel", nn.initializers.lecun_normal(), (_DEPTHWISE, _DEPTHWISE, 1, c)
    )
    bias = self.param("depthwise_bias", nn.initializers.zeros, (c,))
    gamma = self.param("gamma", nn.initializers.constant(1e-6), (c,))
    y = depthwise(x, kernel.astype(dtype)) + bias.astype(dtype)
    y = nn.LayerNorm(epsilon=_CONVNEXT_EPS, dtype=dtype, name="norm")(y)
    y = nn.Dense(self.hidden_width, dtype=dtype, name="fc1")(y)
    y = nn.Dense(c, dtype=dtype, name="fc2")(nn.gelu(y, approximate=False))
    return conv(self.width, (1, 1), name="out", dtype=dtype)(x + gamma.astype(dtype) * y)


class Head(nn.Module):
  """A 3x3 convolution, a rectifier, and a last convolution; float32 out.

  Attributes:
    width: channels in between.
    out_width: channels of the result.
    kernel: of the last convolution.
  """

  width: int
  out_width: int
  kernel: tuple[int, int] = (3, 3)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    x = nn.relu(conv(self.width, (3, 3), name="conv1", dtype=self.dtype)(x))
    x = conv(self.out_width, self.kernel, name="conv2", dtype=self.dtype)(x)
    return x.astype(jnp.float32)


def upsample_convex(
  values: Float[Array, "b h w c"], logits: Float[Array, "b h w n"], *, factor: int = 8
) -> Float[Array, "b h2 w2 c"]:
  """Each pixel of the result is a weighted mean of the 3 x 3 coarse pixels round its own.

  Args:
    values: at the coarse size; 0 outside.
    logits: of the weights: 9 neighbours (rows first) x the factor^2 pixels of a coarse one.
  """
  b, h, w, c = values.shape
  weights = jax.nn.softmax(logits.reshape(b, h, w, 9, factor, factor), axis=3)
  padded = jnp.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)))
  around = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
  # Flows are many pixels long: a device's short cuts for float32 would cost tenths of one.
  exact = jax.lax.Precision.HIGHEST
  around = jnp.stack(around, axis=3)
  fine = jnp.einsum("bhwkij,bhwkc->bhiwjc", weights, around, precision=exact)
  return fine.reshape(b, factor * h, factor * w, c)
