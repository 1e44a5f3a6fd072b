"""The command line under test: how to run it, and what it is given."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import tiny_model

from cwm_jax import cli, viz
from cwm_jax.pretrained import weights

MODEL = tiny_model.config(image_hw=[32, 32])


def random_params(config):
  _, shapes = weights.expected_shapes(config, where="test")
  rng = np.random.default_rng(0)
  flat = {n: 0.2 * rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
  return weights.unflatten(flat)


def frames(count=6, h=40, w=56):
  """A textured picture that drifts to the right."""
  wide = np.random.default_rng(1).integers(0, 256, (h // 4, w // 2, 3), np.uint8)
  wide = viz.resized(wide, (h, w * 2))
  return np.stack([wide[:, count - t : count - t + w] for t in range(count)])


def run(capsys, *argv):
  """Runs one command line; returns (exit code, stdout, stderr)."""
  code = cli.main([str(arg) for arg in argv])
  return code, *capsys.readouterr()


def interrupted(ready, *argv):
  """Runs one command line in a process of its own that gets Ctrl-C once `ready()` is true.

  Returns:
    (stdout, stderr).
  """
  asked = [sys.executable, "-m", "cwm_jax.cli", *map(str, argv)]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  with subprocess.Popen(asked, **pipes, text=True, env=env) as process:
    try:
      deadline = time.monotonic() + 300
      while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{argv[0]} has finished nothing that was waited for"
        time.sleep(0.02)
      process.send_signal(signal.SIGINT)
      stdout, stderr = process.communicate(timeout=180)
    finally:
      process.kill()
  assert process.returncode == 130 and "Traceback" not in stderr, stderr
  return stdout, stderr
