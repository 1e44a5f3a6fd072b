"""What every row of a benchmark says of the machine and the versions it was measured with."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax


def facts() -> dict[str, Any]:
  """Machine, devices and versions."""
  return dict(
    machine=_processor(),
    cores=len(os.sched_getaffinity(0)),
    device=jax.devices()[0].device_kind,
    devices=jax.device_count(),
    python=platform.python_version(),
    versions={name: metadata.version(name) for name in ("cwm-jax", "jax", "jaxlib", "flax")},
  )


def _processor() -> str:
  info = Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()
