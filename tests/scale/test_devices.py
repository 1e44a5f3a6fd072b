"""One device or eight: the same run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_job
import tiny_model

from cwm_jax import checkpoint, train
from cwm_jax.pretrained import weights
from cwm_jax.tracker import Tracker

# Five steps on eight virtual devices, data 2 x fsdp 2 x tensor 2; then two more from one device's
# checkpoint; then what the planner says of this and other meshes.
EIGHT = """
import json, sys
import jax
import numpy as np
import tiny_job
from cwm_jax import sharding, train

sys.path.insert(0, "launch")
import plan

assert jax.device_count() == 8
config = tiny_job.get_config()
config.mesh.update(data=2, fsdp=2, tensor=2)
config.stop_after = "5 steps"
state = train.train(config, sys.argv[1])
block = state.params["encoder"]["blocks"]
assert tuple(block["fc1"]["kernel"].sharding.spec) == (None, "fsdp", "tensor")
assert tuple(block["fc2"]["kernel"].sharding.spec)[1] == "tensor"
for dense in ("fc1", "fc2"):
  kernel = block[dense]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
config.stop_after = ""
train.train(config, sys.argv[2])
rows = {"held": held}
for data, fsdp, tensor in ((8, 1, 1), (2, 2, 2), (1, 8, 1), (4, 1, 1), (4, 1, 2)):
  grid = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
  mesh = jax.sharding.Mesh(grid, sharding.AXES)
  rows[f"{data}x{fsdp}x{tensor}"] = plan.predict(tiny_job.get_config(), mesh, "tpu v5e")
print("ROWS" + json.dumps(rows))
"""


@pytest.fixture(scope="module")
def one_device_s_losses(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one")
  train.train(tiny_job.get_config(), workdir)
  return losses(workdir)


def losses(workdir):
  return [row["loss"] for row in tiny_job.rows(workdir)]


def test_eight_devices_give_one_device_s_losses_and_take_its_checkpoint(
  tmp_path, one_device_s_losses
):
  eight, moved = tmp_path / "eight", tmp_path / "moved"
  config = tiny_job.get_config()
  config.stop_after = "4 steps"
  train.train(config, moved)
  devices = f"--xla_force_host_platform_device_count=8 {tiny_job.QUICK}"
  done = tiny_job.run_script(EIGHT, str(eight), str(moved), XLA_FLAGS=devices)
  assert done.returncode == 0, done.stderr[-2000:]
  found = losses(eight)
  assert len(found) == 5
  np.testing.assert_allclose(found, one_device_s_losses[:5], rtol=1e-4)
  np.testing.assert_allclose(losses(moved), one_device_s_losses, rtol=1e-4)
  # And back: weights saved by eight devices are read on one.
  params, _ = checkpoint.load_params(eight)
  assert np.isfinite(params["head"]["kernel"]).all()
  check_plans(json.loads(done.stdout.partition("ROWS")[2]))


def check_plans(rows):
  """What the planner said of meshes of eight devices and of four, against what a device held."""
  held, split = rows.pop("held"), rows["2x2x2"]
  assert round(split["state_gib"] * 2**30) == held
  assert split["peak_gib"] > split["state_gib"]
  copies, shards = rows["8x1x1"], rows["1x8x1"]
  # A copy each, a quarter or half each, an eighth each; what does not divide is copied.
  assert copies["state_gib"] > 2 * split["state_gib"]
  assert copies["state_gib"] > 5 * shards["state_gib"]
  assert copies["peak_gib"] > split["peak_gib"]
  # The batch alone: gradients are summed and nothing else is sent. Split parameters are gathered;
  # split layers sum activations besides. Attention is split by heads: no token is sent to another
  # device for it (an all-to-all), only kernels are.
  kinds = {mesh: set(row["collectives"]) for mesh, row in rows.items()}
  assert kinds == {
    "8x1x1": {"all-reduce"},
    "4x1x1": {"all-reduce"},
    "1x8x1": {"all-reduce", "all-gather"},
    "4x1x2": {"all-reduce", "all-gather"},
    "2x2x2": {"all-reduce", "all-gather", "collective-permute"},
  }
  gradients = sum(one["gib"] for one in copies["collectives"].values())
  assert gradients == pytest.approx(copies["state_gib"] / 3, rel=0.1)  # two moments are the rest
  assert split["collectives"]["all-reduce"]["count"] > copies["collectives"]["all-reduce"]["count"]
  assert split["collectives"]["all-gather"]["gib"] < 1.4 * gradients
  # Two that share a pair each hold a part of its activations, and of the state.
  four, shared = rows["4x1x1"], rows["4x1x2"]
  assert shared["temporary_gib"] < 0.85 * four["temporary_gib"]
  assert shared["state_gib"] < 0.7 * four["state_gib"]
  # The work is the same, and dealt to twice the devices it takes half the time.
  assert all(row["step_tflop"] == copies["step_tflop"] for row in rows.values())
  for more in (copies, shared, split, shards):
    assert more["compute_s"] == pytest.approx(four["compute_s"] / 2)
  # Bytes that are sent take time; no device waits less than its longest part.
  for row in rows.values():
    parts = [row[name] for name in ("compute_s", "memory_s", "communication_s")]
    assert row["communication_s"] == pytest.approx(row["communicated_gib"] * 2**30 / 200e9)
    assert row["step_s"] == pytest.approx([max(parts), sum(parts)])


# A tracker on each of two virtual devices; each says what it found.
TRACKERS = """
import json, sys
import jax
import numpy as np
from cwm_jax.evals import spread
from cwm_jax.tracker import Tracker

assert jax.device_count() == 2
video, queries = np.load(sys.argv[2]), np.load(sys.argv[3])
workers = spread.one_each(lambda: Tracker.load(sys.argv[1], num_masks=2))
weights = [jax.tree.leaves(worker._tracker._engine._predict_fn.args)[0] for worker in workers]
assert [w.devices() for w in weights] == [{device} for device in jax.local_devices()]
found = [worker.track(video, queries) for worker in workers]
print("FOUND" + json.dumps([[values.tolist() for values in tracks] for tracks in found]))
"""


def test_the_tracker_answers_alike_on_each_of_two_devices_and_on_one(tmp_path):
  model = tiny_model.config(image_hw=(16, 24))
  _, shapes = weights.expected_shapes({"model": model}, where="the test")
  rng = np.random.default_rng(0)
  flat = {name: rng.normal(size=s).astype(np.float32) / 3 for name, s in shapes.items()}
  path = weights.save(tmp_path / "w.safetensors", weights.unflatten(flat), {"model": model})
  video = rng.integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
  queries = np.array([[0, 3.5, 4.5], [0, 12.2, 9.7], [1, 8.1, 15.3]])
  np.save(tmp_path / "video.npy", video)
  np.save(tmp_path / "queries.npy", queries)
  where = (str(path), str(tmp_path / "video.npy"), str(tmp_path / "queries.npy"))
  devices = f"--xla_force_host_platform_device_count=2 {tiny_job.QUICK}"
  done = tiny_job.run_script(TRACKERS, *where, XLA_FLAGS=devices)
  assert done.returncode == 0, done.stderr[-2000:]
  one = Tracker.load(path, num_masks=2).track(video, queries)
  assert np.ptp(one.xy) > 0
  both = json.loads(done.stdout.split("FOUND")[1])
  assert len(both) == 2
  for found in both:
    for mine, theirs in zip(found, one):
      np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_a_job_s_cpu_plays_as_many_devices_as_the_config_says(tmp_path, one_device_s_losses):
  done = tiny_job.run_main(f"--workdir={tmp_path}", "--config.cpu_devices=2")
  assert done.returncode == 0, done.stderr[-2000:]
  assert "2 devices" in done.stderr + done.stdout
  found = losses(tmp_path)
  assert len(found) == 6
  np.testing.assert_allclose(found, one_device_s_losses, rtol=1e-4)
