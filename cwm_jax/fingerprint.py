"""A fingerprint of every array of a tree, the same however the tree lies on devices and processes.

Orbax does not notice every flipped bit of what it reads; checkpoints therefore keep fingerprints of
what was saved, and what is read back must have the same.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# Unsigned integers of a leaf's own width; wider ones do not occur without jax_enable_x64.
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def of_tree(tree: Any) -> dict[str, int]:
  """{'/'-joined path: fingerprint, 0 to 2**32 - 1} of arrays that all processes hold together.

  Whole numbers are summed modulo 2**32, each times an odd number of its own, so no order of
  summation matters, and any one flipped bit, or two values exchanged, changes the sum.
  """
  named, _ = jax.tree_util.tree_flatten_with_path(tree)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
  sums = jax.device_get(_sums([leaf for _, leaf in named]))
  return {name: int(value) for name, value in zip(names, sums)}


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_sum(leaf) for leaf in leaves]


def _sum(leaf: jax.Array) -> jax.Array:
  leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
  words = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape)
  return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
