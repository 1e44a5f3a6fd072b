"""The two-stream flow predictor against values computed by the public code."""

from __future__ import annotations

import json
from functools import partial

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import geometry, models
from cwm_jax.configs import base
from cwm_jax.models import positions
from cwm_jax.models.predictor import patchify
from cwm_jax.pretrained import keymaps, two_stream_keys, weights

CASE, JOINT = "c5_two_stream_io", "c5_optcwm_io"
PREFIX = "recon_cwm_model.two_stream_vmae."


def close(got, want, *, atol):
  np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=atol)


def params_of(state):
  """(parameters, rules) of the two-stream part of a release's state."""
  mine = {name: array for name, array in state.items() if name.startswith(PREFIX)}
  links = two_stream_keys.links_of(name.removeprefix(PREFIX) for name in mine)
  rules = two_stream_keys.two_stream_rules(*links, prefix=PREFIX)
  return keymaps.to_params(mine, rules), rules


def flow_patches(flow, hidden, patch):
  """Stored [B, 2, 1, H, W] and [B, n]: numbers of the patches that carry flow, and their flows."""
  cells = np.stack([np.flatnonzero(~row) for row in hidden])
  b, _, _, h, w = flow.shape
  split = flow.reshape(b, 2, h // patch, patch, w // patch, patch).transpose(0, 2, 4, 3, 5, 1)
  dense = split.reshape(*hidden.shape, patch**2, 2)
  chosen = np.take_along_axis(dense, cells[:, :, None, None], axis=1)
  return jnp.asarray(cells), jnp.asarray(chosen)


@pytest.fixture(scope="module")
def shrunken(cwm_goldens):
  """(module, variables) of the set's small two-stream model."""
  params, _ = params_of(golden_files.state(cwm_goldens, "c5_optcwm"))
  return golden_files.flow_predictor(cwm_goldens), {"params": params}


def test_every_tensor_of_the_release_has_its_place_and_goes_back_unchanged(cwm_goldens):
  state = golden_files.state(cwm_goldens, "c5_optcwm")
  params, rules = params_of(state)
  again = keymaps.to_state(params, rules)
  assert set(again) == {name for name in state if name.startswith(PREFIX)}
  for name, array in again.items():
    np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_the_released_size_has_the_keys_and_shapes_of_the_manifest(cwm_goldens):
  """Every key of the joint checkpoint is named by a rule, and the default config is its size."""
  manifest = json.loads((cwm_goldens / "manifest_optcwm_full.json").read_text())
  mine = {name: tuple(shape) for name, shape in manifest.items() if name.startswith(PREFIX)}
  links = two_stream_keys.links_of(name.removeprefix(PREFIX) for name in mine)
  got = keymaps.to_shapes(mine, two_stream_keys.two_stream_rules(*links, prefix=PREFIX))
  section = base.get_config().flow_predictor
  section.kind = "two_stream"
  assert links == (section.two_stream.encoder_links, section.two_stream.decoder_links)
  net = models.build_flow_predictor(section.to_dict())
  frame, points = jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 8, 2))
  want = jax.eval_shape(net.init, jax.random.key(0), frame, points, points)["params"]
  weights.check_names(
    got, {name: x.shape for name, x in weights.flatten(want).items()}, where="the manifest"
  )
  rest = [name for name in manifest if not name.startswith((PREFIX, "flow_predictor."))]
  assert rest == []


def test_position_tables_are_as_stored(cwm_goldens):
  stored = golden_files.arrays(cwm_goldens, CASE)
  tables = [name for name in stored if name.startswith(("pos_embed", "sincos"))]
  assert len(tables) == 3
  for name in tables:
    _, count, width = stored[name].shape
    # The reference rounds angles of hundreds of radians to float32.
    close(positions.token_sine_positions(count, width), stored[name][0], atol=1e-5 * count)


def test_frame_2_is_predicted_as_stored_from_flows_that_vary_within_patches(cwm_goldens, shrunken):
  net, variables = shrunken
  stored = golden_files.arrays(cwm_goldens, CASE)
  frame1 = golden_files.frames(stored["video"])[:, 0]
  given = flow_patches(stored["flow"], stored["flow_mask"], net.patch)
  call = jax.jit(partial(net.apply, method="with_flow_patches"))
  atol = golden_files.tolerance(cwm_goldens, JOINT, "reconstruction", stored["out"])
  close(patchify(call(variables, frame1, *given), net.patch), stored["out"], atol=atol)


@pytest.fixture(scope="module")
def from_points(cwm_goldens, shrunken):
  """(stored arrays, predicted patches, encoder tokens of both streams) of the joint case."""
  net, variables = shrunken
  stored = golden_files.arrays(cwm_goldens, JOINT)
  frame1 = golden_files.frames(stored["video"])[:, 0]
  pixels = stored["flow_patch_indices"].astype(int) * net.patch + net.patch // 2
  pair = np.arange(len(pixels))[:, None]
  flow_xy = stored["sparse_flow"][pair, :, 0, pixels[..., 0], pixels[..., 1]]
  points_xy = geometry.index_to_point_xy(jnp.asarray(pixels))
  call = jax.jit(partial(net.apply, mutable=["intermediates"]))
  image, said = call(variables, frame1, points_xy, jnp.asarray(flow_xy))
  return stored, patchify(image, net.patch), said["intermediates"]["encoder_tokens"][0]


def test_both_streams_encode_as_stored(from_points):
  stored, _, (primary, secondary) = from_points
  close(primary, stored["enc_primary"], atol=1e-4 * np.abs(stored["enc_primary"]).max())
  # Stored in raster order, ours in the order of the points.
  side = int(stored["flow_mask"].shape[1] ** 0.5)
  rows, columns = np.moveaxis(stored["flow_patch_indices"].astype(int), -1, 0)
  order = np.argsort(rows * side + columns, axis=1)
  ours = np.take_along_axis(np.asarray(secondary), order[..., None], axis=1)
  close(ours, stored["enc_secondary"], atol=1e-4 * np.abs(ours).max())


def test_frame_2_is_predicted_as_stored_from_the_flows_of_points(cwm_goldens, from_points):
  stored, patches, _ = from_points
  atol = golden_files.tolerance(cwm_goldens, JOINT, "reconstruction", stored["recon"])
  close(patches, stored["recon"], atol=atol)


def test_the_released_size_predicts_what_is_stored(cwm_goldens):
  """The full-size model with the set's random weights; 2.5 GB."""
  stored = golden_files.arrays(cwm_goldens, "cF_two_stream_fullsize_recipe")
  manifest = json.loads((cwm_goldens / "manifest_optcwm_full.json").read_text())
  top = "recon_cwm_model."
  shapes = {n.removeprefix(top): tuple(s) for n, s in manifest.items() if n.startswith(top)}
  state = golden_files.recipe(shapes, int(stored["recipe_seed"]))
  params, _ = params_of({top + name: array for name, array in state.items()})
  section = base.get_config().flow_predictor
  section.kind = "two_stream"
  net = models.build_flow_predictor(section.to_dict())
  frames = golden_files.frames(stored["video_u8"]).astype(jnp.float32) / 255
  cells = np.flatnonzero(~stored["flow_mask"][0])
  rows, columns = np.divmod(cells, stored["flow_patch"].shape[-1])
  flow_xy = jnp.asarray(stored["flow_patch"][:, :, rows, columns].transpose(0, 2, 1))
  points_xy = geometry.index_to_point_xy(jnp.stack([rows, columns], -1)[None] * net.patch)
  image = jax.jit(net.apply)(
    {"params": params}, geometry.normalise(frames[:, 0]), points_xy, flow_xy
  )
  patches, want = patchify(image, net.patch), stored["out"]
  kept = patches[:, :: golden_files.stride(patches.shape[1], want.shape[1])]
  close(kept, want, atol=1e-4 * np.abs(want).max())
