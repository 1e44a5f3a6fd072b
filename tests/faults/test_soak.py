"""A run that is killed at random moments ends as one that is left alone."""

from __future__ import annotations

import json
import subprocess
import sys

import tiny_job


def test_two_kills_at_random_moments_change_no_bit_of_the_result():
  command = [sys.executable, str(tiny_job.ROOT / "launch" / "bench_soak.py"), "--kills", "2"]
  done = subprocess.run(
    command,
    env=tiny_job.environment(XLA_FLAGS=tiny_job.QUICK),
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  row = json.loads(done.stdout)
  assert row["kills"] == 2 and row["identical"]
