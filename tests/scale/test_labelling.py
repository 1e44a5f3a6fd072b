"""Two processes label together: every pair once, and one manifest of all."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import label_job
import numpy as np
import tiny_job

from cwm_jax import label
from cwm_jax.data import labels

PART = """
import sys
import jax

port, rank, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
assert jax.process_count() == 2
import label_job
from cwm_jax import label

assert label.run(label_job.get_config(), workdir)["complete"]
"""


def test_two_processes_make_the_shards_that_one_makes(tmp_path):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  together, alone = tmp_path / "together", tmp_path / "alone"
  ways = dict(cwd=tiny_job.ROOT, stderr=subprocess.PIPE, text=True)
  ways["env"] = tiny_job.environment(XLA_FLAGS=tiny_job.QUICK)
  parts = [
    subprocess.Popen([sys.executable, "-c", PART, port, str(rank), str(together)], **ways)
    for rank in range(2)
  ]
  try:
    said = [part.communicate(timeout=300)[1] for part in parts]
  finally:
    for part in parts:
      part.kill()
  assert [part.returncode for part in parts] == [0, 0], "".join(s[-2000:] for s in said)
  label.run(label_job.get_config(), alone)
  assert json.loads((together / label.MANIFEST).read_text())["complete"]
  for one, other in zip(label_job.records(together), label_job.records(alone), strict=True):
    for name in labels.FIELDS:
      # The renderer's rounding may differ by a level where processes compile it otherwise.
      np.testing.assert_allclose(one[name].astype(float), other[name].astype(float), atol=1.0)
  # Each process told of its own shards; the first one's are rows.
  rows = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 3]
