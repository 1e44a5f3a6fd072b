"""The planner, which compiles in haste, against the step that training compiles."""

from __future__ import annotations

import sys

import pytest
import tiny_job

from cwm_jax import programs, sharding, tasks

# The planner's machine code is not optimised, so less is fused in it: what it plans for may be more
# than is needed, never much less.
AT_MOST, AT_LEAST = 1.5, 0.9


BATCHES = (8, 64)
TPU_V5E_FLOPS, TPU_V5E_BYTES_S = 197e12, 819e9


@pytest.fixture(scope="module")
def rows():
  """{pairs in a batch: the planner's row for one device}."""
  with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(tiny_job.ROOT / "launch")
    import plan

    made = {}
    for batch in BATCHES:
      config = tiny_job.get_config()
      config.data.batch_size = batch
      made[batch] = plan.predict(config, sharding.make_mesh(), "tpu v5e")
    yield made
    del sys.modules["plan"]


@pytest.mark.parametrize("batch", BATCHES)
def test_the_memory_planned_for_is_what_the_compiled_step_takes(rows, batch):
  config = tiny_job.get_config()
  config.data.batch_size = batch
  row, mesh = rows[batch], sharding.make_mesh()
  task = tasks.build(config)
  built = programs.build(config, task, mesh, steps=lambda value, name: 2 if "warm" in name else 6)
  pair = programs.pair_shapes(task, batch, place=sharding.batch_sharding(mesh))
  memory = built.update.lower(built.wanted, pair).compile().memory_analysis()
  taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  taken += memory.output_size_in_bytes - memory.alias_size_in_bytes
  assert AT_LEAST <= row["peak_gib"] * 2**30 / taken <= AT_MOST
  # Nearly all of it is the batch's: eight times the pairs, several times the memory.
  assert row["peak_gib"] > 2 * row["state_gib"]


def test_the_time_of_a_step_is_its_parts_hidden_behind_the_longest_or_one_after_the_other(rows):
  few, many = (rows[batch] for batch in BATCHES)
  for batch, row in rows.items():
    parts = [row[name] for name in ("compute_s", "memory_s", "communication_s")]
    assert row["step_s"] == pytest.approx([max(parts), sum(parts)])
    assert row["pairs_per_second"] == pytest.approx([batch / sum(parts), batch / max(parts)])
    assert row["compute_s"] == pytest.approx(row["step_tflop"] * 1e12 / TPU_V5E_FLOPS)
    # Alone it sends nothing. Its state at least is read and written.
    assert (row["communication_s"], row["collectives"]) == (0, {})
    assert row["memory_s"] > 2 * row["state_gib"] * 2**30 / TPU_V5E_BYTES_S
  assert many["compute_s"] == pytest.approx(8 * few["compute_s"])
