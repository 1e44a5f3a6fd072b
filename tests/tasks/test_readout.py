"""Held-out scenes: drawn as the job's own, from seeds that the training never takes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_job

from cwm_jax import geometry, tasks
from cwm_jax.data import procedural, rendering
from cwm_jax.tasks import bottleneck, held_out_flow, readout
from cwm_jax.types import FramePair, InputError

SHIFTS = procedural.PRESETS["shifts"]


def settings(**changes):
  drawn = dict(before_seed=1000, max_objects=1, texture_size=0, supersample=2)
  return dict(image_hw=(16, 16), num_scenes=3, **drawn) | changes


def test_held_out_scenes_are_drawn_by_the_settings_of_the_job_s_own(monkeypatch):
  """The renderer is stood in for by one that paints the settings it is given."""
  wholes = []

  def paint(batch, *, size_hw, texture_size, supersample, truth=False):
    count = len(batch["scene/pose"])
    wholes.append((count, truth))
    frames = jnp.full((count, 2, *size_hw, 3), 0.1 * supersample + 0.01 * texture_size)
    flow_xy, visible = jnp.full((count, *size_hw, 2), 2.0), jnp.ones((count, *size_hw), bool)
    return FramePair(frames, flow_xy, visible)

  monkeypatch.setattr(rendering, "render_batch", paint)
  config = tiny_job.get_config()
  config.log.eval_scenes = 8
  config.data.sources.scenes.update(supersample=2, texture_size=5)
  asked = tasks.build(config).held_out._ask(SHIFTS)
  painted = geometry.unnormalise(jnp.asarray(asked.frames))
  np.testing.assert_allclose(painted, np.full((8, 2, 16, 16, 3), 0.25), atol=1e-5)
  assert asked.valid.all() and np.allclose(asked.truth_xy - asked.points_xy, 2.0)
  probe = bottleneck.Probe(
    image_hw=(16, 16), preset="shifts", num_scenes=8, **readout.scene_settings(config)
  )
  np.testing.assert_allclose(probe._render(range(8)).frames, 0.25, atol=1e-5)
  # Two at a time are as many pixels as eight that are drawn at their own size.
  assert wholes == [(2, True), (8, False)]


def test_too_few_seeds_for_the_held_out_scenes_are_told_when_the_task_is_built():
  config = tiny_job.get_config()
  config.data.sources.scenes.first_seed = 2
  tasks.build(config)  # asks nothing
  config.log.eval_scenes = 3
  with pytest.raises(InputError, match="first_seed is 2, and the 3 held-out scenes"):
    tasks.build(config)
  # These take whole groups of eight.
  with pytest.raises(InputError, match="first_seed is 7, and the 8"):
    bottleneck.Probe(preset="shifts", **settings(before_seed=7))
  with pytest.raises(InputError, match="first_seed is 7, and the 8"):
    held_out_flow.HeldOutFlow(network=None, presets=["shifts"], **settings(before_seed=7))
  assert readout.held_out_seeds(2, before_seed=2) == [1, 0]
