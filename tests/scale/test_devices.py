"""One device or eight: the same run."""

from __future__ import annotations

import numpy as np
import tiny_job

from cwm_jax import checkpoint, train

# Five steps on eight virtual devices, data 4 x fsdp 2; then two more from one device's checkpoint.
EIGHT = """
import sys
import jax
import tiny_job
from cwm_jax import train

assert jax.device_count() == 8
config = tiny_job.get_config()
config.mesh.update(data=4, fsdp=2)
config.stop_after = "5 steps"
state = train.train(config, sys.argv[1])
kernel = state.params["encoder"]["blocks"]["fc1"]["kernel"]
assert kernel.addressable_shards[0].data.size == kernel.size // 2
config.stop_after = ""
train.train(config, sys.argv[2])
"""


def test_eight_devices_give_one_device_s_losses_and_take_its_checkpoint(tmp_path):
  one, eight, moved = tmp_path / "one", tmp_path / "eight", tmp_path / "moved"
  train.train(tiny_job.get_config(), one)
  config = tiny_job.get_config()
  config.stop_after = "4 steps"
  train.train(config, moved)
  devices = "--xla_force_host_platform_device_count=8"
  done = tiny_job.run_script(EIGHT, str(eight), str(moved), XLA_FLAGS=devices)
  assert done.returncode == 0, done.stderr[-2000:]
  expected = [row["loss"] for row in tiny_job.rows(one)]
  found = [row["loss"] for row in tiny_job.rows(eight)]
  assert len(found) == 5
  np.testing.assert_allclose(found, expected[:5], rtol=1e-5)
  np.testing.assert_allclose([r["loss"] for r in tiny_job.rows(moved)], expected, rtol=1e-5)
  # And back: weights saved by eight devices are read on one.
  params, _ = checkpoint.load_params(eight)
  assert np.isfinite(params["head"]["kernel"]).all()
