"""Placement rules, and meshes that cannot be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from cwm_jax import sharding
from cwm_jax.types import InputError

FSDP = ((".*", "fsdp"),)


@pytest.mark.parametrize(
  "shape, spec",
  [
    ((12, 768, 3072), PartitionSpec(None, None, "fsdp")),  # the largest axis
    ((3072, 768), PartitionSpec("fsdp", None)),
    ((8, 8), PartitionSpec(None, "fsdp")),  # the last of equals
    ((9, 6), PartitionSpec(None, "fsdp")),  # the largest does not divide
    ((3, 5), PartitionSpec()),
    ((), PartitionSpec()),
  ],
)
def test_fsdp_splits_the_largest_axis_that_divides(shape, spec):
  assert sharding.leaf_spec("params/x", shape, FSDP, 2) == spec


@pytest.mark.parametrize(
  "tactic, shape, spec",
  [
    ("columns", (12, 768, 3072), PartitionSpec(None, "fsdp", "tensor")),
    ("columns", (12, 3072), PartitionSpec("fsdp", "tensor")),  # a bias of each layer
    ("rows", (12, 3072, 768), PartitionSpec(None, "tensor", "fsdp")),
    ("columns", (8, 9), PartitionSpec("fsdp", None)),  # 9 does not divide
    ("fsdp", (4, 8), PartitionSpec(None, "fsdp")),
  ],
)
def test_columns_and_rows_are_split_over_tensor_and_the_largest_other_axis_over_fsdp(
  tactic, shape, spec
):
  assert sharding.leaf_spec("params/x", shape, ((".*", tactic),), 2, 2) == spec


def test_the_first_matching_rule_wins():
  rules = (("head", "replicated"), (".*", "fsdp"))
  assert sharding.leaf_spec("params/head/kernel", (8, 8), rules, 2) == PartitionSpec()
  assert sharding.leaf_spec("params/body/kernel", (8, 8), rules, 2) != PartitionSpec()


@pytest.mark.parametrize("rules", [(("head", "fsdp"),), ((".*", "sideways"),)])
def test_a_leaf_without_a_rule_or_an_unknown_tactic_is_named(rules):
  with pytest.raises(InputError, match="params/body/kernel"):
    sharding.leaf_spec("params/body/kernel", (8, 8), rules, 2)


def test_moments_lie_where_their_parameters_lie():
  leaf = jax.ShapeDtypeStruct((4, 8), jnp.float32)
  state = {"params": {"a": {"kernel": leaf}}, "opt_state": ({"mu": {"a": {"kernel": leaf}}},)}
  rules = (("a/kernel", "fsdp"), (".*", "replicated"))
  places = sharding.state_shardings(state, rules, sharding.make_mesh())
  assert places["params"]["a"] == places["opt_state"][0]["mu"]["a"]


@pytest.mark.parametrize("data, fsdp", [(3, 7), (0, 1), (-1, -1), (-1, 1000)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(data, fsdp):
  with pytest.raises(InputError, match="number of devices"):
    sharding.make_mesh(data=data, fsdp=fsdp)


def test_devices_that_share_a_pair_are_of_one_process():
  with pytest.raises(InputError, match=r"mesh\.tensor is 2; it must divide the 1 devices"):
    sharding.make_mesh(tensor=2)


def test_a_batch_that_cannot_be_cut_evenly_is_refused():
  mesh = sharding.make_mesh()
  sharding.check_batch(12, 3, mesh)
  with pytest.raises(InputError, match="multiple of optim.accumulate"):
    sharding.check_batch(10, 3, mesh)
