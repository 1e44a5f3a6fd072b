"""The stored numbers, by programs compiled exactly as a user's process compiles them."""

from __future__ import annotations

import subprocess
import sys

import tiny_job


def test_the_stored_destinations_are_found_by_programs_that_users_compile(cwm_goldens):
  """Token, mark, passes, difference and read-out; other tests take a quicker compiler."""
  test = tiny_job.ROOT / "tests" / "parity" / "test_flow.py"
  chosen = ("-n", "0", "-k", "destinations_of_whole_frames", str(test))
  done = subprocess.run(
    [sys.executable, "-m", "pytest", *chosen],
    cwd=tiny_job.ROOT,
    env=tiny_job.environment(XLA_FLAGS="", JAX_DISABLE_MOST_OPTIMIZATIONS="0"),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
  assert " passed" in done.stdout
