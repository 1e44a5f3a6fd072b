"""An evaluation that is killed goes on clip by clip."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny_job
from tapvid_clips import write_clip

from cwm_jax import evaluate
from cwm_jax.configs import eval_tapvid
from cwm_jax.evals import trackers
from cwm_jax.types import InputError

# Evaluates zero motion, and is killed as by `kill -9` when it is asked about the third clip.
KILLED = """
import os, signal, sys
from cwm_jax import evaluate
from cwm_jax.configs import eval_tapvid
from cwm_jax.evals import trackers

asked = []

class Killed(trackers.ZeroMotion):
  def track(self, video, queries_tyx, **settings):
    asked.append(1)
    if len(asked) == 3:
      os.kill(os.getpid(), signal.SIGKILL)
    return super().track(video, queries_tyx, **settings)

trackers.BASELINES["zero"] = Killed
config = eval_tapvid.get_config()
config.evaluate.update(tapvid=sys.argv[1], trackers=("zero",), protocols=("first",))
evaluate.run(config, sys.argv[2])
"""


@pytest.fixture
def config(tmp_path):
  for i in range(4):
    write_clip(tmp_path / "clips" / f"clip{i}", frames=4, hw=(24, 32), points=2, seed=i)
  c = eval_tapvid.get_config()
  c.evaluate.update(tapvid=str(tmp_path / "clips"), trackers=("zero",), protocols=("first",))
  return c


def test_a_killed_evaluation_asks_only_about_the_clips_that_are_left(config, tmp_path, monkeypatch):
  killed = tiny_job.run_script(KILLED, config.evaluate.tapvid, str(tmp_path / "run"))
  assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
  asked = []

  class Counted(trackers.ZeroMotion):
    def track(self, video, queries_tyx, **settings):
      asked.append(1)
      return super().track(video, queries_tyx, **settings)

  monkeypatch.setitem(trackers.BASELINES, "zero", Counted)
  resumed = evaluate.run(config, tmp_path / "run")["tapvid/first"]["zero"]
  assert len(asked) == 2
  whole = evaluate.run(config, tmp_path / "whole")["tapvid/first"]["zero"]
  assert len(asked) == 6
  for numbers in (resumed, whole):
    del numbers["seconds"]
  np.testing.assert_equal(resumed, whole)
  table = "tapvid/first/zero/clips.csv"
  assert (tmp_path / "run" / table).read_text() == (tmp_path / "whole" / table).read_text()


def test_answers_left_by_a_stopped_run_are_not_taken_for_those_of_other_settings(
  config, tmp_path, monkeypatch
):
  class Stopped(trackers.ZeroMotion):
    def track(self, video, queries_tyx, **settings):
      raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setitem(trackers.BASELINES, "zero", Stopped)
    evaluate.run(config, tmp_path / "run")
  other = {"resolution": "nearest_16", "tapvid": str(tmp_path / "clips" / "clip0")}
  for key, value in other.items():
    kept, config.evaluate[key] = config.evaluate[key], value
    with pytest.raises(InputError, match=key):
      evaluate.run(config, tmp_path / "run")
    config.evaluate[key] = kept
  assert evaluate.run(config, tmp_path / "run")["tapvid/first"]["zero"]["num_clips"] == 4


def test_an_unknown_argument_of_a_config_is_told_in_its_own_sentence(tmp_path):
  config = f"--config={tiny_job.ROOT / 'configs' / 'eval_tapvid.py'}:relase"
  command = [sys.executable, "-m", "cwm_jax.main", config, f"--workdir={tmp_path}"]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=120, env=tiny_job.environment()
  )
  assert done.returncode == 2
  assert done.stderr == (
    "error: eval_tapvid takes strided, release, release_distilled or runlocal, not 'relase'\n"
  )
