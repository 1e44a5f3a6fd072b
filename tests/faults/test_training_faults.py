"""Training that is killed, told to stop, fed nonsense or given a bad workdir."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import tiny_job

from cwm_jax import train

# Trains, and is killed as by `kill -9` while it fetches the batch after its checkpoint of step 3.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import tiny_job
from cwm_jax import train
from cwm_jax.data import loader

workdir = Path(sys.argv[1])
if __name__ == "__main__":
  config = tiny_job.get_config()
  config.checkpoint.every = "3 steps"
  config.data.num_workers = int(sys.argv[2])
  fetch, fetched = loader.Loader.__next__, []

  def fetch_or_die(self):
    fetched.append(1)
    if len(fetched) == 5:
      while not (workdir / "checkpoints" / "3").exists():
        time.sleep(0.05)
      os.kill(os.getpid(), signal.SIGKILL)
    return fetch(self)

  loader.Loader.__next__ = fetch_or_die
  train.train(config, workdir)
"""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  """Six steps without interruption: (workdir, state)."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, train.train(tiny_job.get_config(), workdir)


@pytest.mark.parametrize("workers", [0, 2])
def test_six_steps_equal_three_and_kill_9_and_three_to_the_bit(whole_run, tmp_path, workers):
  killed = tiny_job.run_script(KILLED, str(tmp_path), str(workers))
  assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
  config = tiny_job.get_config()
  config.data.num_workers = workers
  state = train.train(config, tmp_path)
  workdir, expected = whole_run
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  resumed, whole = tiny_job.rows(tmp_path), tiny_job.rows(workdir)
  assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
  assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]


def test_sigterm_saves_and_leaves_with_exit_code_0(tmp_path):
  process = subprocess.Popen(
    tiny_job.command(f"--workdir={tmp_path}", config=":endless"),
    cwd=tiny_job.ROOT,
    env=tiny_job.environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  deadline = time.monotonic() + 200
  rows = tmp_path / "metrics.jsonl"
  while not (rows.exists() and len(rows.read_text().splitlines()) > 2):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 0, said[-2000:]
  assert "SIGTERM" in said.splitlines()[-1]
  [saved] = (tmp_path / "checkpoints").iterdir()
  assert int(saved.name) == tiny_job.rows(tmp_path)[-1]["step"] > 2


def test_a_loss_that_is_not_finite_stops_with_step_examples_and_last_good_checkpoint(tmp_path):
  config = tiny_job.get_config()
  config.optim.update(peak_lr=1e30, warmup="0 steps")
  config.checkpoint.every = "1 steps"
  with pytest.raises(train.NonFiniteError) as caught:
    train.train(config, tmp_path)
  told = str(caught.value)
  assert "loss of step 2 is not finite" in told
  assert "examples 8, 9, 10, 11, 12, 13, 14, 15;" in told
  assert "last good checkpoint is of step 1" in told
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def one_sentence(done: subprocess.CompletedProcess) -> str:
  """The error line of a command that found its input wanting."""
  assert done.returncode == 2, done.stderr[-2000:]
  lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1 and "Traceback" not in done.stderr
  return lines[0]


@pytest.mark.parametrize(
  "arguments, told",
  [
    (["--config.optim.peek_lr=1"], "no key 'optim.peek_lr': did you mean 'peak_lr'"),
    (["--config.optim.peak_lr=fast"], "fast"),
    (["--workdri=/tmp"], "workdri"),
    (["total=3"], "--config.key=value"),
    (["--workdir=gs://bucket/run"], "is a URL, not a folder"),
    ([], "--workdir is needed"),
  ],
)
def test_wrong_flags_are_one_sentence(arguments, told):
  assert told in one_sentence(tiny_job.run_main(*arguments))


def test_joining_a_cluster_where_there_is_none_is_one_sentence(tmp_path):
  done = tiny_job.run_main(f"--workdir={tmp_path}", "--distributed")
  assert "--distributed: the other processes cannot be joined" in one_sentence(done)


def test_a_missing_config_file_is_one_sentence(tmp_path):
  asked = tiny_job.command(f"--workdir={tmp_path}")
  asked[3] = f"--config={tmp_path}/none.py"
  done = subprocess.run(
    asked, cwd=tiny_job.ROOT, env=tiny_job.environment(), capture_output=True, text=True
  )
  assert f"no file {tmp_path}/none.py" in one_sentence(done)


def test_a_workdir_of_another_model_is_one_sentence(whole_run):
  workdir, _ = whole_run
  done = tiny_job.run_main(f"--workdir={workdir}", "--config.model.encoder_width=64")
  assert "model.encoder_width (32 -> 64)" in one_sentence(done)


@pytest.mark.parametrize(
  "change, code, told",
  [
    (lambda config: config["model"].update(later=1), 2, "model.later (1 -> None)"),
    (lambda config: config["model"].pop("positions"), 2, "model.positions ("),
    (lambda config: config["optim"].pop("ema_decay"), 0, "keep defaults: ['optim.ema_decay']"),
  ],
)
def test_a_workdir_of_another_version_goes_on_or_is_one_sentence(
  whole_run, tmp_path, change, code, told
):
  shutil.copytree(whole_run[0], tmp_path / "run")
  path = tmp_path / "run" / "config.json"
  config = json.loads(path.read_text())
  change(config)
  path.write_text(json.dumps(config))
  done = tiny_job.run_main(f"--workdir={tmp_path}/run")
  assert done.returncode == code, done.stderr[-2000:]
  assert told in (one_sentence(done) if code else done.stderr)


def test_a_workdir_that_cannot_be_written_is_one_sentence(tmp_path):
  (tmp_path / "file").write_text("in the way")
  done = tiny_job.run_main(f"--workdir={tmp_path}/file/run")
  assert "cannot be written" in one_sentence(done)
