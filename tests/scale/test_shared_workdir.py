"""Two processes, one workdir: a checkpoint that one of them cannot read, a folder it cannot see."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import tiny_job

# One of two processes. Saves steps 2 and 3; what process 1 alone reads of step 3 is damaged, and
# process 0 is slow to set it aside. Then both go on, and ask for a folder that each has to itself.
PART = """
import shutil, sys, time
from pathlib import Path
import grain.python as grain
import jax
import numpy as np
from cwm_jax import checkpoint, processes, workdirs
from cwm_jax.types import InputError, TrainState

workdir, address, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, num_processes=2, process_id=process)
split = jax.sharding.NamedSharding(jax.make_mesh((2,), ("d",)), jax.sharding.PartitionSpec("d"))
whole = jax.sharding.NamedSharding(split.mesh, jax.sharding.PartitionSpec())


def placed(value, where):
  return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def state_at(step):
  values = {"a": placed(np.full(4, step, np.float32), split)}
  return TrainState(placed(np.int32(step) + np.zeros((), np.int32), whole), values, (), None)


def numbers():
  return iter(grain.MapDataset.range(100).to_iter_dataset())


move = shutil.move
shutil.move = lambda *paths: (time.sleep(1), move(*paths))
with workdirs.working(workdir):
  checkpoints, iterator = checkpoint.Checkpoints(workdir), numbers()
  for step in (2, 3):
    next(iterator)
    checkpoints.save(step, state_at(step), iterator)
  checkpoints.close()
  if process == 0:
    (workdir / "checkpoints" / "3" / "data" / "process_1-of-2.json").write_text("damaged")
  processes.meet()
  checkpoints, iterator = checkpoint.Checkpoints(workdir), numbers()
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_at(0)
  )
  state = checkpoints.restore(shapes, iterator)
  print("AT", int(state.step), next(iterator), checkpoints.steps)
  checkpoints.save(3, state_at(3), iterator)
  checkpoints.close()
  print("SAVED", checkpoints.steps)
  workdirs._APPEARS_S = 0.1
  try:
    with workdirs.working(f"{workdir}/of-{process}"):
      pass
  except InputError as error:
    print("TOLD", error)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
  """(workdir, what each of the two printed)."""
  workdir = tmp_path_factory.mktemp("shared")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  parts = [
    subprocess.Popen(
      [sys.executable, "-c", PART, str(workdir), address, str(process)],
      cwd=tiny_job.ROOT,
      env=tiny_job.environment(JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo", XLA_FLAGS=tiny_job.QUICK),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in (0, 1)
  ]
  try:
    out = [part.communicate(timeout=240) for part in parts]
  finally:
    for part in parts:
      part.kill()
  assert [part.returncode for part in parts] == [0, 0], "".join(err[-3000:] for _, err in out)
  return workdir, [out for out, _ in out]


def test_where_one_of_two_cannot_read_its_part_both_go_on_from_the_checkpoint_before(said):
  workdir, told = said
  for printed in told:
    assert "AT 2 1 [2]\n" in printed  # one element had been read as step 2 was saved
    assert "SAVED [2, 3]\n" in printed
  assert (workdir / "unreadable" / "3").is_dir()


def test_a_folder_that_is_not_the_same_for_all_is_a_sentence_in_each(said):
  for printed in said[1]:
    assert "TOLD process 1 of 2 does not see the workdir of process 0" in printed
