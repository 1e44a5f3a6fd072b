"""Joint training: what is learned, what is frozen, and along which way gradients go."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import joint_job
import numpy as np
import pytest
import tiny_job

from cwm_jax import tasks, train
from cwm_jax.pretrained import weights
from cwm_jax.types import FramePair, InputError


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
  return joint_job.weights_file(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def trained(predictor, tmp_path_factory):
  """(workdir, rows, state) of a run with evaluation and pictures at its end."""
  workdir = tmp_path_factory.mktemp("joint")
  changes = dict(total="8 steps", log__eval_scenes=8, log__eval_masks=1, optim__peak_lr=3e-3)
  state = train.train(joint_job.get_config(predictor, **changes), workdir)
  return workdir, tiny_job.rows(workdir), state


def random_pair(batch=2, side=16):
  frames = np.random.default_rng(0).random((batch, 2, side, side, 3), np.float32)
  return FramePair(jnp.asarray(frames))


def test_the_loss_falls_and_the_predictor_stays_what_it_was(predictor, trained):
  _, rows, state = trained
  ratio = [row["loss"] / row["copy_loss"] for row in rows]
  # Psi-flow begins as a copy of frame 1.
  assert ratio[0] == pytest.approx(1.0) and ratio[-1] < 0.99
  before, _ = weights.load(predictor)
  jax.tree.map(np.testing.assert_array_equal, state.params["predictor"], before)
  # An optimizer keeps no statistics of what is frozen.
  count = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
  learned = {name: state.params[name] for name in ("perturber", "flow_predictor")}
  assert count < 2.1 * sum(leaf.size for leaf in jax.tree.leaves(learned))


def test_a_run_reports_gradients_responses_the_bottleneck_and_the_learned_mark_s_error(trained):
  workdir, rows, _ = trained
  assert {"perturber_grad_norm", "flow_predictor_grad_norm", "spread_px", "peak"} <= rows[1].keys()
  # Psi-flow's head begins at zero: only then does a gradient reach the perturber.
  assert rows[0]["perturber_grad_norm"] == 0.0 < rows[1]["perturber_grad_norm"]
  last = rows[-1]
  for name in ("zeroed", "exchanged"):
    low, rise, high = (last[f"eval/bottleneck/{name}{end}"] for end in ("_low", "", "_high"))
    assert low < rise < high
  assert last["eval/bottleneck/loss"] > 0
  assert last["eval/shifts/average"] > 0 and last["eval/own_mark/shifts/average"] > 0
  assert last["eval/shifts/still_average"] == last["eval/own_mark/shifts/still_average"]
  assert [path.name for path in (workdir / "pictures").glob("joint_*")] == ["joint_00000008.png"]


def test_gradients_reach_the_perturber_and_psi_flow_and_never_the_predictor(predictor):
  task = tasks.build(joint_job.get_config(predictor))
  params = jax.jit(task.init)(jax.random.key(0))
  params["flow_predictor"]["head"]["kernel"] += 0.1
  pair, keys = random_pair(), jax.random.split(jax.random.key(1), 2)
  grads = jax.jit(jax.grad(lambda p: task.loss(p, pair, keys)[0]))(params)
  sizes = {
    name: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[name])) for name in grads
  }
  assert sizes["predictor"] == 0.0 and sizes["perturber"] > 0 and sizes["flow_predictor"] > 0


def test_queries_are_distinct_patches_and_lie_at_their_centre_or_anywhere(predictor):
  keys = jax.random.split(jax.random.key(3), 5)
  for query, inside in (("centre", {2.5}), ("anywhere", {0.5, 1.5, 2.5, 3.5})):
    config = joint_job.get_config(predictor, joint__query=query, joint__num_points=16)
    points = np.asarray(tasks.build(config).queries(keys))
    assert all(len({tuple(p) for p in pair // 4}) == 16 for pair in points)
    assert set((points % 4).ravel().tolist()) == inside


def test_masks_are_a_point_s_own_or_shared(predictor):
  keys = jax.random.split(jax.random.key(3), 2)
  for masks, count in (("point", 2), ("shared", 1)):
    task = tasks.build(joint_job.get_config(predictor, joint__masks=masks, joint__num_masks=3))
    drawn = np.asarray(task.draw_masks(keys))
    assert drawn.shape == (2, count, 3, 2, 4, 4)
    assert len(np.unique(drawn.reshape(-1, 32), axis=0)) == 2 * count * 3


@pytest.mark.parametrize(
  "key, value, told",
  [
    ("optim__freeze", "", "set optim.freeze to '\\^predictor/'"),
    ("optim__freeze", "predictor", "set optim.freeze to"),
    ("joint__query", "edge", "joint.query is 'edge'; choose one of centre, anywhere"),
    ("joint__masks", "none", "joint.masks is 'none'"),
    ("joint__num_points", 17, "there are 16 patches"),
    ("joint__num_masks", 0, "joint.num_masks is 0"),
    ("joint__protocol", "old", "the protocol is 'old'"),
    ("joint__dtype", "int4", "cannot be built: model.dtype"),
    ("joint__image_hw", (18, 18), "does not divide into patches"),
    ("perturber__init", "grey", "perturber.init is 'grey'; choose one of white, plain, file"),
    ("perturber__init", "file", "name it by perturber.file"),
    ("perturber__scale", 0, "perturber.scale is 0"),
    ("perturber__size", 1, "too small"),
    ("flow_predictor__kind", "three_stream", "three_stream"),
  ],
)
def test_settings_that_cannot_be_are_told_in_a_sentence(predictor, key, value, told):
  with pytest.raises(InputError, match=told):
    tasks.build(joint_job.get_config(predictor, **{key: value}))
