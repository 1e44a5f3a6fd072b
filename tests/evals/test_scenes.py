"""The frozen test set as it is seen and asked about, and how many of it there are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cwm_jax import evaluate
from cwm_jax.configs import base
from cwm_jax.evals import scenes
from cwm_jax.types import InputError

STORED = Path(__file__).with_name("scenes_test_v1.json")


def test_pictures_points_and_truth_of_the_frozen_set_have_not_changed():
  """If this fails the set's questions are others: make a v2, do not mend the numbers.

  Stored are the first three scenes: points and truth in pixels, and means of 4 x 4 cells of both
  frames and of the steps between neighbours in a row, RGB of 255.
  """
  stored = {name: np.array(rows) for name, rows in json.loads(STORED.read_text()).items()}
  rounds = list(scenes.scenes_test_v1(limit=3, at_a_time=2))
  assert [len(pairs.frames) for pairs in rounds] == [2, 1]
  frames, points, truth, mover = (np.concatenate(part) for part in list(zip(*rounds))[:4])
  means = frames.reshape(3, 2, 4, 64, 4, 64, 3).mean(axis=(3, 5))
  np.testing.assert_allclose(means.reshape(24, 12), stored["frame_means"], atol=0.1)
  steps = np.abs(np.diff(frames.astype(float), axis=3)).mean(axis=(2, 3))
  np.testing.assert_allclose(steps.reshape(6, 3), stored["steps"], atol=0.02)
  np.testing.assert_array_equal(mover, [[False, True] * 2] * 3)
  # Where a machine rounds otherwise, a pixel at an edge may count as seen or not, which moves what
  # is drawn from the seen ones by a place.
  same = np.all(points == stored["points_xy"], axis=-1)
  assert same.mean() >= 0.5
  np.testing.assert_allclose(truth[same], stored["truth_xy"][same], atol=0.01)


@pytest.mark.parametrize("limit", [0, -5, 501])
def test_more_scenes_than_there_are_are_refused(limit):
  with pytest.raises(InputError, match=f"scenes-test-v1 has 500 scenes, and limit is {limit}$"):
    scenes.scenes_test_v1(limit=limit)


@pytest.mark.parametrize("key", ["scenes", "prediction", "segments"])
def test_an_evaluation_of_more_scenes_than_there_are_is_refused_before_anything_is_measured(
  tmp_path, key
):
  config = base.get_config()
  config.evaluate[key] = 600
  with pytest.raises(InputError, match=rf"has 500 scenes, and evaluate\.{key} is 600"):
    evaluate.run(config, tmp_path)
  assert not (tmp_path / evaluate.RESULTS).exists()
