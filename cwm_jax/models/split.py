"""Where a mesh that shares out the work on each pair cuts a layer.

The compiler follows the places of the parameters, which `sharding` decides; it is told more only
where a cut that follows from them would be a bad one. Without such a mesh nothing happens here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

# The axes of `sharding.make_mesh`: those that split the batch, and that whose devices share a pair.
_BATCH, _AXIS = ("data", "fsdp"), "tensor"
_ANY = PartitionSpec.UNCONSTRAINED


def by_heads(fused: Float[Array, "*c fused"], heads: int) -> Float[Array, "*c 3 heads d"]:
  """A fused query, key, value kernel or bias as [..., 3, heads, d], each device with its own heads.

  Devices hold consecutive columns, which are other heads' in two of three parts. So the kernel is
  gathered and each device takes its heads out; left alone, the compiler gathers what the kernel
  makes of all tokens, which is more, forwards and backwards.
  """
  devices = _mesh().get(_AXIS, 1)
  parts = (3, heads, fused.shape[-1] // (3 * heads))
  others = (_ANY,) * (fused.ndim - 1)
  if devices == 1 or heads % devices:
    return fused.reshape(*fused.shape[:-1], *parts)
  whole = jax.lax.with_sharding_constraint(fused, PartitionSpec(*others, None))
  split = PartitionSpec(*others, None, _AXIS, None)
  return jax.lax.with_sharding_constraint(whole.reshape(*fused.shape[:-1], *parts), split)


def known() -> bool:
  """Whether what is being traced is for a mesh that is known here."""
  return bool(_mesh())


def each_its_own(
  fn: Callable[..., Array], *arrays: Float[Array, "b _ heads d"]
) -> Float[Array, "b n heads d"]:
  """fn(*arrays), each device with its own pairs and heads: a loop over them stays its own."""
  sizes, (b, _, heads, _) = _mesh(), arrays[0].shape
  if math.prod(sizes.values()) == 1:
    return fn(*arrays)
  spec = PartitionSpec(
    None if b % math.prod(sizes[axis] for axis in _BATCH) else _BATCH,
    None,
    None if heads % sizes[_AXIS] else _AXIS,
    None,
  )
  run = jax.shard_map(fn, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)
  return run(*arrays)


def _mesh() -> dict[str, int]:
  """Devices on each axis; {} where there is no mesh of ours."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  return sizes if {*_BATCH, _AXIS} <= sizes.keys() else {}
