"""A job small enough for tests: 16 x 16 pixels, 4 x 4 patches, width 32; a file for --config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from cwm_jax.configs import base

ROOT = Path(__file__).parent.parent
# XLA_FLAGS as conftest sets them; a process with the same ones reads the programs that others kept.
QUICK = "--xla_cpu_use_fusion_emitters=false"


def get_config(arg: str = ""):
  c = base.get_config()
  c.total = "6 steps"
  c.model.update(
    image_hw=(16, 16),
    patch=4,
    mask_ratio=0.75,
    positions="rotary",
    encoder_width=32,
    encoder_depth=1,
    encoder_heads=2,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=2,
  )
  c.optim.update(peak_lr=1e-3, warmup="2 steps")
  c.data.batch_size = 8
  c.data.sources.scenes.update(curriculum=((0, "shifts"),), max_objects=1)
  c.log.update(every="1 steps", eval_every="0 steps", images_every="0 steps", eval_scenes=0)
  c.checkpoint.every = "0 steps"
  if arg == "endless":
    c.total = "1000000 steps"
  return c


def environment(**extra: str) -> dict[str, str]:
  """The environment of a subprocess: this one's, on the CPU, with the tests' modules at hand."""
  paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
  return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, **extra}


def run_main(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
  """`python -m cwm_jax.main` with this file as the config, to its end."""
  return subprocess.run(command(*arguments), **_ways(), timeout=timeout, check=False)


def command(*arguments: str, config: str = "") -> list[str]:
  """The command line of a job with this file as its config."""
  chosen = f"--config={Path(__file__)}{config}"
  return [sys.executable, "-m", "cwm_jax.main", chosen, *arguments]


def run_script(script: str, *arguments: str, timeout: float = 240, **extra: str):
  """Python source in a process of its own."""
  ways = {**_ways(), "env": environment(**extra)}
  asked = [sys.executable, "-c", script, *arguments]
  return subprocess.run(asked, **ways, timeout=timeout, check=False)


def wait_for(path: Path) -> None:
  """Returns once a file or folder is there; fails where it is not within a minute."""
  deadline = time.monotonic() + 60
  while not path.exists():
    assert time.monotonic() < deadline, f"{path} is not there after a minute"
    time.sleep(0.05)


def rows(workdir: Path) -> list[dict]:
  """The rows of a run's metrics.jsonl."""
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _ways() -> dict:
  return dict(cwd=ROOT, env=environment(), capture_output=True, text=True)
