"""Read-outs, coordinates and resizes against values computed by the public code."""

import json
import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import geometry
from cwm_jax.counterfactual import masks, occlusion
from cwm_jax.models import predictor


@pytest.fixture(scope="module")
def readouts(cwm_goldens):
  with np.load(cwm_goldens / "c3_softargmax_occ.npz") as file:
    return dict(file)


@pytest.fixture(scope="module")
def small_parts(cwm_goldens):
  with np.load(cwm_goldens / "c7_utils.npz") as file:
    return dict(file)


def _modes(readouts):
  """(name, what it says of the weighting) of every stored mode, such as T200_l1, m1_l1 and m2_l2.

  A number after a T is an inverse temperature; m1 and m2 weight by the heat and by its square.
  """
  for key in readouts:
    if match := re.fullmatch(r"((T|m)([\d.]+)_l[12])_heatmap", key):
      name, kind, number = match.groups()
      if kind == "T":
        yield name, dict(inverse_temperature=float(number))
      else:
        yield name, dict(weighting={"1": "linear", "2": "squared"}[number])


def test_the_soft_argmax_is_the_stored_one_in_every_mode(readouts):
  modes = dict(_modes(readouts))
  # "tie_heatmap" is a picture of its own.
  assert {f"{name}_heatmap" for name in modes} == {
    key for key in readouts if key.endswith("_heatmap") and key != "tie_heatmap"
  }
  assert {name[0] for name in modes} == {"T", "m"}
  delta = jnp.moveaxis(jnp.asarray(readouts["delta"]), 1, -1)
  for name, weighting in modes.items():
    want = {key: readouts[f"{name}_{key}"] for key in ("expec", "std", "heatmap", "reduced")}
    squares = name.endswith("l2")
    heat = jnp.sqrt(jnp.sum(delta**2, axis=-1)) if squares else jnp.sum(jnp.abs(delta), -1)
    close = partial(np.testing.assert_allclose, rtol=1e-4, err_msg=name)
    close(heat, want["reduced"], rtol=1e-5, atol=1e-7)
    got = geometry.heat_distribution(heat, **weighting)
    close(got, want["heatmap"], atol=1e-8)
    close(geometry.mean_yx(got), want["expec"])
    close(geometry.spread(got), want["std"])
    close(geometry.soft_argmax_yx(heat, **weighting), want["expec"])
    for found in (got, heat):
      np.testing.assert_array_equal(
        geometry.argmax_yx(found), readouts[f"{name}_argmax"], err_msg=name
      )


def test_of_equal_maxima_the_first_in_raster_order_wins(readouts):
  heat = readouts["tie_heatmap"]
  assert ((heat == heat.max(axis=(1, 2), keepdims=True)).sum(axis=(1, 2)) > 1).any()
  np.testing.assert_array_equal(geometry.argmax_yx(jnp.asarray(heat)), readouts["tie_argmax"])


@pytest.mark.parametrize("over_pixels", occlusion.OVER_PIXELS)
@pytest.mark.parametrize("over_masks", occlusion.OVER_MASKS)
def test_the_occlusion_measure_is_the_stored_one(readouts, over_pixels, over_masks):
  responses = jnp.sum(jnp.abs(jnp.asarray(readouts["occ_deltas"])), axis=2)
  got = occlusion.measure(responses, over_pixels=over_pixels, over_masks=over_masks)
  name = f"{over_pixels}_{over_masks}"
  np.testing.assert_allclose(got, readouts[f"occ_metric_{name}"], rtol=1e-5)
  np.testing.assert_array_equal(np.asarray(got) < 0.05, readouts[f"occ_{name}"])


def _sizes(small_parts, name):
  """(from_hw, to_hw) of a stored rescaling: far points are clamped to the last pixel of each."""
  last = [small_parts[f"rescale_float_{n}"].max(axis=0) for n in ("raster", name)]
  return tuple(tuple(int(n) + 1 for n in hw) for hw in last)


@pytest.mark.parametrize("name", ["up", "down", "hi"])
def test_points_move_to_another_size_truncated_or_exactly(small_parts, name):
  from_hw, to_hw = _sizes(small_parts, name)
  index = jnp.asarray(small_parts["pts_int"].astype(np.int32))
  got = geometry.rescale_index_yx(index, from_hw, to_hw)
  np.testing.assert_array_equal(got, small_parts[f"rescale_int_{name}"])
  points_xy = jnp.asarray(small_parts["pts_float"][:, ::-1])
  moved = np.asarray(geometry.scale_points_xy(points_xy, from_hw, to_hw))[:, ::-1]
  want = small_parts[f"rescale_float_{name}"]
  np.testing.assert_allclose(np.clip(moved, 0, np.array(to_hw) - 1), want, rtol=1e-5, atol=1e-5)


def test_indices_beyond_the_image_are_clamped(small_parts):
  _, to_hw = _sizes(small_parts, "raster")
  index = jnp.asarray(small_parts["pts_int"].astype(np.int32))
  got = geometry.rescale_index_yx(index, (1, 1), to_hw)
  np.testing.assert_array_equal(got, small_parts["rescale_int_raster"])


@pytest.mark.parametrize("name", ["up", "down", "mixed", "same"])
def test_videos_are_resized_as_stored(small_parts, name):
  video = jnp.moveaxis(jnp.asarray(small_parts["video"]), 1, -1)
  want = np.moveaxis(small_parts[f"resize_{name}"], 1, -1)
  h, w = want.shape[2:4]
  np.testing.assert_allclose(geometry.resize(video, (h, w)), want, atol=1e-5)
  whole = geometry.resize_window(
    video, jnp.zeros(2, jnp.int32), video.shape[2:4], (h, w), canvas_hw=(h + 3, w + 5)
  )
  np.testing.assert_allclose(whole[:, :, :h, :w], want, atol=1e-5)
  assert not np.any(whole[:, :, h:]) and not np.any(whole[:, :, :, w:])


def test_colours_are_normalised_as_stored(small_parts):
  video = jnp.moveaxis(jnp.asarray(small_parts["video"]), 1, -1)
  for ours, name in ((geometry.normalise, "normed"), (geometry.unnormalise, "unnormed")):
    np.testing.assert_allclose(ours(video), np.moveaxis(small_parts[name], 1, -1), atol=1e-5)


def test_patches_are_laid_out_as_stored(small_parts):
  want = small_parts["patches"]
  patch = int(np.sqrt(want.shape[-1] / 3))
  frames = np.moveaxis(small_parts["video"], 1, -1)
  h, w = (n // patch * patch for n in frames.shape[2:4])
  got = predictor.patchify(jnp.asarray(frames[:, :, :h, :w]), patch)
  np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_masks_hide_as_many_patches_as_the_stored_ones(small_parts, cwm_goldens):
  want = small_parts["mm_mask"]
  patches = want.shape[-1] // 2
  ratio = json.loads((cwm_goldens / "config.json").read_text())["flow"]["mask_ratio"]
  assert (want[..., :patches] == 0).all()
  hidden = patches - masks.num_visible_patches((1, patches), ratio)
  assert (want[..., patches:].sum(-1) == hidden).all()


def test_pictures_are_sampled_and_warped_as_stored_inside_the_picture(small_parts):
  pictures = jnp.moveaxis(jnp.asarray(small_parts["warp_img"]), 1, -1)
  h, w = pictures.shape[1:3]
  # The public code counts in bare indices and has zeros outside; ours goes on with the border.
  coords = small_parts["bs_coords"]
  inside = ((coords >= 0) & (coords <= np.array([w - 1, h - 1]))).all(-1)
  want = np.moveaxis(small_parts["bs_out"], 1, -1)
  for picture, points, stored, valid in zip(pictures, coords, want, inside):
    got = geometry.sample_bilinear(picture, jnp.asarray(points) + 0.5)
    np.testing.assert_allclose(np.asarray(got)[valid], stored[valid], atol=2e-5)
  flows = np.moveaxis(small_parts["warp_flow"], 1, -1)
  warped = np.moveaxis(small_parts["warped"], 1, -1)
  for picture, flow_xy, stored, valid in zip(pictures, flows, warped, small_parts["warp_mask"]):
    got = np.asarray(geometry.warp_backward(picture, jnp.asarray(flow_xy)))
    np.testing.assert_allclose(got[valid[0] > 0], stored[valid[0] > 0], atol=2e-5)
