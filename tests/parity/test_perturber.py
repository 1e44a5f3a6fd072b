"""Learned marks against values computed by the public code: numbers, drawing, adding, gradients."""

from __future__ import annotations

from functools import partial

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.counterfactual import gaussian
from cwm_jax.models.perturber import Perturber
from cwm_jax.pretrained import keymaps

CASE = "c2_perturber_io"


def close(got, want, relative=1e-4):
  want = np.asarray(want)
  np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=relative * np.abs(want).max())


@pytest.fixture(scope="module")
def case(cwm_goldens):
  """(stored arrays, module, parameters, side of the mark's grid)."""
  section = golden_files.settings(cwm_goldens, "perturber")
  state = golden_files.state(cwm_goldens, "c2_perturber")
  params = keymaps.to_params(state, keymaps.perturber_rules())
  net = Perturber(hidden_width=section["hidden_dim"])
  stored = golden_files.arrays(cwm_goldens, CASE)
  # Points are whole numbers of 64 bits; they stay NumPy's.
  stored = {name: x if x.dtype == np.int64 else jnp.asarray(x) for name, x in stored.items()}
  return stored, net, params, section["pert_size"]


@partial(jax.jit, static_argnames="size")
def drawn(numbers, size):
  return gaussian.draw(gaussian.gaussian_params(numbers, size=size), size=size)


def test_the_network_gives_the_stored_numbers(case):
  stored, net, params, _ = case
  close(net.apply({"params": params}, stored["emb"]), stored["pert_params"])


def test_the_numbers_mean_the_stored_gaussians(case):
  stored, _, _, size = case
  got = gaussian.gaussian_params(stored["pert_params"], size=size)
  close(np.concatenate([got.mean_yx, got.std_yx], -1), stored["gauss_params"][..., :4])
  close(np.stack([got.correlation, got.amplitude], -1), stored["gauss_params"][..., 4:])
  row, column = np.moveaxis(np.asarray(got.std_yx), -1, 0)
  shared = np.asarray(got.correlation) * row * column
  covariance = np.stack([row**2, shared, shared, column**2], -1).reshape(stored["cov"].shape)
  close(covariance, stored["cov"])


def test_marks_are_drawn_as_stored(case):
  stored, net, params, size = case
  want = stored["perturbation"].transpose(0, 2, 3, 1)
  close(drawn(stored["pert_params"], size), want)
  close(drawn(net.apply({"params": params}, stored["emb"]), size), want)


@pytest.mark.parametrize(("video", "want", "scale"), [
  ("video", "video_pert", 1), ("video_hi", "video_pert_hi", 2)
])  # fmt: skip
def test_videos_are_marked_as_stored_at_both_resolutions(case, video, want, scale):
  stored, net, params, size = case
  mark = jax.tree_util.Partial(gaussian.GaussianMark(net, size=size, scale=scale), params)
  before, after = (golden_files.frames(stored[name]) for name in (video, want))
  points_xy = jnp.asarray(stored["points"][:, ::-1] + 0.5, jnp.float32)
  got = jax.jit(jax.vmap(mark))(before[:, 0], points_xy, stored["emb"])
  close(got, after[:, 0])
  np.testing.assert_array_equal(before[:, 1], after[:, 1])
  assert np.abs(after[:, 0] - before[:, 0]).max() > 0.1


def test_gradients_reach_token_and_network_as_stored(case):
  stored, net, params, size = case
  cotangent = stored["R"].transpose(0, 2, 3, 1)

  def loss(params, token):
    return (drawn(net.apply({"params": params}, token), size) * cotangent).sum()

  of_params, of_token = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, stored["emb"])
  close(of_token, stored["grad_emb"], 1e-3)
  got = keymaps.to_state(of_params, keymaps.perturber_rules())
  want = {name.removeprefix("grad:"): stored[name] for name in stored if name.startswith("grad:")}
  assert set(got) == set(want)
  for name, gradient in want.items():
    close(got[name], gradient, 1e-3)
