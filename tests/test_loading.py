"""What is said of weights whose predictions are no colours."""

from __future__ import annotations

import pytest

from cwm_jax.evals import prediction
from cwm_jax.pretrained import weights
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError


@pytest.fixture
def without_colours(tmp_path):
  """The shipped weights as if they had been trained on normalised patches."""
  params, config = weights.load(weights.shipped())
  config = {**config, "pretrain": {"target": "normalised"}}
  return weights.save(tmp_path / "model.safetensors", params, config)


def test_a_tracker_whose_predictions_are_no_colours_says_so(without_colours, caplog):
  Tracker.load()
  assert not caplog.messages
  Tracker.load(without_colours)
  assert "without their brightness and contrast" in caplog.text


def test_predictions_that_are_no_colours_are_not_measured_as_colours(without_colours):
  with pytest.raises(InputError, match="pretrain.target 'normalised'.*leave out evaluate.pred"):
    next(prediction.of_weights(str(without_colours), num_scenes=1))
