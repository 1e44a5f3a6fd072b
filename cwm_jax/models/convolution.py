"""Convolutions of stride 1 whose gradient a CPU computes as matrix products.

Inside a loop XLA computes a kernel's gradient on a CPU without its fast routines: in the update
loop of a flow network that was nine tenths of a training step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def same(inputs: Array, kernel: Array, *_: Any, **__: Any) -> Array:
  """For `nn.Conv` in the place of `jax.lax.conv_general_dilated`: the same numbers.

  Only for one group, stride 1, and padding by half of a kernel of odd sides: that is what it does,
  whatever `nn.Conv` asks for.
  """
  return _same(inputs, kernel) if jax.default_backend() == "cpu" else _plain(inputs, kernel)


def _plain(x: Float[Array, "b h w c"], kernel: Float[Array, "k l c o"]) -> Float[Array, "b h w o"]:
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


_same = jax.custom_vjp(_plain)


def _forward(x, kernel):
  return _plain(x, kernel), (x, kernel)


def _backward(kept, gradient):
  x, kernel = kept
  (h, w), (rows, columns) = x.shape[1:3], kernel.shape[:2]
  to_x = _plain(gradient, jnp.swapaxes(kernel[::-1, ::-1], 2, 3))
  padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
  to_kernel = [
    jnp.einsum("bhwi,bhwo->io", padded[:, row : row + h, column : column + w], gradient)
    for row in range(rows)
    for column in range(columns)
  ]
  return to_x, jnp.stack(to_kernel).reshape(kernel.shape)


_same.defvjp(_forward, _backward)
