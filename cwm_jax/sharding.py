"""Where arrays live: the mesh, and the rules that place parameters and batches on it.

A rule is (regex on the leaf's '/'-joined path, tactic); the first match wins. The optimizer's
moments carry their parameter's path, so one rule places all three.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cwm_jax.types import InputError

AXES = ("data", "fsdp")
TACTICS = ("fsdp", "replicated")

Rules = Sequence[tuple[str, str]]


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
  """A mesh of all devices with the axes ("data", "fsdp").

  Args:
    data: devices along which only the batch is split; -1 takes what `fsdp` leaves.
    fsdp: devices along which parameters are split too; -1 takes what `data` leaves.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  count = jax.device_count()
  if data == -1 and fsdp > 0:
    data = count // fsdp
  elif fsdp == -1 and data > 0:
    fsdp = count // data
  if data < 1 or fsdp < 1 or data * fsdp != count:
    raise InputError(
      f"mesh.data x mesh.fsdp must be the number of devices, {count}; "
      f"data={data}, fsdp={fsdp} is not (-1 on one of them takes what is left)"
    )
  return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_spec(name: str, shape: tuple[int, ...], rules: Rules, fsdp: int) -> PartitionSpec:
  """The placement of one leaf.

  Args:
    name: its path, '/'-joined.
    shape: its shape.
    rules: (regex, tactic); "fsdp" splits the largest axis that `fsdp` divides (the last of equals),
      or none if there is none; "replicated" keeps a copy on every device.
    fsdp: devices on the fsdp axis.

  Raises:
    InputError: no rule matches, or the tactic is unknown.
  """
  tactic = next((tactic for pattern, tactic in rules if re.search(pattern, name)), None)
  if tactic not in TACTICS:
    what = f"is placed by {tactic!r}, not one of {TACTICS}" if tactic else "matches no rule"
    raise InputError(f"sharding: {name!r} {what}; end the rules with ('.*', 'replicated')")
  divisible = [axis for axis, size in enumerate(shape) if size > 1 and size % fsdp == 0]
  if tactic == "replicated" or fsdp == 1 or not divisible:
    return PartitionSpec()
  chosen = max(divisible, key=lambda axis: (shape[axis], axis))
  return PartitionSpec(*("fsdp" if axis == chosen else None for axis in range(len(shape))))


def state_shardings(abstract_state: Any, rules: Rules, mesh: Mesh) -> Any:
  """A tree of `NamedSharding` like `abstract_state` (a tree of things with a shape)."""

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, leaf_spec(name, leaf.shape, rules, mesh.shape["fsdp"]))

  return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 of every array of a batch, split over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
  """Says at once when a batch cannot be split evenly.

  Raises:
    InputError: `batch_size` is not a multiple of `accumulate` x devices.
  """
  devices = math.prod(mesh.shape.values())
  if accumulate < 1 or batch_size < 1 or batch_size % (accumulate * devices):
    raise InputError(
      f"data.batch_size {batch_size} must be a multiple of optim.accumulate ({accumulate}) "
      f"x devices ({devices})"
    )
