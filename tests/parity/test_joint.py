"""Joint training against values computed by the public code: loss, gradients, three updates."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cwm_jax import geometry, optim
from cwm_jax.configs import opt_cwm
from cwm_jax.models.perturber import Perturber
from cwm_jax.models.predictor import patchify
from cwm_jax.pretrained import keymaps, two_stream_keys
from cwm_jax.tasks import joint
from cwm_jax.types import FramePair

CASE = "c5_optcwm_io"
# Stated in the set's INDEX: the rates of its three updates are so many times its schedule's.
RATE_TIMES = 40
TWO_STREAM = "recon_cwm_model.two_stream_vmae."


def close(got, want, *, atol):
  np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=atol)


@dataclasses.dataclass(frozen=True)
class Stored(joint.Joint):
  """Joint training with the stored queries and masks instead of random ones."""

  points_xy: Any = None
  stored_masks: Any = None

  def queries(self, keys):
    return self.points_xy

  def draw_masks(self, keys):
    return self.stored_masks


@pytest.fixture(scope="module")
def case(cwm_goldens):
  """(stored arrays, task, parameters, pairs, rules)."""
  stored = golden_files.arrays(cwm_goldens, CASE)
  state = golden_files.state(cwm_goldens, "c5_optcwm")
  names = (name.removeprefix(TWO_STREAM) for name in state if name.startswith(TWO_STREAM))
  psi_flow = two_stream_keys.two_stream_rules(*two_stream_keys.links_of(names), prefix=TWO_STREAM)
  mark = keymaps.perturber_rules(prefix="flow_predictor.perturber.")
  rules = (
    *keymaps.with_prefix(
      keymaps.predictor_rules(prefix="flow_predictor.cwm_model."), ours="predictor/"
    ),
    *keymaps.with_prefix(mark, ours="perturber/"),
    *keymaps.with_prefix(psi_flow, ours="flow_predictor/"),
  )
  told = golden_files.settings(cwm_goldens, "perturber")
  predictor = golden_files.predictor(golden_files.settings(cwm_goldens, "base_cwm"))
  flow_predictor = golden_files.flow_predictor(cwm_goldens)
  frames = golden_files.frames(stored["video"])
  pixels = stored["flow_patch_indices"].astype(int) * flow_predictor.patch
  points_xy = geometry.index_to_point_xy(jnp.asarray(pixels + flow_predictor.patch // 2))
  task = Stored(
    predictor=predictor,
    perturber=Perturber(hidden_width=told["hidden_dim"]),
    flow_predictor=flow_predictor,
    given={},
    image_hw=frames.shape[2:4],
    predictor_hw=tuple(side * predictor.patch for side in predictor.grid_hw),
    mask_ratio=golden_files.settings(cwm_goldens, "flow", "mask_ratio"),
    mark_size=told["pert_size"],
    num_points=golden_files.settings(cwm_goldens, "opt_cwm", "n_flow_pts"),
    average="release",
    protocol="release",
    points_xy=points_xy,
    stored_masks=jnp.asarray(stored["masks"]).reshape(
      *points_xy.shape[:2], 1, 2, *predictor.grid_hw
    ),
  )
  pairs = FramePair(geometry.unnormalise(frames))
  return stored, task, keymaps.to_params(state, rules), pairs, rules


@pytest.fixture(scope="module")
def loss_and_gradient(case):
  """params -> ((loss, metrics), gradient), compiled once."""
  _, task, _, pairs, _ = case
  keys = jax.random.split(jax.random.key(0), len(pairs.frames))
  return jax.jit(jax.value_and_grad(partial(task.loss, pair=pairs, keys=keys), has_aux=True))


def test_the_flow_of_the_queries_is_as_stored(cwm_goldens, case):
  stored, task, params, pairs, _ = case
  frames = geometry.normalise(pairs.frames)
  keys = jax.random.split(jax.random.key(0), len(frames))
  got = jax.jit(lambda p: task.flow(p, frames, task.points_xy, keys).flow_xy)(params)
  row, column = (
    np.moveaxis(stored["flow_patch_indices"].astype(int), -1, 0) * task.flow_predictor.patch
  )
  pair = np.arange(len(row))[:, None]
  want = stored["sparse_flow"][pair, :, 0, row, column]
  floor = golden_files.settings(cwm_goldens, "noise", "c4_flow_single", "expectation_px")
  close(got, want, atol=10 * (floor or 1e-3))


def test_the_loss_and_what_it_compares_with_are_as_stored(cwm_goldens, case, loss_and_gradient):
  stored, task, params, pairs, _ = case
  (loss, _), _ = loss_and_gradient(params)
  close(loss, stored["loss"], atol=golden_files.tolerance(cwm_goldens, CASE, "loss", loss))
  target = patchify(pairs.frames[:, 1], task.flow_predictor.patch)
  close(target, stored["target"], atol=1e-5)


def test_gradients_reach_psi_flow_and_through_it_the_perturber_as_stored(
  cwm_goldens, case, loss_and_gradient
):
  stored, _, params, _, rules = case
  got = keymaps.to_state(loss_and_gradient(params)[1], rules)
  floor = golden_files.settings(cwm_goldens, "noise", CASE, "gradient_relative")
  relative = 10 * floor if floor else 1e-3
  want = {name.removeprefix("grad:"): stored[name] for name in stored if name.startswith("grad:")}
  assert {name.split(".")[0] for name in want} == {"flow_predictor", "recon_cwm_model"}
  for name, gradient in want.items():
    np.testing.assert_allclose(
      got[name], gradient, rtol=0, atol=relative * np.abs(gradient).max(), err_msg=name
    )
  frozen = [name for name in got if name.startswith("flow_predictor.cwm_model.")]
  assert frozen and not any(got[name].any() for name in frozen)


def schedule(stored):
  """(peak, warm-up steps, all steps) of the stored rates: the peak ends the warm-up."""
  rates = stored["lr_schedule"]
  return rates.max(), int(np.argmax(rates)) + 1, len(rates)


def test_the_learning_rate_goes_as_the_releases(cwm_goldens):
  stored = golden_files.arrays(cwm_goldens, "c5_optim")
  peak, warmup, total = schedule(stored)
  rate = optim.learning_rate(
    peak=peak,
    warmup_steps=warmup,
    total_steps=total,
    final_ratio=opt_cwm.JOINT_OPTIM["final_lr_ratio"],
    warmup_from_zero=opt_cwm.JOINT_OPTIM["warmup_from_zero"],
  )
  close(rate(np.arange(total)), stored["lr_schedule"], atol=1e-6 * peak)
  assert set(stored["wd_schedule"]) == {opt_cwm.JOINT_OPTIM["weight_decay"]}


def test_weight_decay_falls_on_what_the_release_lets_decay(cwm_goldens, case):
  _, _, params, _, rules = case
  groups = json.loads((cwm_goldens / "c5_param_groups.json").read_text())
  decayed = optim.decay_mask(params, opt_cwm.JOINT_OPTIM["decay_exclude"])
  filled = jax.tree.map(lambda flag, x: np.full(x.shape, float(flag)), decayed, params)
  ours = {name: array.any() for name, array in keymaps.to_state(filled, rules).items()}
  theirs = {name: group["wd"] > 0 for group in groups for name in group["params"]}
  assert theirs == {name: ours[name] for name in theirs}
  assert all(name.startswith("flow_predictor.cwm_model.") for name in ours.keys() - theirs)
  for group in groups:
    adam = (opt_cwm.JOINT_OPTIM["b1"], opt_cwm.JOINT_OPTIM["b2"], opt_cwm.JOINT_OPTIM["eps"])
    assert (*group["betas"], group["eps"]) == adam


def test_three_updates_lead_where_the_releases_lead(cwm_goldens, case, loss_and_gradient):
  first, _, params, _, rules = case
  stored = golden_files.arrays(cwm_goldens, "c5_optim")
  peak, warmup, total = schedule(stored)
  named = {
    **opt_cwm.JOINT_OPTIM,
    "peak_lr": RATE_TIMES * peak,
    "scale_lr": False,
    "freeze": "^predictor/",
  }
  del named["warmup"]
  tx, _ = optim.make(total_steps=total, warmup_steps=warmup, batch_size=1, **named)
  state, losses = tx.init(params), []
  update = jax.jit(tx.update)
  for at in stored["steps"]:
    state = at_step(state, int(at))
    (loss, _), gradient = loss_and_gradient(params)
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    losses.append(float(loss))
  close(losses, stored["losses"], atol=1e-4 * stored["losses"].max())
  got = keymaps.to_state(params, rules)
  rates = RATE_TIMES * stored["lr_schedule"][stored["steps"]]
  want = [name.removeprefix("after3:") for name in stored if name.startswith("after3:")]
  assert want
  for name in want:
    # Adam's first steps go by a gradient's sign, which is anybody's guess within the noise.
    gradient = np.abs(first[f"grad:{name}"])
    sure = gradient > 1e-3 * gradient.max()
    assert sure.mean() > 0.9
    away = np.abs(got[name] - stored[f"after3:{name}"])
    assert away[sure].max() < 0.05 * rates.max(), name
    assert away.max() < 2 * rates.sum(), name


def at_step(state, step):
  """The optimizer's state with its place on the schedule set, and nothing else."""
  is_place = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731

  def put(node):
    return node._replace(count=jnp.asarray(step, jnp.int32)) if is_place(node) else node

  return jax.tree.map(put, state, is_leaf=is_place)
