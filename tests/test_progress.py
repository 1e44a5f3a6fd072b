"""FLOP counts, device peaks, rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from cwm_jax import progress


def test_matrix_products_in_a_scan_are_counted_once_an_iteration():
  def function(x, weights):
    y, _ = jax.lax.scan(lambda x, w: (jax.jit(jnp.dot)(x, w), None), x, weights)
    return jnp.sum(y @ y.T)

  x, weights = jnp.ones((5, 4)), jnp.ones((7, 4, 4))
  assert progress.matmul_flops(function, x, weights) == 7 * 2 * 5 * 4 * 4 + 2 * 5 * 4 * 5


def test_a_given_peak_counts_for_every_device():
  assert progress.peak_flops(2.0) == 2e12 * jax.device_count()


def test_every_known_device_is_found_by_its_full_name():
  # A shorter name that stands first would hide a longer one that contains it.
  names = list(progress.PEAK_TFLOPS)
  for place, name in enumerate(names):
    assert not [short for short in names[:place] if short in name]


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


@pytest.mark.parametrize("seconds, text", [(65.4, "1:05"), (3 * 3600 + 61, "3:01:01")])
def test_times_read_as_clocks(seconds, text):
  assert progress.format_seconds(seconds) == text
