"""Labelling that is killed: at any moment, as often as you like."""

from __future__ import annotations

import signal

import label_job
import numpy as np
import tiny_job

from cwm_jax import label
from cwm_jax.data import labels

# Labels, and is killed as by `kill -9` at the n-th of the moments that touch disk or data.
KILLED = """
import os, signal, sys
import label_job
from cwm_jax import label, whole_files
from cwm_jax.data import labels, loader

workdir, pairs, left = sys.argv[1], int(sys.argv[2]), [int(sys.argv[3])]

def deadly(home, name):
  done = getattr(home, name)

  def instead(*args, **kwargs):
    left[0] -= 1
    if not left[0]:
      os.kill(os.getpid(), signal.SIGKILL)
    return done(*args, **kwargs)

  setattr(home, name, instead)

deadly(loader.Loader, "__next__")
deadly(labels, "encode")
deadly(whole_files, "write_json")
deadly(os, "replace")
config = label_job.get_config()
config.label.pairs = pairs
label.run(config, workdir)
"""
KILLS = 5
# In shards of 4: five kills within 25 moments each leave some to be done.
PAIRS = 46


def test_killed_five_times_at_random_the_shards_hold_every_pair_once(tmp_path):
  random = np.random.default_rng(0)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  config = label_job.get_config()
  config.label.pairs = PAIRS
  label.run(config, whole)
  for _ in range(KILLS):
    # A shard is 11 moments, from reading its first batch to replacing the manifest.
    moment = random.integers(2, 25)
    run = tiny_job.run_script(KILLED, str(killed), str(PAIRS), str(moment))
    assert run.returncode == -signal.SIGKILL, run.stderr[-2000:]
  assert 0 < len(labels.find_shards(killed)) < len(labels.find_shards(whole))
  assert label.run(config, killed)["complete"]
  assert [int(record["index"]) for record in label_job.records(killed)] == list(range(PAIRS))
  for one, other in zip(label_job.records(killed), label_job.records(whole), strict=True):
    for name in labels.FIELDS:
      np.testing.assert_array_equal(one[name], other[name])
