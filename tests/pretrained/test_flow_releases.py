"""Flow networks' releases, from the file that their authors publish to flow by `Tracker.load`."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_model
import torch_writer

from cwm_jax import models
from cwm_jax.configs import base, flow_networks
from cwm_jax.flow_tracker import FlowNetworkTracker
from cwm_jax.pretrained import flow_conversion, releases, weights
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError

# Sizes of a tiny network that a release's names can hold; iterations that are no naming's own.
TINY = tiny_model.flow_network() | dict(
  levels=4, iterations=3, block="residual", context_norm="batch", scale=0
)
SEA_RAFT = TINY | dict(feature_norm="batch", refine_blocks=2)
RAFT = TINY | dict(
  kind="raft", feature_norm="instance", gru="separable", upsampling="convex", head_width=5
)


def write_safetensors(path, state):
  """As the hub's own class writes a network: of two names of a tensor, the first one only."""
  twins = {n: n.replace("downsample.1", "bn3") for n in state if ".downsample.1." in n}
  kept = {name: array for name, array in state.items() if name not in twins}
  assert twins and set(twins.values()) <= set(kept)
  safetensors.numpy.save_file(kept, path, {"format": "pt", **twins})


def write_torch(path, state):
  arrays = {name: np.asarray(array) for name, array in state.items()}
  tensor = torch_writer.Tensor
  stored = {n: tensor(a) if a.ndim else tensor(a, stride=()) for n, a in arrays.items()}
  torch_writer.write(path, stored)


CASES = {
  "sea-raft-S": (
    SEA_RAFT,
    "sea_raft",
    write_safetensors,
    "sea_raft/Tartan-C-T-TSKH432x960-S/resolve/main/model.safetensors",
  ),
  "raft-large-C_T_SKHT_V2": (
    RAFT,
    "torchvision",
    write_torch,
    "raft/raft_large_C_T_SKHT_V2-ff5fadd5.pth",
  ),
}


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


@pytest.fixture
def site(tmp_path):
  """(a folder, the address that it is served at)."""
  folder = tmp_path / "site"
  folder.mkdir()
  handler = functools.partial(_Quiet, directory=folder)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def random_params(config):
  """Numbers with which every part of a network does something, and flows are a few pixels."""
  rng = np.random.default_rng(0)
  _, shapes = weights.expected_shapes(config, where="test")
  fan_in = {name: np.prod(shape[:-1]) if len(shape) > 1 else 9 for name, shape in shapes.items()}
  flat = {name: rng.normal(size=shape) / fan_in[name] ** 0.5 for name, shape in shapes.items()}
  flat = {n: np.exp(a) if n.endswith(("/var", "/scale")) else a for n, a in flat.items()}
  return weights.unflatten({name: array.astype(np.float32) for name, array in flat.items()})


@pytest.mark.parametrize("name", CASES)
def test_a_release_is_fetched_converted_and_answers_with_its_networks_flow(
  name, site, monkeypatch, tmp_path
):
  sizes, naming, write, place = CASES[name]
  monkeypatch.setenv("CWM_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setitem(flow_networks.NETWORKS, name, sizes)
  config = base.get_config()
  config.flow_network.update(sizes)
  params = random_params(config.to_dict())
  state = flow_conversion.to_state(params, naming, where="test")
  counted = [n.removesuffix("running_mean") for n in state if n.endswith("running_mean")]
  state |= {f"{n}num_batches_tracked": np.array(7) for n in counted}

  # The release is the published one but for where it lies and what its checksum begins with.
  folder, address = site
  release = releases.get(name)
  (file,) = release.files
  cached = tmp_path / "cache" / place
  assert cached == tmp_path / "cache" / release.folder / file.name
  (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
  write(folder / file.name, state)
  begins = hashlib.sha256((folder / file.name).read_bytes()).hexdigest()[:8]
  file = file._replace(address=address + file.name, sha256=file.sha256 and begins)
  table = {name: release._replace(files=(file,))}
  monkeypatch.setattr(releases, "_table", lambda: table)

  tracker = Tracker.load(name)
  assert isinstance(tracker, FlowNetworkTracker) and cached.is_file()
  video = np.random.default_rng(0).integers(0, 256, (2, 64, 72, 3), dtype=np.uint8)
  found = tracker.flow(*video, [[20.5, 30.5], [50.5, 10.5]])
  net = models.build_flow_network(config.flow_network)
  flow_xy = jax.jit(net.apply)({"params": params}, jnp.asarray(video[None] / 255.0)).flow_xy[0]
  want = np.asarray(flow_xy)[[30, 10], [20, 50]]
  assert np.abs(want).min() > 0.01
  np.testing.assert_allclose(found.xy - [[20.5, 30.5], [50.5, 10.5]], want, atol=1e-3)

  # Later neither the network nor what was fetched is needed.
  (folder / file.name).unlink()
  cached.unlink()
  made = releases.locate(name)
  assert made.parent == tmp_path / "cache" / release.folder
  np.testing.assert_array_equal(Tracker.load(name).flow(*video, [[20.5, 30.5]]).xy, found.xy[:1])


def test_a_release_that_cannot_be_fetched_says_from_where_and_whereto(monkeypatch, tmp_path):
  monkeypatch.setenv("CWM_JAX_CACHE", str(tmp_path))
  name = "sea-raft-S"
  release = releases.get(name)
  (file,) = release.files
  assert file.address == f"https://huggingface.co/MemorySlices/{file.name}"
  gone = release._replace(files=(file._replace(address=f"http://127.0.0.1:9/{file.name}"),))
  monkeypatch.setattr(releases, "_table", lambda: {name: gone})
  with pytest.raises(InputError) as caught:
    Tracker.load(name)
  assert f"http://127.0.0.1:9/{file.name}" in str(caught.value)
  assert f"put it at {tmp_path / CASES[name][-1]}" in str(caught.value)
