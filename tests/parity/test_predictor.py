"""The predictor with replaced tokens against values computed by the public code."""

from __future__ import annotations

import json
from functools import partial

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from cwm_jax import geometry
from cwm_jax.counterfactual import gaussian, multimask
from cwm_jax.models import positions
from cwm_jax.models.perturber import Perturber
from cwm_jax.models.predictor import patchify
from cwm_jax.pretrained import keymaps

BASE = "c1_base_cwm_io"


def close(got, want, *, atol):
  np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=atol)


def thinned(array, want, axis=1):
  """The items of an axis that were stored, one in so many."""
  step = golden_files.stride(array.shape[axis], want.shape[axis])
  return np.asarray(array)[(slice(None),) * axis + (slice(None, None, step),)]


@pytest.fixture(scope="module")
def base(cwm_goldens):
  """(stored arrays, call(mask, **arguments) -> (prediction, intermediates), grid, patch)."""
  stored = golden_files.arrays(cwm_goldens, BASE)
  section = golden_files.settings(cwm_goldens, "base_cwm")
  net = golden_files.predictor(section)
  params = golden_files.predictor_params(golden_files.state(cwm_goldens, "c1_base_cwm"))
  video = golden_files.frames(stored["video"])

  @partial(jax.jit, static_argnames=("predict_frame", "keep_revealed"))
  def call(mask, **arguments):
    return net.apply(
      {"params": params},
      video,
      mask.reshape(-1, 2, *net.grid_hw),
      mutable=["intermediates"],
      capture_intermediates=lambda module, _: module.name == "patch_embed",
      **arguments,
    )

  return stored, call, net


@pytest.fixture
def within(cwm_goldens):
  """Asserts closeness within the set's own tolerance for the base case."""

  def check(got, want, what="decoder"):
    close(got, want, atol=golden_files.tolerance(cwm_goldens, BASE, what, want))

  return check


def test_patches_are_embedded_as_stored(base, within):
  stored, call, _ = base
  _, said = call(stored["mask"])
  within(said["intermediates"]["patch_embed"]["__call__"][0], stored["patch_embed"], "encoder")


@pytest.mark.parametrize("suffix", ["", "_soft"])
def test_the_encoder_says_what_is_stored_also_for_masks_that_are_shares(base, within, suffix):
  stored, call, net = base
  prediction, said = call(stored[f"mask{suffix}"])
  want = stored[f"enc_out{suffix}"]
  within(said["intermediates"]["encoder_tokens"][0], want, "encoder")
  first = want[:, : want.shape[1] // 2].reshape(prediction.tokens.shape)
  within(prediction.tokens, first, "encoder")


def test_the_decoder_says_what_is_stored_of_every_patch_of_both_frames(base, within):
  stored, call, net = base
  both = [
    patchify(call(stored["mask"], predict_frame=frame, keep_revealed=True)[0].image, net.patch)
    for frame in (1, 2)
  ]
  within(np.concatenate(both, axis=1), stored["dec_out"])


@pytest.mark.parametrize(("suffix", "frame"), [("", 2), ("_rev", 1)])
def test_hidden_patches_of_either_frame_are_predicted_as_stored(base, within, suffix, frame):
  stored, call, net = base
  mask = stored[f"mask{suffix}"]
  image = call(mask, predict_frame=frame)[0].image
  patches = np.asarray(patchify(image, net.patch))
  hidden = np.split(mask, 2, axis=1)[frame - 1]
  want = stored[f"counterfactual{suffix}"]
  within(patches[hidden].reshape(want.shape), want)
  whole = golden_files.frames(stored[f"unpatch{suffix}"])[:, 0]
  within(image, whole)
  assert np.all(patches[~hidden] == 0)


@pytest.fixture(scope="module")
def highres(cwm_goldens):
  return golden_files.arrays(cwm_goldens, "c1_highres_io")


def test_position_tables_are_resized_as_stored(cwm_goldens, highres):
  for name in [name for name in highres if name.startswith("tiny_to_")]:
    rows, columns = map(int, name.removeprefix("tiny_to_").split("x"))
    got = positions.release_positions(jnp.asarray(highres["tiny_pos"][0]), (rows, columns))
    close(got, highres[name][0], atol=1e-5 * np.abs(highres[name]).max())
  section = golden_files.settings(cwm_goldens, "highres")
  grid = positions.release_grid(section["patch_size"], section["pos_emb_scale"])
  state = golden_files.state(cwm_goldens, "c1_highres")
  for table, name in (("encoder.pos_embed", "enc_pos_interp"), ("pos_embed", "dec_pos_interp")):
    got = positions.release_positions(jnp.asarray(state[table][0]), grid)
    want = highres[name][0]
    close(got[:: golden_files.stride(len(got), len(want))], want, atol=1e-5 * np.abs(want).max())


def test_a_larger_image_is_predicted_with_resized_positions_as_stored(cwm_goldens, highres):
  section = golden_files.settings(cwm_goldens, "highres")
  net = golden_files.predictor(section, scale=section["pos_emb_scale"])
  params = golden_files.predictor_params(golden_files.state(cwm_goldens, "c1_highres"))
  side = section["img_size"] * section["pos_emb_scale"]
  video = golden_files.frames(highres["video_small"])
  times = side // video.shape[2]
  video = jnp.repeat(jnp.repeat(video, times, axis=2), times, axis=3)
  grid = (side // net.patch,) * 2
  prediction, said = jax.jit(lambda p, v, m: net.apply(p, v, m, mutable=["intermediates"]))(
    {"params": params}, video, golden_files.masks(highres["mask"], grid)
  )

  want = highres["enc_out"]
  tokens = thinned(said["intermediates"]["encoder_tokens"][0], want)
  close(tokens, want, atol=1e-4 * np.abs(want).max())
  want = golden_files.frames(highres["unpatch"])[:, 0]
  image = thinned(thinned(prediction.image, want, 1), want, 2)
  close(image, want, atol=1e-4 * np.abs(want).max())
  want = highres["counterfactual"]
  hidden = highres["mask"][:, grid[0] * grid[1] :]
  patches = np.asarray(patchify(prediction.image, net.patch))[hidden][None]
  close(thinned(patches, want), want, atol=1e-4 * np.abs(want).max())


def test_the_released_size_gives_what_is_stored(cwm_goldens):
  """Encoder, prediction, mark and response of a full-size model with random weights; 2.5 GB."""
  stored = golden_files.arrays(cwm_goldens, "cF_flow_fullsize_recipe")
  manifest = json.loads((cwm_goldens / "manifest_optcwm_full.json").read_text())
  prefix = "flow_predictor."
  state = golden_files.recipe(
    {n.removeprefix(prefix): tuple(s) for n, s in manifest.items() if n.startswith(prefix)},
    int(stored["recipe_seed"]),
  )
  state["cwm_model.decoder.head.weight"] *= np.float32(8)  # stated in the set's INDEX
  net = golden_files.predictor(golden_files.settings(cwm_goldens, "full_size", "base_cwm"))
  params = golden_files.predictor_params(state, "cwm_model.")
  frames = geometry.normalise(golden_files.frames(stored["video_u8"]).astype(jnp.float32) / 255)
  mask = golden_files.masks(stored["mask"], net.grid_hw)
  predict = jax.jit(lambda p, f: net.apply(p, f, mask, mutable=["intermediates"]))
  prediction, said = predict({"params": params}, frames)

  def check(got, want):
    close(got, want, atol=1e-4 * np.abs(want).max())

  tokens = said["intermediates"]["encoder_tokens"][0]
  check(thinned(thinned(tokens, stored["enc_out"]), stored["enc_out"], 2), stored["enc_out"])
  hidden = np.split(stored["mask"], 2, axis=1)[1]
  patches = np.asarray(patchify(prediction.image, net.patch))[hidden][None]
  check(thinned(patches, stored["counterfactual"]), stored["counterfactual"])
  row, column = stored["points"][0] // net.patch
  token = prediction.tokens[0, row, column]
  check(token, stored["patch_embedding"][0])
  section = golden_files.settings(cwm_goldens, "full_size", "perturber")
  mine = {name: array for name, array in state.items() if name.startswith("perturber.")}
  perturber = Perturber(hidden_width=section["hidden_dim"])
  mark_params = keymaps.to_params(mine, keymaps.perturber_rules(prefix="perturber."))
  numbers = perturber.apply({"params": mark_params}, token)
  size = section["pert_size"]
  drawn = gaussian.draw(gaussian.gaussian_params(numbers, size=size), size=size)
  check(drawn, stored["pert"][0].transpose(1, 2, 0))

  mark = Partial(gaussian.GaussianMark(perturber, size=size), mark_params)
  points_xy = geometry.index_to_point_xy(jnp.asarray(stored["points"]))
  marked = multimask.mark_frames(mark, frames[:, 0], prediction.tokens[:, None], points_xy)
  answer, _ = predict({"params": params}, jnp.stack([marked[:, 0], frames[:, 1]], axis=1))
  delta = answer.image - prediction.image
  heat = jnp.sum(jnp.abs(delta), axis=-1)
  want = np.moveaxis(stored["recon_delta"], 1, -1)
  # As exact as the predictions it is taken from, which are hundreds of times larger: ten times what
  # the stored response differs from one in double precision, 2.2e-6 of their largest. The mean of
  # so small and wide a response is less sure than its values are.
  atol = 2.2e-5 * np.abs(stored["counterfactual"]).max()
  close(thinned(thinned(delta, want), want, 2), want, atol=atol)
  close(jnp.max(heat, axis=(1, 2)), stored["occ_metric"], atol=2 * atol)
  close(geometry.soft_argmax_yx(heat), stored["expec_pred_pixel_loc"], atol=0.05)
