"""Several processes label together: every pair once, and one manifest of all."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import label_job
import numpy as np
import pytest
import tiny_job

from cwm_jax import label
from cwm_jax.data import labels

PART = """
import sys
import jax

port, count, rank, workdir = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=rank)
assert jax.process_count() == count
import label_job
from cwm_jax import label

assert label.run(label_job.get_config(), workdir)["complete"]
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The workdir of one process."""
  workdir = tmp_path_factory.mktemp("alone")
  label.run(label_job.get_config(), workdir)
  return workdir


# Of three shards the first process makes the first and, of two processes, the third; of four the
# last one makes none.
@pytest.mark.parametrize(("count", "shards_of_first"), [(2, [1, 3]), (4, [1])])
def test_several_processes_make_the_shards_that_one_makes(count, shards_of_first, alone, tmp_path):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  together = tmp_path / "together"
  ways = dict(cwd=tiny_job.ROOT, stderr=subprocess.PIPE, text=True)
  ways["env"] = tiny_job.environment(XLA_FLAGS=tiny_job.QUICK)
  parts = [
    subprocess.Popen(
      [sys.executable, "-c", PART, port, str(count), str(rank), str(together)], **ways
    )
    for rank in range(count)
  ]
  try:
    said = [part.communicate(timeout=300)[1] for part in parts]
  finally:
    for part in parts:
      part.kill()
  assert [part.returncode for part in parts] == [0] * count, "".join(s[-2000:] for s in said)
  assert json.loads((together / label.MANIFEST).read_text())["complete"]
  for one, other in zip(label_job.records(together), label_job.records(alone), strict=True):
    for name in labels.FIELDS:
      # Where processes compile the renderer otherwise, its rounding may differ by a level, and a
      # few pixels fall to the other side of an edge.
      assert np.mean(np.abs(one[name].astype(float) - other[name]) > 1) < 0.01
  # Each process told of its own shards; the first one's are rows.
  rows = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == shards_of_first


# Several marks a pass, by one tracker on the only device, and by one on each of two.
MARKS = """
import sys
import jax
import label_job
import toy_predictors
from cwm_jax import label
from cwm_jax.evals import named, spread
from cwm_jax.tracker import Tracker

assert len(jax.local_devices()) == int(sys.argv[2])
mark = {"kind": "gaussian", "amplitude": 1.0, "sigma": 0.7}
sizes = dict(image_hw=(16, 16), patch=4, num_masks=2, mask_ratio=0.75)
trackers = []

def build():
  predict = toy_predictors.shifted_by(1, 2)
  trackers.append(Tracker(predict, **sizes, mark=mark, readout="window"))
  return trackers[-1]

workers = spread.one_each(build)
named.build = lambda name, settings: workers
config = label_job.get_config()
config.label.update(pairs=4, points=16, marks=4, round_trip=True)
assert label.run(config, sys.argv[1])["complete"]
assert len(trackers) == int(sys.argv[2])
assert all(tracker.passes[0] > 0 for tracker in trackers)
"""


def test_several_marks_a_pass_are_asked_on_two_devices_as_on_one(tmp_path):
  for count in (1, 2):
    ways = f"--xla_force_host_platform_device_count={count} {tiny_job.QUICK}"
    done = tiny_job.run_script(MARKS, str(tmp_path / str(count)), str(count), XLA_FLAGS=ways)
    assert done.returncode == 0, done.stderr[-2000:]
  one, two = (label_job.records(tmp_path / str(count)) for count in (1, 2))
  assert len(one) == 4 and max(np.ptp(record["flow_xy"]) for record in one) > 0
  for mine, theirs in zip(two, one, strict=True):
    for name in labels.FIELDS:
      np.testing.assert_allclose(
        mine[name].astype(float), theirs[name].astype(float), atol=1e-3, err_msg=name
      )
