"""Checkpoints that are cut short, damaged or have no room; each is made to happen."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_job

from cwm_jax import checkpoint, fingerprint
from cwm_jax.types import InputError, TrainState


def state_at(step):
  """A state whose numbers depend on the step and on their place."""
  kernel = jnp.asarray(np.random.default_rng(step).normal(size=(64, 48)), jnp.float32)
  params = {"a": {"kernel": kernel, "bias": jnp.full((3,), float(step))}}
  return TrainState(jnp.asarray(step, jnp.int32), params, ({"mu": params},), None)


def numbers():
  return iter(grain.MapDataset.range(100).to_iter_dataset())


def save(workdir, *steps):
  checkpoints = checkpoint.Checkpoints(workdir)
  checkpoint.keep_config(workdir, {"total": "3 steps"})
  for step in steps:
    checkpoints.save(step, state_at(step), numbers())
  checkpoints.close()


def restore(workdir):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state_at(0)
  )
  checkpoints = checkpoint.Checkpoints(workdir)
  try:
    return checkpoints.restore(wanted, numbers())
  finally:
    checkpoints.close()


def largest_file(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


def flip(path, share):
  """Flips one bit of a file, at a share of its length."""
  data = bytearray(path.read_bytes())
  data[int(share * (len(data) - 1))] ^= 1 << 4
  path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("two") / "run"
  save(workdir, 2, 3)
  return workdir


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.9, "truncated"])
def test_one_flipped_bit_or_a_lost_half_falls_back_to_the_checkpoint_before(
  two_steps, tmp_path, caplog, share
):
  workdir = tmp_path / "run"
  shutil.copytree(two_steps, workdir)
  damaged = largest_file(workdir / "checkpoints" / "3" / "state")
  if share == "truncated":
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
  else:
    flip(damaged, share)
  with caplog.at_level(logging.WARNING, logger="cwm_jax"):
    state = restore(workdir)
  jax.tree.map(np.testing.assert_array_equal, state, state_at(2))
  assert "checkpoint of step 3 cannot be read" in caplog.text


def test_numbers_that_read_well_but_are_not_what_was_saved_are_refused(tmp_path, monkeypatch):
  # What a bit does that no file format notices: other numbers under the old fingerprints.
  honest = fingerprint.of_tree
  with monkeypatch.context() as patch:
    patch.setattr(fingerprint, "of_tree", lambda tree: honest(state_at(7)))
    save(tmp_path, 3)
  with pytest.raises(InputError, match="step is not what was saved"):
    restore(tmp_path)
  with pytest.raises(InputError, match="no checkpoint"):
    checkpoint.load_params(tmp_path)


def test_any_flipped_bit_and_any_exchange_of_two_values_changes_the_fingerprint():
  values = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
  whole = fingerprint.of_tree({"x": jnp.asarray(values)})["x"]
  found = {whole}
  for bit in range(32):
    changed = values.copy()
    changed.view(np.uint32)[2, 3] ^= np.uint32(1) << np.uint32(bit)
    found.add(fingerprint.of_tree({"x": jnp.asarray(changed)})["x"])
  exchanged = values.copy()
  exchanged[[0, 1]] = exchanged[[1, 0]]
  found.add(fingerprint.of_tree({"x": jnp.asarray(exchanged)})["x"])
  assert len(found) == 34


def test_a_checkpoint_of_before_there_were_fingerprints_is_read(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "_FINGERPRINTS", "something_else")
    save(tmp_path, 3)
  jax.tree.map(np.testing.assert_array_equal, restore(tmp_path), state_at(3))


# Saves step 2, and is killed as by `kill -9` in the save of step 3, at the named file operation.
KILLED_IN_A_SAVE = """
import os, signal, sys
workdir, moment = sys.argv[1:]
saving = []

def kill(event, arguments):
  if saving and event == moment and any("checkpoints/3" in str(a) for a in arguments):
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
  sys.path.insert(0, "tests/faults")
  import test_checkpoint_faults as test
  test.save(workdir, 2)
  sys.addaudithook(kill)
  saving.append(1)
  test.save(workdir, 3)
"""


@pytest.mark.parametrize("moment", ["os.mkdir", "os.rename"])
def test_a_run_killed_in_a_save_goes_on_from_the_checkpoint_before(tmp_path, moment):
  killed = tiny_job.run_script(KILLED_IN_A_SAVE, str(tmp_path), moment)
  assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
  left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
  assert "2" in left and "3" not in left
  jax.tree.map(np.testing.assert_array_equal, restore(tmp_path), state_at(2))
  save(tmp_path, 3)
  jax.tree.map(np.testing.assert_array_equal, restore(tmp_path), state_at(3))


# Trains on a disk that is full once the checkpoint of step 3 is there; then with room again.
FULL_DISK = """
import sys
from pathlib import Path
import tiny_job
from cwm_jax import fingerprint, train, types
from cwm_jax.data import loader

if __name__ == "__main__":
  disk, whole = Path(sys.argv[1]), sys.argv[2]
  filler, fetch, fetched = disk / "filler", loader.Loader.__next__, []

  def fetch_and_fill(self):
    fetched.append(1)
    if len(fetched) == 5:
      tiny_job.wait_for(disk / "run" / "checkpoints" / "3")
      with filler.open("wb", buffering=0) as file:
        try:
          while True:
            file.write(bytes(4096))
        except OSError as error:
          assert error.strerror == "No space left on device"
    return fetch(self)

  config = tiny_job.get_config()
  config.checkpoint.every = "3 steps"
  loader.Loader.__next__ = fetch_and_fill
  try:
    train.train(config, disk / "run")
  except types.SaveError as error:
    print("SENTENCE", error)
  filler.unlink()
  print("KEPT", *sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()))
  resumed = fingerprint.of_tree(train.train(config, disk / "run"))
  print("SAME", resumed == fingerprint.of_tree(train.train(config, whole)))
"""


@pytest.fixture
def on_a_disk(tmp_path):
  """Runs a command on a file system of our own, so that no other is harmed; `$disk` in a shell."""
  mount = ["unshare", "-Urm", "sh", "-c"]
  if subprocess.run([*mount, "mount -t tmpfs none /tmp"], capture_output=True).returncode:
    reason = "this system does not let users mount a file system of their own"
    if os.environ.get("CI", "").lower() in ("1", "true"):
      pytest.fail(reason)
    pytest.skip(reason)
  disk = tmp_path / "disk"
  disk.mkdir()

  def run(*command, first="true"):
    return subprocess.run(
      [*mount, f'mount -t tmpfs -o size=16m none "$0" && {first} && exec "$@"', disk, *command],
      cwd=tiny_job.ROOT,
      env=tiny_job.environment(),
      capture_output=True,
      text=True,
      timeout=240,
    )

  run.disk = disk
  return run


def test_a_full_disk_is_a_sentence_and_with_room_again_the_run_goes_on_exactly(on_a_disk, tmp_path):
  done = on_a_disk(sys.executable, "-c", FULL_DISK, on_a_disk.disk, tmp_path / "whole")
  assert done.returncode == 0, done.stderr[-3000:]
  told = next(line for line in done.stdout.splitlines() if line.startswith("SENTENCE"))
  assert "No space left on device" in told or "RESOURCE_EXHAUSTED" in told
  assert "start again with the same command" in told
  assert "SAME True" in done.stdout


# A job whose disk turns read-only once the checkpoint of step 3 is there.
READ_ONLY_DISK = """
import subprocess, sys
from pathlib import Path
import tiny_job
from cwm_jax import main
from cwm_jax.data import loader

if __name__ == "__main__":
  disk = sys.argv[1]
  checkpoints, fetch, fetched = Path(disk, "run", "checkpoints"), loader.Loader.__next__, []

  def fetch_and_lock(self):
    fetched.append(1)
    if len(fetched) == 5:
      tiny_job.wait_for(checkpoints / "3")
      # A second mount over the first, which files that are open for writing would keep as it is.
      subprocess.run(["mount", "--bind", disk, disk], check=True)
      subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    return fetch(self)

  loader.Loader.__next__ = fetch_and_lock
  asked = tiny_job.command(f"--workdir={disk}/run", "--config.checkpoint.every=3 steps")
  sys.argv = asked[2:]
  try:
    main.main()
  finally:
    print("KEPT", *sorted(path.name for path in checkpoints.iterdir()))
"""


def sentence(done, code):
  """The one line with which a job left."""
  assert done.returncode == code, done.stderr[-3000:]
  [told] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert "Read-only file system" in told and "Traceback" not in done.stderr
  return told


def test_a_disk_that_turns_read_only_is_a_sentence_and_the_last_checkpoint_stays(on_a_disk):
  done = on_a_disk(sys.executable, "-c", READ_ONLY_DISK, on_a_disk.disk)
  assert "start again with the same command" in sentence(done, 4)
  assert done.stdout.splitlines()[-1] == "KEPT 3"


def test_a_start_on_a_read_only_disk_is_a_sentence(on_a_disk):
  command = tiny_job.command(f"--workdir={on_a_disk.disk}/run")
  done = on_a_disk(*command, first='mount -o remount,ro "$0"')
  assert f"workdir {on_a_disk.disk}/run cannot be written" in sentence(done, 2)
