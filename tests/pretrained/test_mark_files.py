"""Learned marks in files of their own: written, read back, enlarged with the image, refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import joint_job
import numpy as np
import pytest
import tiny_model

from cwm_jax import geometry
from cwm_jax.models.perturber import Perturber
from cwm_jax.pretrained import learned_marks, mark_files
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError

MODEL = tiny_model.config()


@pytest.fixture(scope="module")
def params():
  net = Perturber(hidden_width=8)
  return jax.jit(net.init)(jax.random.key(0), jnp.zeros(MODEL["encoder_width"]))["params"]


@pytest.fixture
def path(params, tmp_path):
  return mark_files.save(tmp_path / "mark.safetensors", params, model=MODEL, size=5)


def drawn(path, side):
  """What a mark adds to a grey image of that size, at its middle."""
  mark = mark_files.load(path, model=tiny_model.config(image_hw=[side, side]))
  grey, token = jnp.zeros((side, side, 3)), jnp.linspace(-1, 1, MODEL["encoder_width"])
  return np.asarray(jax.jit(mark)(grey, jnp.full(2, side / 2 + 0.5), token))


def test_a_mark_comes_back_as_it_was_and_a_tracker_takes_its_file(path, params, tmp_path):
  read, config = mark_files.read(path, model=MODEL)
  jax.tree.map(np.testing.assert_array_equal, read, params)
  sizes = {"hidden_width": 8, "size": 5, "scale": 1}
  assert config["mark"] == {"kind": "learned", "on_pixel": True, "reach": 1.0, **sizes}
  frames = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
  predictor = joint_job.weights_file(tmp_path)
  explained = Tracker.load(predictor, num_masks=2, mark=path).explain(*frames, (8.5, 8.5))
  outside = np.abs(np.arange(16) - 8) > 2
  assert np.abs(explained.mark).max() > 0.1
  np.testing.assert_allclose(explained.mark[outside], 0.0, atol=1e-6)


def test_a_mark_file_says_whether_the_mark_is_bound_to_pixels(params, tmp_path):
  for bound in (True, False):
    path = mark_files.save(tmp_path / "m", params, model=MODEL, size=5, on_pixel=bound)
    assert mark_files.load(path, model=MODEL).func.on_pixel is bound
  config = {"mark": {"kind": "learned", "hidden_width": 8, "size": 5, "scale": 1}}
  assert learned_marks.build(config, params).func.on_pixel is True
  with pytest.raises(InputError, match="on_pixel is true or false, not 'no'"):
    learned_marks.build({"mark": {**config["mark"], "on_pixel": "no"}}, params)
  with pytest.raises(InputError, match="reach is from 0 to 1, not 2"):
    learned_marks.build({"mark": {**config["mark"], "reach": 2}}, params)


def test_a_mark_keeps_its_share_of_an_image_twice_as_large(path):
  small, large = drawn(path, 16), drawn(path, 32)
  share = [np.mean(np.any(mark != 0, axis=-1)) for mark in (small, large)]
  assert share[0] == share[1] == 25 / 256
  shrunk = geometry.resize(jnp.asarray(large), (16, 16), antialias=True)
  np.testing.assert_allclose(shrunk.sum(), small.sum(), rtol=1e-5)
  np.testing.assert_allclose(large.max(), small.max(), rtol=1e-6)


@pytest.mark.parametrize(
  "changes, told",
  [
    (dict(encoder_width=32), "predictor of encoder_width 16, this one has 32"),
    (dict(patch=8), "predictor of patch 4, this one has 8"),
    (dict(image_hw=[24, 24]), "images of 16 x 16; 24 x 24 are no multiple"),
    (dict(image_hw=[8, 8]), "no multiple"),
    (dict(image_hw=[32, 16]), "no multiple"),
  ],
)
def test_a_mark_for_another_predictor_is_refused(path, changes, told):
  with pytest.raises(InputError, match=told):
    mark_files.load(path, model=tiny_model.config(**changes))


def test_files_without_a_learned_mark_and_parameters_of_no_perturber_are_refused(params, tmp_path):
  with pytest.raises(InputError, match="holds no learned mark"):
    mark_files.load(joint_job.weights_file(tmp_path), model=MODEL)
  with pytest.raises(InputError, match="not a perturber's"):
    mark_files.save(tmp_path / "m", {"fc1": {}}, model=MODEL, size=5)
  with pytest.raises(InputError, match="fc1/kernel"):
    mark_files.save(tmp_path / "m", params, model=tiny_model.config(encoder_width=8), size=5)
