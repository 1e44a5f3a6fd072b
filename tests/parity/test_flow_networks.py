"""SEA-RAFT and forward-backward occlusion against values computed by the public code."""

from __future__ import annotations

import functools
import json

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import geometry, models
from cwm_jax.configs import base, flow_networks
from cwm_jax.pretrained import flow_keymaps, keymaps
from cwm_jax.tasks import flow_losses

CASE = "c6_raft_io"
DEPTHS = {"resnet18": (2, 2, 2), "resnet34": (3, 4, 6)}


def network(settings):
  """The module that a configuration of the public code describes."""
  sizes = flow_networks.sea_raft(
    depths=DEPTHS[settings["pretrain"]],
    iterations=settings["iters"],
    stem_width=settings["initial_dim"],
    widths=tuple(settings["block_dims"]),
    dim=settings["dim"],
    scale=settings["scale"],
  )
  sizes |= dict(radius=settings["radius"], refine_blocks=settings["num_blocks"])
  return models.build_flow_network(dict(base.get_config().flow_network) | sizes)


def params_of(state):
  state = flow_keymaps.merge_twins(state, where="the state")
  return keymaps.to_params(state, flow_keymaps.rules_of_state(state, "sea_raft"))


def settings_of(folder):
  """The configuration of the public code that the set's small network has."""
  return json.loads((folder / golden_files.settings(folder, "sea_raft", "config")).read_text())


@pytest.fixture(scope="module")
def small(cwm_goldens):
  """(module, parameters) of the set's small network."""
  return network(settings_of(cwm_goldens)), params_of(golden_files.state(cwm_goldens, "c6_raft"))


@pytest.fixture(scope="module")
def estimates(cwm_goldens, small):
  """What the small network says of the stored frames, every iteration, by way of correlating."""
  stored = golden_files.arrays(cwm_goldens, CASE)
  net, params = small

  def every(way):
    # The first estimate is made before the first iteration.
    ask = functools.partial(net.clone(correlation=way).apply, every=True)
    call = jax.jit(lambda p, f: ask({"params": p}, f, iterations=len(stored["flow"]) - 1))
    return call(params, frames_of(stored))

  return functools.cache(every)


def nhwc(array):
  return np.moveaxis(array, -3, -1)


def frames_of(stored):
  """[B, 2, H, W, 3] in [0, 1] from images in [0, 255]."""
  return jnp.asarray(np.stack([nhwc(stored[f"image{i}"]) for i in (1, 2)], axis=1) / 255.0)


def tolerances(folder, case, count):
  """Ten times the noise floor of each stored iteration."""
  floors = golden_files.settings(folder, "noise", case, "flow_px_per_iteration")
  assert len(floors) == count
  return 10 * np.array(floors)


def close(got, want, atol):
  np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=atol)


@pytest.mark.parametrize("way", ["all_pairs", "on_demand"])
def test_every_iteration_says_the_stored_flow_and_info(cwm_goldens, estimates, way):
  stored = golden_files.arrays(cwm_goldens, CASE)
  count = len(stored["flow"])
  found = estimates(way)
  for got, want, atol in zip(found.flow_xy, stored["flow"], tolerances(cwm_goldens, CASE, count)):
    close(got, nhwc(want), atol)
  # The set states no floor for what is said of the flow: it comes by the same way as the flow.
  info = {0: stored["info_first"], -1: stored["info_last"]}
  for i, want in info.items():
    close(found.info[i], nhwc(want), max(1e-4, tolerances(cwm_goldens, CASE, count)[i]))


def test_what_the_last_estimate_costs_everywhere_is_as_stored(cwm_goldens):
  stored = golden_files.arrays(cwm_goldens, CASE)
  error = np.abs(nhwc(stored["flow"][-1]) - nhwc(stored["flow_gt"]))
  cost = jax.jit(flow_losses.laplace_cost)
  found = cost(jnp.asarray(error), jnp.asarray(nhwc(stored["info_last"])))
  want = nhwc(stored["nf_last"])
  close(found, want, golden_files.tolerance(cwm_goldens, CASE, "nf_last", want))


def test_what_all_estimates_cost_together_is_as_stored(cwm_goldens, estimates):
  stored = golden_files.arrays(cwm_goldens, CASE)
  told_xy = jnp.asarray(nhwc(stored["flow_gt"]))
  found = estimates("all_pairs")
  gamma = settings_of(cwm_goldens)["gamma"]
  cost = jax.jit(functools.partial(flow_losses.sequence_loss, kind="laplace", gamma=gamma))
  loss = cost(found.flow_xy, found.info, told_xy, jnp.ones(told_xy.shape[:-1]))
  want = stored["sequence_loss"]
  close(loss, want, golden_files.tolerance(cwm_goldens, CASE, "sequence_loss", want))


def test_encoders_and_correlations_say_what_is_stored(cwm_goldens, small):
  stored = golden_files.arrays(cwm_goldens, CASE)
  net, params = small
  images = 2 * frames_of(stored) - 1

  def inside(module, images):
    both = jnp.concatenate([images[:, 0], images[:, 1]], axis=-1)
    features = [module.feature_encoder(images[:, i]) for i in (0, 1)]
    correlated = module.correlate(*features)
    h, w = features[0].shape[1:3]
    here = geometry.pixel_centres(h, w) - 0.5
    places = jnp.asarray(nhwc(stored["corr_coords"]))
    return module.context_encoder(both), features[0], module.look_up(correlated, places - here)

  context, features, corr = net.apply({"params": params}, images, method=inside)
  for got, name in ((context, "cnet_out"), (features, "fnet1")):
    close(got, nhwc(stored[name]), 1e-4 * np.abs(stored[name]).max())
  want = nhwc(stored["corr_out"])
  steps = [golden_files.stride(corr.shape[axis], want.shape[axis]) for axis in (1, 2)]
  close(corr[:, :: steps[0], :: steps[1]], want, 1e-4 * np.abs(want).max())


def test_a_size_that_does_not_divide_by_eight_is_padded_as_stored(cwm_goldens, small):
  stored = golden_files.arrays(cwm_goldens, "c6_raft_padded_io")
  net, params = small
  found = jax.jit(lambda p, f: net.apply({"params": p}, f, every=True))(params, frames_of(stored))
  limits = tolerances(cwm_goldens, CASE, len(found.flow_xy))
  close(found.flow_xy[0], nhwc(stored["flow_first"]), limits[0])
  close(found.flow_xy[-1], nhwc(stored["flow_last"]), limits[-1])
  close(found.info[-1], nhwc(stored["info_last"]), limits[-1])


def test_flows_both_ways_and_occlusion_at_points_are_as_stored(cwm_goldens, small):
  stored = golden_files.arrays(cwm_goldens, "c6_raft_wrapper_io")
  net, params = small
  frames = geometry.unnormalise(golden_files.frames(stored["video"]))
  call = jax.jit(lambda p, f: net.apply({"params": p}, f).flow_xy)
  flow, back = call(params, frames), call(params, frames[:, ::-1])
  limit = tolerances(cwm_goldens, CASE, net.iterations + 1)[-1]
  close(flow, nhwc(stored["flow_fwd"]), limit)
  close(back, nhwc(stored["flow_bck"]), limit)
  ratio, visible = geometry.round_trip(flow, back, threshold=6.0)
  occluded = nhwc(stored["occ_map"])[..., 0] > 0
  assert np.mean(~np.asarray(visible) != occluded) < 1e-3
  rows, columns = stored["points"].T
  at = np.arange(len(rows)), rows, columns
  moved = stored["points"] + np.asarray(flow)[at][:, ::-1]
  close(moved, stored["pred_pixel_loc"], limit)
  sure = np.abs(np.asarray(ratio)[at] - 1) > limit
  assert np.array_equal(~np.asarray(visible)[at][sure], stored["pred_occ"][sure] > 0)


def test_the_released_size_gives_what_is_stored(cwm_goldens):
  stored = golden_files.arrays(cwm_goldens, "c6_raft_fullcfg_io")
  manifest = json.loads((cwm_goldens / "manifest_searaft_full.json").read_text())
  own = {
    name: shape
    for name, shape in manifest.items()
    if ".downsample.1." not in name and not name.endswith(flow_keymaps.COUNTERS)
  }
  state = golden_files.recipe(own, int(stored["recipe_seed"]))
  for name, gain in (("flow_head.2.weight", 0.03), ("upsample_weight.2.weight", 4.0)):
    state[name] *= np.float32(gain)
  sizes = dict(base.get_config().flow_network) | flow_networks.network("opt-cwm-distilled")
  net = models.build_flow_network(sizes)
  floors = golden_files.settings(
    cwm_goldens, "noise", "c6_raft_fullcfg_io", "flow_px_per_iteration"
  )
  count = len(floors) - 1
  call = jax.jit(lambda p, f: net.apply({"params": p}, f, iterations=count, every=True))
  found = call(params_of(state), frames_of(stored).astype(jnp.float32))
  close(found.flow_xy[0], nhwc(stored["flow_first"]), 10 * floors[0])
  close(found.flow_xy[-1], nhwc(stored["flow_last"]), 10 * floors[-1])
  close(found.info[-1], nhwc(stored["info_last"]), 10 * floors[-1])


def test_forward_backward_occlusion_is_as_stored(cwm_goldens):
  stored = golden_files.arrays(cwm_goldens, "c9_occ_masks")
  flows = {way: jnp.asarray(nhwc(stored[f"flow_{way}"])) for way in ("fwd", "bck")}
  cases = [name.split("_") for name in stored if name.endswith(("_fwd", "_bck"))]
  cases = [case for case in cases if case[0] in ("rel", "abs")]
  assert {kind for kind, _, _ in cases} == {"rel", "abs"}
  for kind, threshold, way in cases:
    other = "bck" if way == "fwd" else "fwd"
    _, visible = geometry.round_trip(
      flows[way], flows[other], threshold=float(threshold), relative=kind == "rel"
    )
    want = nhwc(stored[f"{kind}_{threshold}_{way}"])[..., 0] > 0
    assert np.mean(np.asarray(visible) != want) < 1e-3, (kind, threshold, way)
  warp = jax.vmap(geometry.warp_inside)
  for way, other in (("fwd", "bck"), ("bck", "fwd")):
    close(flows[way] + warp(flows[other], flows[way]), nhwc(stored[f"diff_{way}"]), 1e-4)
