"""The planner, which compiles in haste, against the step that training compiles."""

from __future__ import annotations

import sys

import pytest
import tiny_job

from cwm_jax import programs, sharding, tasks

# The planner's machine code is not optimised, so less is fused in it: what it plans for may be more
# than is needed, never much less.
AT_MOST, AT_LEAST = 1.5, 0.9


@pytest.fixture
def plan(monkeypatch):
  monkeypatch.syspath_prepend(tiny_job.ROOT / "launch")
  import plan

  yield plan
  del sys.modules["plan"]


@pytest.mark.parametrize("batch", [8, 64])
def test_the_memory_planned_for_is_what_the_compiled_step_takes(plan, batch):
  config = tiny_job.get_config()
  config.data.batch_size = batch
  mesh = sharding.make_mesh()
  row = plan.predict(config, mesh, "tpu v5e")
  task = tasks.build(config)
  built = programs.build(config, task, mesh, steps=lambda value, name: 2 if "warm" in name else 6)
  pair = programs.pair_shapes(task, batch, place=sharding.batch_sharding(mesh))
  memory = built.update.lower(built.wanted, pair).compile().memory_analysis()
  taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  taken += memory.output_size_in_bytes - memory.alias_size_in_bytes
  assert AT_LEAST <= row["peak_gib"] * 2**30 / taken <= AT_MOST
  # Nearly all of it is the batch's: eight times the pairs, several times the memory.
  assert row["peak_gib"] > 2 * row["state_gib"]
