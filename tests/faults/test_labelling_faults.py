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
from cwm_jax import label
from cwm_jax.data import labels, loader

workdir, left = sys.argv[1], [int(sys.argv[2])]

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
deadly(label, "_write_json")
deadly(os, "replace")
label.run(label_job.get_config(), workdir)
"""
KILLS = 5


def test_killed_five_times_at_random_the_shards_hold_every_pair_once(tmp_path):
  random = np.random.default_rng(0)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  label.run(label_job.get_config(), whole)
  for _ in range(KILLS):
    # From reading the first batch to replacing the second shard's manifest there are 22 moments.
    run = tiny_job.run_script(KILLED, str(killed), str(random.integers(2, 20)))
    assert run.returncode in (-signal.SIGKILL, 0), run.stderr[-2000:]
  manifest = label.run(label_job.get_config(), killed)
  assert manifest["complete"]
  assert [int(record["index"]) for record in label_job.records(killed)] == list(range(10))
  for one, other in zip(label_job.records(killed), label_job.records(whole), strict=True):
    for name in labels.FIELDS:
      np.testing.assert_array_equal(one[name], other[name])
