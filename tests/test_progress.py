"""FLOP counts, device peaks, rows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from cwm_jax import progress
from cwm_jax.models import layers


def test_matrix_products_in_a_scan_are_counted_once_an_iteration():
  def function(x, weights):
    y, _ = jax.lax.scan(lambda x, w: (jax.jit(jnp.dot)(x, w), None), x, weights)
    return jnp.sum(y @ y.T)

  x, weights = jnp.ones((5, 4)), jnp.ones((7, 4, 4))
  assert progress.matmul_flops(function, x, weights) == 7 * 2 * 5 * 4 * 4 + 2 * 5 * 4 * 5


def test_attention_counts_alike_whoever_computes_it(monkeypatch):
  # Tracing is all that is asked for, so a machine without cuDNN will do.
  cudnn = "jax._src.cudnn.fused_attention_stablehlo"
  monkeypatch.setattr(f"{cudnn}.check_cudnn_version", lambda: 90800)
  monkeypatch.setattr(f"{cudnn}.check_compute_capability", lambda *_: True)
  q = jax.ShapeDtypeStruct((2, 48, 3, 64), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((2, 32, 3, 64), jnp.bfloat16)
  for implementation in ("einsum", "xla", "cudnn"):
    attend = partial(layers.attend, implementation=implementation)
    assert progress.matmul_flops(attend, q, k, k) == 2 * (2 * 2 * 48 * 32 * 3 * 64)


def test_a_convolution_counts_as_a_product_of_its_window_for_every_number_out():
  image, kernel = jnp.ones((2, 16, 16, 3)), jnp.ones((8, 8, 3, 5))

  def strided(image, kernel):
    return jax.lax.conv_general_dilated(
      image, kernel, (4, 4), ((2, 2), (2, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  assert strided(image, kernel).shape == (2, 4, 4, 5)
  assert progress.matmul_flops(strided, image, kernel) == 2 * (2 * 4 * 4 * 5) * (8 * 8 * 3)


def test_a_given_peak_counts_for_every_device():
  assert progress.peak_flops(2.0) == 2e12 * jax.device_count()


@pytest.mark.parametrize(
  "kind, tflops",
  [
    ("NVIDIA H200", 989.0),
    ("NVIDIA H100 80GB HBM3", 989.0),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA A100-SXM4-80GB", 312.0),
    ("NVIDIA L40S", 362.0),
    ("NVIDIA L4", 121.0),
    ("TPU v4", 275.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5", 459.0),
    ("TPU v6 lite", 918.0),
    ("NVIDIA L40", None),
    ("NVIDIA RTX A1000 Laptop GPU", None),
    ("cpu", None),
  ],
)
def test_a_device_is_known_by_the_name_that_jax_gives_it(kind, tflops):
  assert progress.known_tflops(kind) == tflops


def test_a_row_averages_since_the_last_one_and_leaves_pauses_out(monkeypatch):
  clock = iter([100.0, 110.0, 130.0])
  monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
  meter = progress.Progress(batch_size=4, total_steps=100, flops_per_pair=50.0, peak=1000.0)
  meter.add(1, {"loss": 9.0})
  assert meter.row(1)["loss"] == 9.0
  meter.add(2, {"loss": 1.0})
  meter.add(3, {"loss": 2.0})
  meter.pause(16.0)
  row = meter.row(3)
  assert row["loss"] == 1.5
  assert row["pairs_per_second"] == pytest.approx(2 * 4 / (130 - 110 - 16))
  assert row["flops_utilisation"] == pytest.approx(2 * 50 / 1000)


def test_a_row_tells_no_utilisation_where_the_flops_are_not_known(monkeypatch):
  clock = iter([100.0, 110.0])
  monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
  meter = progress.Progress(batch_size=4, total_steps=100, flops_per_pair=None, peak=1000.0)
  for step in (1, 2):
    meter.add(step, {"loss": 1.0})
  row = meter.row(2)
  assert row["pairs_per_second"] == pytest.approx(4 / 10) and "flops_utilisation" not in row


@pytest.mark.parametrize("seconds, text", [(65.4, "1:05"), (3 * 3600 + 61, "3:01:01")])
def test_times_read_as_clocks(seconds, text):
  assert progress.format_seconds(seconds) == text
