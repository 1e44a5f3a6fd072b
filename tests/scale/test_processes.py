"""One process, two or four: the same run, saved together, left together, gone on with by others."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import numpy as np
import tiny_job

from cwm_jax import train

# One of several processes with a device each; goes on to a step, and notes which examples it read.
PART = """
import json, sys
import jax
import tiny_job
from cwm_jax import train
from cwm_jax.data import loader

if __name__ == "__main__":
  workdir, address, count, process, steps = sys.argv[1:]
  jax.distributed.initialize(address, num_processes=int(count), process_id=int(process))
  assert jax.process_count() == jax.device_count() == int(count)
  fetch, read = loader.Loader.__next__, []

  def noted(self):
    batch = fetch(self)
    read.append(batch["index"].tolist())
    return batch

  loader.Loader.__next__ = noted
  loader.Loader.skipped = lambda self: 10 ** int(process)
  config = tiny_job.get_config()
  config.checkpoint.every = "3 steps"
  config.stop_after = steps
  if not steps:
    config.log.update(eval_scenes=2, eval_masks=1, images_every="3 steps")
  train.train(config, workdir)
  with open(f"{workdir}/read-{count}-{process}.json", "w") as file:
    json.dump(read, file)
"""


def run(workdir, count, steps=""):
  """Several processes to their common end."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  parts = [
    subprocess.Popen(
      [sys.executable, "-c", PART, str(workdir), address, str(count), str(process), steps],
      cwd=tiny_job.ROOT,
      env=tiny_job.environment(JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo", XLA_FLAGS=tiny_job.QUICK),
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(count)
  ]
  try:
    said = [part.communicate(timeout=300)[1] for part in parts]
  finally:
    for part in parts:
      part.kill()
  assert [part.returncode for part in parts] == [0] * count, "".join(s[-2000:] for s in said)


def test_four_processes_and_then_two_give_one_process_s_losses_and_its_checkpoint(tmp_path):
  one, several = tmp_path / "one", tmp_path / "several"
  expected = train.train(tiny_job.get_config(), one)
  run(several, 4, steps="3 steps")
  run(several, 2)
  losses = [[row["loss"] for row in tiny_job.rows(workdir)] for workdir in (one, several)]
  assert len(losses[1]) == 6
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
  skipped = [row["skipped_items"] for row in tiny_job.rows(several)]
  assert skipped == [1111] * 3 + [11] * 3  # what each of them passed over, together
  # No example is read twice or left out where four processes end and two go on.
  for count, first in ((4, 0), (2, 3)):
    shares = [
      json.loads((several / f"read-{count}-{process}.json").read_text()) for process in range(count)
    ]
    for k, step in enumerate(range(first, first + 3)):
      read = [index for share in shares for index in share[k]]
      assert read == list(range(8 * step, 8 * step + 8))
  assert {path.name for path in (several / "pictures").iterdir()} >= {
    "batch_00000000.png",
    "prediction_00000006.png",
  }
  # What two saved, one goes on from.
  config = tiny_job.get_config()
  config.checkpoint.every = "3 steps"
  config.log.update(eval_scenes=0)
  state = train.train(config, several)
  assert int(state.step) == int(expected.step) == 6
