"""RAFT against flows computed by torchvision's, whose key names come in as a release's do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import models
from cwm_jax.pretrained import convert

FOLDER = Path(__file__).parents[2] / "third_party" / "raft"
LIMIT_PX = 1e-2


@pytest.fixture(scope="module")
def rules():
  """The script that made the stored flows, for its rules of weights and frames."""
  spec = importlib.util.spec_from_file_location("make_goldens", FOLDER / "make_goldens.py")
  made = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(made)
  return made


@pytest.mark.parametrize(
  "size, release",
  [("raft_large", "raft-large-C_T_V2"), ("raft_small", "raft-small-C_T_V2")],
  ids=["large", "small"],
)
def test_every_iteration_says_torchvisions_flow(rules, size, release):
  stored = golden_files.arrays(FOLDER / "goldens", size)
  shapes = {
    str(name): tuple(map(int, str(shape).split()))
    for name, shape in zip(stored["names"], stored["shapes"])
  }
  made = convert.from_state(rules.weights(shapes), release=release, where=size)
  net = models.build_flow_network(made.config["flow_network"])
  want = stored["flow_xy"]
  call = jax.jit(lambda p, f: net.apply({"params": p}, f, iterations=len(want), every=True))
  found = np.asarray(call(made.params, jnp.asarray(rules.frames()[None])).flow_xy)[:, 0]
  rows, columns = (golden_files.stride(found.shape[i], want.shape[i]) for i in (1, 2))
  # An estimate that stood still, or none at all, would be seen.
  assert np.abs(np.diff(want, axis=0, prepend=0)).max(axis=(1, 2, 3)).min() > 100 * LIMIT_PX
  for got, flow_xy in zip(found[:, ::rows, ::columns], want, strict=True):
    np.testing.assert_allclose(got, flow_xy, rtol=0, atol=LIMIT_PX)
