"""FLOW as the public code runs it: its marks, masks, crops, read-outs, number for number."""

from __future__ import annotations

from functools import partial

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from cwm_jax import geometry
from cwm_jax.counterfactual import engine, flow, gaussian, masks, multimask, zoom
from cwm_jax.models.perturber import Perturber
from cwm_jax.pretrained import keymaps

SETTINGS = dict(
  order="release",
  average="release",
  protocol="release",
  readout="argmax",
  inverse_temperature=200.0,
  occlusion_threshold=0.05,
)


class Case:
  """A stored case: its arrays, and engines with its weights and masks."""

  def __init__(self, folder, name, *, state, section, scale=1):
    self.folder, self.name = folder, name
    self.stored = golden_files.arrays(folder, name)
    net = golden_files.predictor(golden_files.settings(folder, section), scale=scale)
    arrays = golden_files.state(folder, state)
    cwm = {k: v for k, v in arrays.items() if k.startswith("cwm_model.")}
    params = golden_files.predictor_params(cwm, "cwm_model.")
    settings = golden_files.settings(folder, "perturber")
    mlp = {k: v for k, v in arrays.items() if k.startswith("perturber.")}
    rules = keymaps.with_prefix(keymaps.perturber_rules(), theirs="perturber.")
    mark = gaussian.GaussianMark(
      Perturber(hidden_width=settings["hidden_dim"]), size=settings["pert_size"], scale=scale
    )
    self.mark = Partial(mark, keymaps.to_params(mlp, rules))
    self.predict = Partial(_Apply(net), params)
    self.patch = net.patch
    self.image_hw = tuple(
      n * scale for n in (golden_files.settings(folder, section)["img_size"],) * 2
    )
    self.grid_hw = tuple(n // self.patch for n in self.image_hw)
    # [B, T, H, W, 3], normalised
    self.frames = golden_files.frames(self.stored["video"])
    self.video_hw = self.frames.shape[2:4]

  def masks(self, name):
    """[B, M, 2, gh, gw]."""
    flags = self.stored[name]
    return jnp.asarray(flags.reshape(*flags.shape[:2], 2, *self.grid_hw))

  def tolerance(self, what, stored):
    return golden_files.tolerance(self.folder, self.name, what, stored)

  def points_xy(self, name="points"):
    """Stored (row, column) pixels as continuous points: their centres."""
    return jnp.asarray(self.stored[name][:, ::-1].astype(np.float32) + 0.5)

  def ask(self, mask_names, **settings):
    """The engine's answers, each pair with its own masks: PointFlow of [B, ...]."""
    answers = []
    points = np.asarray(self.points_xy())
    for b in range(len(points)):
      own = jnp.stack([self.masks(name)[b] for name in mask_names])
      asker = engine.Engine(
        self.predict,
        self.mark,
        own,
        patch=self.patch,
        memory_budget=None,
        settings=SETTINGS | settings,
      )
      pair = tuple(asker.prepare(frame) for frame in np.asarray(self.frames[b]))
      answers.append(asker.ask([pair], np.zeros(1, int), points[b : b + 1], self.video_hw).fetch())
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *answers)

  def passes(self, masks, frames=None, index_yx=None):
    """Clean prediction, marked frames and differences [B, M, H, W, 3] at the frames' own size."""
    frames = self.frames if frames is None else frames
    index_yx = self.stored["points"] if index_yx is None else index_yx
    hw = frames.shape[2:4]
    points = jnp.asarray(index_yx[:, ::-1].astype(np.float32) + 0.5)
    placed = flow.place_points(points, hw, self.image_hw, protocol="release")
    return _passes(self.predict, self.mark, frames, masks, placed, image_hw=self.image_hw)


class _Apply:
  """`module.apply` with parameters first; one object a module, so that programs are shared."""

  def __init__(self, module):
    self.module = module

  def __call__(self, params, frames, mask):
    return self.module.apply({"params": params}, frames, mask)


@partial(jax.jit, static_argnames="image_hw")
def _passes(predict, mark, frames, own_masks, placed, *, image_hw):
  n, m = own_masks.shape[:2]
  small = geometry.resize(frames, image_hw)
  clean = multimask.clean_predictions(predict, small, own_masks, jnp.ones(n, bool), chunk=n * m)
  marked = multimask.mark_frames(mark, small[:, 0], clean.tokens, placed)
  answer = multimask.marked_predictions(predict, marked, small[:, 1], own_masks)
  return clean, marked, geometry.resize(answer - clean.image, frames.shape[2:4])


def close(got, want, atol):
  np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=atol)


def channels_last(delta):
  return np.moveaxis(delta, -3, -1)


@pytest.fixture(scope="module")
def small(cwm_goldens):
  return partial(Case, cwm_goldens, state="c4_flow", section="base_cwm")


@pytest.fixture(scope="module")
def single(small):
  return small("c4_flow_single")


@pytest.fixture(scope="module")
def multi(small):
  return small("c4_flow_multi")


@pytest.fixture(scope="module")
def zoomed(small):
  return small("c4_flow_zoom")


def equal_where_safe(got_xy, want_yx, margin):
  """Destinations are those stored wherever the highest pixel is clearly the highest."""
  safe = margin > 1e-4
  assert safe.any()
  np.testing.assert_array_equal(np.asarray(got_xy)[safe], want_yx[safe][:, ::-1])


def test_the_patches_hidden_round_a_guess_and_revealed_instead_are_the_stored_ones(cwm_goldens):
  stored = golden_files.arrays(cwm_goldens, "c4_heuristic_mask")
  section = golden_files.settings(cwm_goldens, "base_cwm")
  patch, side = section["patch_size"], section["img_size"] // section["patch_size"]
  before = golden_files.masks(stored["mask"], (side, side))
  hide = partial(masks.hide_neighbourhood, reveal="release")
  patches = jnp.asarray((stored["loc"] // patch).astype(np.int32))
  got = jax.vmap(lambda mask, rc: hide(mask[None], rc)[0])(before, patches)
  np.testing.assert_array_equal(got.reshape(len(got), -1), stored["out"])
  assert (stored["out"] != stored["mask"]).any()


def test_windows_points_and_crops_are_the_stored_ones_in_every_round(cwm_goldens):
  stored = golden_files.arrays(cwm_goldens, "c4_crop_logic")
  video_hw = stored["frames"].shape[2:]
  rounds = sum(name.endswith("_crop") for name in stored)
  sizes = zoom.crop_sizes(video_hw, rounds)
  point, guess = stored["pt0"], stored["pt1"]
  xy = lambda index: jnp.asarray(index[:, ::-1].astype(np.float32))  # noqa: E731
  inside = (jnp.zeros((len(point), 2)), jnp.array(video_hw[::-1], jnp.float32))
  for k, size in enumerate(sizes):
    corner1 = zoom.window_corner_xy(xy(point) + 0.5, jnp.float32(size), video_hw)
    corner2 = zoom.window_corner_xy(xy(guess), jnp.float32(size), video_hw, inside=inside)
    corners = np.stack([corner1, corner2], axis=1)[..., ::-1].astype(int)
    np.testing.assert_array_equal(point - corners[:, 0], stored[f"z{k}_pt0"])
    np.testing.assert_array_equal(guess - corners[:, 1], stored[f"z{k}_pt1"])
    for frames, both, crops in zip(stored["frames"], corners, stored[f"z{k}_crop"]):
      for frame, (top, left), crop in zip(frames, both, crops):
        np.testing.assert_array_equal(frame[top : top + size, left : left + size], crop)
    guess = stored[f"z{k}_argmax"] + corners[:, 1]
    inside = (corner2, jnp.full(2, size, jnp.float32))
  np.testing.assert_array_equal(guess, stored["final"])


def test_one_masks_token_mark_and_difference_are_the_stored_ones(single):
  stored = single.stored
  placed = flow.place_points(
    single.points_xy(), single.video_hw, single.image_hw, protocol="release"
  )
  np.testing.assert_array_equal(np.asarray(placed) - 0.5, stored["pix_model"][:, ::-1])
  clean, marked, delta = single.passes(single.masks("masks"))
  rows, cols = (stored["pix_model"] // single.patch).T
  token = np.asarray(clean.tokens)[np.arange(len(rows)), 0, rows, cols]
  want = stored["patch_embedding"]
  close(token, want, golden_files.tolerance(single.folder, "c1_base_cwm_io", "encoder", want))
  numbers = single.mark.func.perturber.apply({"params": single.mark.args[0]}, jnp.asarray(want))
  size = single.mark.func.size
  drawn = gaussian.draw(gaussian.gaussian_params(numbers, size=size), size=size)
  close(drawn, channels_last(stored["pert"]), 1e-4 * np.abs(stored["pert"]).max())
  want = channels_last(stored["recon_delta"])
  close(delta[:, 0], want, single.tolerance("response", want))


def test_the_difference_under_a_forced_neighbourhood_is_the_stored_one(single):
  stored = single.stored
  guess = flow.place_points(
    single.points_xy("heur_loc"), single.video_hw, single.image_hw, protocol="release"
  )
  patch = (guess[:, ::-1] // single.patch).astype(jnp.int32)
  hide = jax.vmap(partial(masks.hide_neighbourhood, reveal="release"))
  effective = hide(single.masks("masks"), patch)
  np.testing.assert_array_equal(effective.reshape(len(patch), -1), stored["heur_eff_mask"])
  _, _, delta = single.passes(effective)
  want = channels_last(stored["heur_recon_delta"])
  close(delta[:, 0], want, single.tolerance("response", want))
  heat = jnp.sum(jnp.abs(delta[:, 0]), axis=-1)
  ordered = np.sort(np.abs(want).sum(axis=-1).reshape(len(want), -1), axis=1)
  margin = ordered[:, -1] - ordered[:, -2]
  equal_where_safe(geometry.argmax_yx(heat)[:, ::-1], stored["heur_argmax"], margin)
  want = stored["heur_expec"]
  close(geometry.soft_argmax_yx(heat), want, single.tolerance("expectation_px", want))


@pytest.mark.parametrize("name", ["single", "multi"])
def test_destinations_of_whole_frames_are_the_stored_ones(name, request):
  case = request.getfixturevalue(name)
  stored = case.stored
  answer = case.ask(["masks"])
  equal_where_safe(answer.xy, stored["argmax_pred_pixel_loc"], stored["margin"])
  np.testing.assert_array_equal(~answer.visible, stored["pred_occ"])
  soft = case.ask(["masks"], readout="soft")
  want = stored["expec_pred_pixel_loc"][:, ::-1]
  close(soft.xy, want, case.tolerance("expectation_px", want))


def test_every_masks_difference_is_the_stored_one(multi):
  _, _, delta = multi.passes(multi.masks("masks"))
  want = np.moveaxis(channels_last(multi.stored["recon_deltas"]), 0, 1)
  close(delta, want, multi.tolerance("response", want))


@pytest.mark.parametrize("order", ["release", "paper"])
def test_both_orders_of_averaging_follow_from_the_stored_differences(multi, order):
  deltas = np.moveaxis(channels_last(multi.stored["recon_deltas"]), 0, 1)
  clean, marked, _ = multi.passes(multi.masks("masks"))
  small_frames = geometry.resize(multi.frames, multi.image_hw)
  placed = flow.place_points(multi.points_xy(), multi.video_hw, multi.image_hw, protocol="release")
  m = deltas.shape[1]
  got = multimask.respond(
    multi.predict,
    multi.mark,
    small_frames,
    multi.masks("masks"),
    clean,
    placed,
    # In groups, where their number has a divisor.
    masks_at_once=max((d for d in range(1, m) if m % d == 0), default=1),
    order=order,
    average="release",
    to_video=flow.whole_video(multi.video_hw),
  )
  if order == "release":
    want = np.abs(deltas.mean(axis=1)).sum(-1)
    ordered = np.sort(np.asarray(got.heat).reshape(len(want), -1), axis=1)
    close(
      ordered[:, -1] - ordered[:, -2], multi.stored["margin"], multi.tolerance("response", want)
    )
  else:
    want = np.abs(deltas).sum(-1).mean(axis=1)
  # Three channels' errors add up.
  close(got.heat, want, 3 * multi.tolerance("response", want))
  close(got.peak, multi.stored["occ_metric"], 3 * multi.tolerance("response", want))


def test_zoom_follows_the_stored_rounds_to_the_stored_destination(zoomed):
  stored = zoomed.stored
  rounds = sum(name.startswith("masks_") for name in stored) - 1
  names = [f"masks_{k}" for k in range(rounds + 1)]
  margins = [stored[f"call{k}_margin"] for k in range(rounds + 1)]
  guess = stored["call0_argmax"]
  for k in range(rounds + 1):
    if k:
      # Where the stored window lay, told by the guess inside it and in the video.
      corner = guess - stored[f"call{k}_pt1"]
      guess = stored[f"call{k}_argmax"] + corner
    answer = zoomed.ask(names[: k + 1])
    equal_where_safe(answer.xy, guess, np.min(margins[: k + 1], axis=0))
  np.testing.assert_array_equal(guess, stored["pred_pixel_loc"])
  np.testing.assert_array_equal(~answer.visible, stored["pred_occ"])
  soft = zoomed.ask(names[:1], readout="soft")
  want = stored["expec_pred_pixel_loc"][:, ::-1]
  close(soft.xy, want, zoomed.tolerance("expectation_px", want))


def test_differences_inside_the_windows_of_zoom_are_the_stored_ones(zoomed):
  stored = zoomed.stored
  k = 1
  while f"call{k}_video" in stored:
    frames = golden_files.frames(stored[f"call{k}_video"])
    effective = stored[f"call{k}_eff_mask0"].reshape(len(frames), 1, 2, *zoomed.grid_hw)
    _, _, delta = zoomed.passes(jnp.asarray(effective), frames, stored[f"call{k}_pt0"])
    want = channels_last(stored[f"call{k}_delta0"])
    close(delta[:, 0], want, zoomed.tolerance("response", want))
    k += 1
  assert k > 1


def test_images_of_twice_the_size_get_marks_of_twice_the_size(cwm_goldens):
  scale = golden_files.settings(cwm_goldens, "highres", "pos_emb_scale")
  case = Case(cwm_goldens, "c4_flow_highres", state="c4_highres", section="highres", scale=scale)
  stored = case.stored
  placed = flow.place_points(case.points_xy(), case.video_hw, case.image_hw, protocol="release")
  np.testing.assert_array_equal(np.asarray(placed) - 0.5, stored["pix_model"][:, ::-1])
  _, _, delta = case.passes(case.masks("masks"))
  want = channels_last(stored["recon_delta"])
  # The set states no floor here. A difference is as exact as the predictions it is taken from,
  # which are of the size of the single mask's case.
  atol = golden_files.tolerance(case.folder, "c4_flow_single", "response", want)
  close(delta[:, 0], want, atol)
  response = multimask.average_over_masks(
    *multimask.sum_over_masks(delta, order="release"),
    case.masks("masks"),
    order="release",
    average="release",
  )
  answer = flow.read_out(response, case.points_xy(), protocol="release")
  equal_where_safe(np.asarray(answer.xy), stored["pred_pixel_loc"], stored["margin"])
  np.testing.assert_array_equal(~np.asarray(answer.visible), stored["pred_occ"])
  close(response.peak, stored["occ_metric"], 3 * atol)
  soft = geometry.soft_argmax_yx(response.heat)
  want = stored["expec_pred_pixel_loc"]
  close(soft, want, case.tolerance("expectation_px", want))
