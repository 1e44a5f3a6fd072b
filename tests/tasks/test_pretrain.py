"""The pretraining loss on pairs whose answer is known, and its read-out hook."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_job

from cwm_jax import geometry, tasks
from cwm_jax.models import predictor
from cwm_jax.tasks import pretrain
from cwm_jax.types import FramePair, InputError, Prediction

KEYS = jax.random.split(jax.random.key(5), 3)


class Fixed:
  """A stand-in for a network: always predicts the same normalised image."""

  patch = 4

  def __init__(self, image):
    self._image = image

  def apply(self, variables, frames, mask, *, num_visible, keep_revealed):
    visible = np.sum(~np.asarray(mask), axis=(1, 2, 3))
    assert (visible == num_visible).all()
    hidden = jnp.repeat(jnp.repeat(mask[:, 1], 4, axis=1), 4, axis=2)[..., None]
    shown = self._image if keep_revealed else jnp.where(hidden, self._image, 0.0)
    return Prediction(shown)


def random_pair(batch=3):
  frames = np.random.default_rng(0).random((batch, 2, 16, 16, 3), np.float32)
  return FramePair(jnp.asarray(frames))


def task_of(image, **settings):
  return pretrain.Pretrain(Fixed(image), (16, 16), mask_ratio=0.75, **settings)


@pytest.mark.parametrize("loss_on", pretrain.LOSS_ON)
def test_predicting_frame_2_costs_nothing_and_copying_frame_1_costs_the_copy_loss(loss_on):
  pair = random_pair()
  frames = geometry.normalise(pair.frames)
  right, metrics = task_of(frames[:, 1], loss_on=loss_on).loss({}, pair, KEYS)
  copied, _ = task_of(frames[:, 0], loss_on=loss_on).loss({}, pair, KEYS)
  assert float(right) == 0.0
  assert float(copied) == float(metrics["copy_loss"]) > 1.0


def test_the_loss_on_hidden_patches_does_not_see_the_revealed_ones():
  pair = random_pair()
  frames = geometry.normalise(pair.frames)
  hidden, _ = task_of(frames[:, 1] + 2.0, loss_on="hidden").loss({}, pair, KEYS)
  np.testing.assert_allclose(hidden, 4.0, rtol=1e-5)


def test_normalised_targets_have_no_brightness_or_contrast():
  pair = random_pair()
  patches = predictor.patchify(geometry.normalise(pair.frames)[:, 1], 4)
  mean = patches.mean(-1, keepdims=True)
  standard = (patches - mean) / patches.std(-1, keepdims=True)
  image = predictor.unpatchify(standard, (4, 4), 4)
  loss, _ = task_of(image, target="normalised").loss({}, pair, KEYS)
  assert float(loss) < 1e-6
  brighter = FramePair(pair.frames.at[:, 1].multiply(0.5))
  loss, _ = task_of(image, target="normalised").loss({}, brighter, KEYS)
  # Scaling RGB scales each channel's spread alike but moves channels against each other a little.
  assert float(loss) < 0.05


def test_pictures_show_both_frames_what_was_revealed_and_the_prediction():
  pair = random_pair()
  task = task_of(geometry.normalise(pair.frames)[:, 1])
  strip = task.pictures({}, pair, KEYS)["prediction"]
  first, second, shown, filled = np.split(np.asarray(strip), 4, axis=2)
  np.testing.assert_allclose(first, pair.frames[:, 0], atol=1e-6)
  np.testing.assert_allclose(second, pair.frames[:, 1], atol=1e-6)
  np.testing.assert_allclose(filled, second, atol=1e-5)
  assert np.mean(np.all(shown == 0.5, axis=-1)) == 0.75


@pytest.mark.parametrize(
  "key, value, told",
  [
    ("pretrain.loss_on", "some", "loss_on"),
    ("pretrain.target", "blurred", "target"),
    ("model.patch", 5, "patches of 5"),
    ("model.mask_ratio", 1.5, "mask ratio"),
    ("model.dtype", "float8", "dtype"),
    ("model.positions", "rotating", "model.positions is 'rotating'"),
    ("model.masking", "keep", "model.masking is 'keep'"),
    ("model.remat", "some", "model.remat is 'some'"),
    ("model.attention_impl", "flash", "cannot be built: .*flash"),
    ("model.encoder_heads", 5, "multiple of 4"),
    ("model.decoder_heads", 0, "config.model cannot be built"),
    ("model.image_hw", (16,), "config.model cannot be built"),
    ("task", "juggle", "juggle"),
  ],
)
def test_settings_that_cannot_be_are_told_in_a_sentence(key, value, told):
  config = tiny_job.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(InputError, match=told):
    tasks.build(config)


def test_the_read_out_is_asked_for_every_preset_of_the_curriculum():
  config = tiny_job.get_config()
  config.log.update(eval_scenes=3, eval_masks=2)
  stages = ((0, "shifts"), (100, (("sprites", 1.0), ("shifts", 2.0))))
  config.data.sources.scenes.curriculum = stages
  task = tasks.build(config)
  scores = dict(task.evals(task.init(jax.random.key(0))))
  for preset in ("shifts", "sprites"):
    # Points that stand still or leave the picture are not asked about.
    assert scores[f"{preset}/still_median"] > 1.0
    assert 0.0 < scores[f"{preset}/average"] < 16 * np.sqrt(2)
  assert len(scores) == 2 * 5
