"""Where arrays live: the mesh, and the rules that place parameters and batches on it.

A rule is (regex on the leaf's '/'-joined path, tactic); the first match wins. The optimizer's
moments carry their parameter's path, so one rule places all three.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cwm_jax.types import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = AXES[:2]
TACTICS = ("fsdp", "columns", "rows", "replicated")

Rules = Sequence[tuple[str, str]]


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh of all devices with the axes ("data", "fsdp", "tensor").

  Args:
    data: devices along which only the batch is split; -1 takes what the others leave.
    fsdp: devices along which parameters are split too; -1 takes what the others leave.
    tensor: devices that share the work on each pair; neighbours, all of one process.

  Raises:
    InputError: the sizes do not multiply to the number of devices, or `tensor` does not divide
      those of a process.
  """
  count, local = jax.device_count(), jax.local_device_count()
  if tensor < 1 or local % tensor:
    raise InputError(f"mesh.tensor is {tensor}; it must divide the {local} devices of a process")
  if data == -1 and fsdp > 0:
    data = count // (fsdp * tensor)
  elif fsdp == -1 and data > 0:
    fsdp = count // (data * tensor)
  if data < 1 or fsdp < 1 or data * fsdp * tensor != count:
    raise InputError(
      f"mesh.data x mesh.fsdp x mesh.tensor must be the number of devices, {count}; "
      f"data={data}, fsdp={fsdp}, tensor={tensor} is not (-1 on one of the first two takes what is "
      "left)"
    )
  shape = (data, fsdp, tensor)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_spec(
  name: str, shape: tuple[int, ...], rules: Rules, fsdp: int, tensor: int = 1
) -> PartitionSpec:
  """The placement of one leaf.

  Args:
    name: its path, '/'-joined.
    shape: its shape.
    rules: (regex, tactic); "columns" splits the last axis over `tensor` and "rows" the one before,
      where that divides; these and "fsdp" then split the largest axis that is left and that `fsdp`
      divides (the last of equals), or none if there is none; "replicated" keeps a copy everywhere.
    fsdp, tensor: devices on these axes.

  Raises:
    InputError: no rule matches, or the tactic is unknown.
  """
  tactic = next((tactic for pattern, tactic in rules if re.search(pattern, name)), None)
  if tactic not in TACTICS:
    what = f"is placed by {tactic!r}, not one of {TACTICS}" if tactic else "matches no rule"
    raise InputError(f"sharding: {name!r} {what}; end the rules with ('.*', 'replicated')")
  if tactic == "replicated":
    return PartitionSpec()
  spec = [None] * len(shape)
  back = {"columns": 1, "rows": 2}.get(tactic, 0)
  if back and tensor > 1 and len(shape) >= back and shape[-back] % tensor == 0:
    spec[-back] = "tensor"
  free = [axis for axis, size in enumerate(shape) if spec[axis] is None and size > 1]
  divisible = [axis for axis in free if fsdp > 1 and shape[axis] % fsdp == 0]
  if divisible:
    spec[max(divisible, key=lambda axis: (shape[axis], axis))] = "fsdp"
  return PartitionSpec(*spec) if any(spec) else PartitionSpec()


def state_shardings(abstract_state: Any, rules: Rules, mesh: Mesh) -> Any:
  """A tree of `NamedSharding` like `abstract_state` (a tree of things with a shape)."""
  tensor = mesh.shape["tensor"]

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, leaf_spec(name, leaf.shape, rules, mesh.shape["fsdp"], tensor))

  return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 of every array of a batch, split over all devices but those that share a pair."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, PartitionSpec())


def play_devices(count: int) -> None:
  """Has a CPU play so many devices. Where JAX is at work already, it keeps those it has.

  XLA_FLAGS may have said it too, and goes first.
  """
  if count < 2 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    logging.info("JAX is at work with %d devices already", jax.device_count())


def on_one_device(tree: Any) -> Any:
  """The tree on one device, for work that is not split: a CPU's devices would all do it, in turn.

  As it is where these are devices of their own, or hold parts only.
  """
  devices = jax.devices()
  whole = all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree))
  if len(devices) == 1 or devices[0].platform != "cpu" or jax.process_count() > 1 or not whole:
    return tree
  return jax.device_put(tree, devices[0])


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
  """Says at once when a batch cannot be split evenly.

  Raises:
    InputError: `batch_size` is not a multiple of `accumulate` x devices, those counted once that
      share a pair.
  """
  devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if accumulate < 1 or batch_size < 1 or batch_size % (accumulate * devices):
    raise InputError(
      f"data.batch_size {batch_size} must be a multiple of optim.accumulate ({accumulate}) "
      f"x devices ({devices})"
    )
