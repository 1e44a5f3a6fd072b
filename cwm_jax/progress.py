"""The progress line and what it is made of: rates, utilisation, compilations, time left."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

log = logging.getLogger(__name__)

# Dense peaks in TFLOP/s of one JAX device in its 16-bit format (bf16; fp16 where there is no bf16),
# from the makers' data sheets. The first name that stands as words in `device_kind` (lower case)
# counts, so longer names stand before shorter ones. JAX calls v5e "TPU v5 lite" and v5p "TPU v5";
# of v2 and v3 each device is half a chip.
PEAK_TFLOPS = {
  "b200": 2250.0,
  "gh200": 989.0,
  "h200": 989.0,
  "h100 pcie": 756.0,
  "h100 nvl": 835.0,
  "h100": 989.0,
  "a100": 312.0,
  "a10g": 70.0,
  "l40s": 362.0,
  "l4": 121.0,
  "rtx 4090": 165.0,
  "v100": 125.0,
  "t4": 65.0,
  "tpu v6 lite": 918.0,
  "tpu v6e": 918.0,
  "tpu v5 lite": 197.0,
  "tpu v5e": 197.0,
  "tpu v5p": 459.0,
  "tpu v5": 459.0,
  "tpu v4": 275.0,
  "tpu v3": 61.5,
  "tpu v2": 23.0,
}


def peak_flops(override_tflops: float = 0.0) -> float | None:
  """Peak FLOP/s of all devices together; None where the kind of device is not known."""
  tflops = override_tflops or known_tflops(jax.devices()[0].device_kind)
  return tflops * 1e12 * jax.device_count() if tflops else None


def known_tflops(device_kind: str) -> float | None:
  """Peak TFLOP/s of one device by the name that JAX gives its kind; None where it is not known."""
  kind = device_kind.lower()
  peaks = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", kind))
  return next(peaks, None)


def matmul_flops(function: Callable, *args: Any) -> float:
  """Floating-point operations of the matrix products and convolutions in a call of `function`.

  Counted in the traced program rather than asked of the compiler, whose cost analysis counts the
  body of a scanned stack once. Recomputation under remat is not in a forward pass, so three times a
  loss's count is the customary model FLOPs of a training step.

  Args:
    function: anything that JAX can trace.
    args: arrays or `ShapeDtypeStruct`s.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      inner = math.prod(shape[axis] for axis in contract)
      total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
    elif eqn.primitive.name == "conv_general_dilated":
      # Each number out is a sum over a kernel's extent and the input features of its group.
      kernel = eqn.invars[1].aval.shape
      features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
      inner = math.prod(kernel) // features
      total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
    elif eqn.primitive.name.startswith("dot_product_attention_fwd"):
      # cuDNN's attention hides its two products: queries [b, t, heads, d], keys [b, s, heads, d].
      queries, keys = (variable.aval.shape for variable in eqn.invars[:2])
      total += 4.0 * math.prod(queries) * keys[1]
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    total += times * sum(_count(sub) for sub in jaxprs_in_params(eqn.params))
  return total


class CompilationCounter:
  """Counts backend compilations in this process from its construction on."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._hear)

  def _hear(self, event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      self.count += 1


class Progress:
  """Averages metrics between reports and turns them, with the clock, into one row.

  Args:
    batch_size: pairs a step.
    total_steps: length of the run.
    flops_per_pair: model FLOPs of one trained pair, or None where they are not known.
    peak: FLOP/s of all devices, or None.
  """

  def __init__(
    self, *, batch_size: int, total_steps: int, flops_per_pair: float | None, peak: float | None
  ):
    self._batch_size, self._total_steps = batch_size, total_steps
    self._flops_per_pair, self._peak = flops_per_pair, peak
    self._compilations = CompilationCounter()
    self._values: list[dict[str, float]] = []
    self._since: tuple[int, float] | None = None

  def add(self, step: int, values: dict[str, float]) -> None:
    """Takes in the metrics of the update that led to `step`."""
    self._values.append(values)
    if self._since is None:
      # The first step's time is compilation, not training.
      self._since = (step, time.perf_counter())

  def pause(self, seconds: float) -> None:
    """Leaves out time that was not spent on training: evaluation, pictures."""
    if self._since is not None:
      self._since = (self._since[0], self._since[1] + seconds)

  def row(self, step: int) -> dict[str, float]:
    """Means since the last row, rates, and the number of compilations; logs the progress line."""
    names = self._values[-1]
    row = {name: float(np.mean([values[name] for values in self._values])) for name in names}
    row["compilations"] = self._compilations.count
    begun, clock = self._since
    now = time.perf_counter()
    line = [f"step {step}/{self._total_steps}", f"loss {row['loss']:.5f}"]
    if step > begun and now > clock:
      rate = (step - begun) * self._batch_size / (now - clock)
      row["pairs_per_second"] = rate
      line.append(f"{rate:.0f} pairs/s" if rate >= 10 else f"{rate:.2f} pairs/s")
      if self._peak and self._flops_per_pair is not None:
        row["flops_utilisation"] = rate * self._flops_per_pair / self._peak
        line.append(f"MFU {100 * row['flops_utilisation']:.1f} %")
      left = (self._total_steps - step) * self._batch_size / rate
      line.append(f"eta {format_seconds(left)}")
    log.info("  ".join(line))
    self._values, self._since = [], (step, now)
    return row


def format_seconds(seconds: float) -> str:
  """12:05 or 3:04:05."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
