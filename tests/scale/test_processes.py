"""One process or two: the same run, saved together and left together."""

from __future__ import annotations

import socket
import subprocess
import sys

import numpy as np
import tiny_job

from cwm_jax import train

# One of two processes with a device each: six steps, with pictures and a read-out on the way.
HALF = """
import sys
import jax
import tiny_job
from cwm_jax import train

if __name__ == "__main__":
  workdir, address, process = sys.argv[1:]
  jax.distributed.initialize(address, num_processes=2, process_id=int(process))
  assert (jax.process_count(), jax.device_count()) == (2, 2)
  config = tiny_job.get_config()
  config.checkpoint.every = "3 steps"
  config.log.update(eval_scenes=2, eval_masks=1, images_every="3 steps")
  train.train(config, workdir)
"""


def test_two_processes_give_one_process_s_losses_and_its_checkpoint(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  expected = train.train(tiny_job.get_config(), one)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  halves = [
    subprocess.Popen(
      [sys.executable, "-c", HALF, str(two), address, str(process)],
      cwd=tiny_job.ROOT,
      env=tiny_job.environment(JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo"),
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in (0, 1)
  ]
  try:
    said = [half.communicate(timeout=300)[1] for half in halves]
  finally:
    for half in halves:
      half.kill()
  assert [half.returncode for half in halves] == [0, 0], said[0][-2000:] + said[1][-2000:]
  losses = [[row["loss"] for row in tiny_job.rows(workdir)] for workdir in (one, two)]
  assert len(losses[1]) == 6
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  assert {path.name for path in (two / "pictures").iterdir()} >= {
    "batch_00000000.png",
    "prediction_00000003.png",
  }
  # What two saved, one goes on from.
  config = tiny_job.get_config()
  config.checkpoint.every = "3 steps"
  config.log.update(eval_scenes=0)
  state = train.train(config, two)
  assert int(state.step) == int(expected.step) == 6
