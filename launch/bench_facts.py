"""What every row of a benchmark says beside its own numbers: the machine, the memory, the rest.

The benches import it; it measures nothing by itself.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from cwm_jax import progress

_VERSIONS = ("cwm-jax", "jax", "jaxlib", "flax")


def row(
  measure: str,
  *,
  compilations: int | None,
  baseline: str | None = None,
  ratio: float | None = None,
  flop_per_second: float | None = None,
  on_devices: int = 1,
  peak: float | None = None,
  **numbers: Any,
) -> dict[str, Any]:
  """A row of a bench.

  Args:
    measure: what is measured; the bench's name.
    compilations: backend compilations that it took; None where they say nothing.
    baseline: what took part in the same run to be compared with, with its version if it is not
      ours; None where nothing did.
    ratio: our rate over the baseline's; None without one.
    flop_per_second: of the model, for `flops_utilisation`; None where no model is at work.
    on_devices: how many devices worked on that.
    peak: MiB; None takes `peak_mib`.
    **numbers: the bench's own, with its settings.

  Returns:
    JSON-ready. `flops_utilisation` is None where the device's peak is not known, as a CPU's.
  """
  return dict(
    measure=measure,
    **numbers,
    baseline=baseline,
    ratio=ratio if ratio is None else round(ratio, 3),
    flops_utilisation=_utilisation(flop_per_second, on_devices),
    peak_mib=peak_mib() if peak is None else round(peak, 1),
    compilations=compilations,
    **facts(),
  )


def facts() -> dict[str, Any]:
  """Machine, devices and versions."""
  return dict(
    machine=_processor(),
    cores=len(os.sched_getaffinity(0)),
    device=jax.devices()[0].device_kind,
    devices=jax.device_count(),
    versions=dict(python=platform.python_version())
    | {name: metadata.version(name) for name in _VERSIONS},
  )


def peak_mib() -> float | None:
  """The most memory in use so far: of the first device where it tells, else of this process.

  Not `ru_maxrss`, which a process takes over from the one that started it.
  """
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return round(stats["peak_bytes_in_use"] / 2**20, 1)
  status = Path("/proc/self/status")
  lines = status.read_text().splitlines() if status.exists() else []
  kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
  return round(kib[0] / 1024, 1) if kib else None


def pass_flops(predict_fn: Any, image_hw: tuple[int, int], grid_hw: tuple[int, int]) -> float:
  """Model FLOPs of one pass through a predictor."""
  frames = jax.ShapeDtypeStruct((1, 2, *image_hw, 3), "float32")
  mask = jax.ShapeDtypeStruct((1, 2, *grid_hw), "bool")
  return progress.matmul_flops(predict_fn, frames, mask)


def _utilisation(flop_per_second: float | None, on_devices: int) -> float | None:
  known = progress.known_tflops(jax.devices()[0].device_kind)
  if known is None or flop_per_second is None:
    return None
  return round(flop_per_second / (known * 1e12 * on_devices), 4)


def _processor() -> str:
  info = Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()
