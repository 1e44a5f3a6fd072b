"""The flow networks of the releases see frames as their authors' evaluations showed them."""

from __future__ import annotations

import pytest

from cwm_jax import models
from cwm_jax.configs import base, flow_networks


@pytest.mark.parametrize("name", flow_networks.NETWORKS)
def test_only_what_raft_learned_on_kitti_last_is_padded_at_the_bottom_alone(name):
  section = dict(base.get_config().flow_network) | flow_networks.network(name)
  network = models.build_flow_network(section)
  kitti = name.startswith("raft-large") and "_K_" in name
  assert network.padding == ("bottom" if kitti else "split")
  if name.startswith("raft"):
    assert network.iterations == (24 if kitti else 32)


def test_both_versions_for_kitti_are_among_the_networks():
  assert sum("_K_" in name for name in flow_networks.NETWORKS) == 2
