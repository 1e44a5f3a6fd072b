"""The weights in the package find motion, and find it by looking at frame 2."""

import numpy as np
import pytest

from cwm_jax.evals import scenes
from cwm_jax.pretrained import weights
from cwm_jax.tracker import Tracker

SCENES = 12

pytestmark = pytest.mark.usefixtures("fully_optimised")


@pytest.fixture(scope="module")
def some_scenes():
  (pairs,) = scenes.scenes_test_v1(limit=SCENES, at_a_time=SCENES)
  return pairs


def median_error(tracker, pairs, frames=None):
  answer = tracker.pairs(pairs.frames if frames is None else frames, pairs.points_xy)
  return float(np.median(np.linalg.norm(answer.xy - pairs.truth_xy, axis=-1)))


def test_the_file_is_small_and_says_what_it_is():
  path = weights.shipped()
  header = weights.read_header(path)
  assert path.stat().st_size < 8e6
  assert {tensor.dtype for tensor in header.tensors.values()} == {"BF16"}
  assert header.config["mark"]["kind"] in ("square", "gaussian")
  assert path.with_suffix(".md").is_file()


def test_they_read_motion_and_more_masks_read_it_better(some_scenes):
  """The numbers of the whole set are in the README; here a part of it, with room to spare."""
  still = float(np.median(np.linalg.norm(some_scenes.truth_xy - some_scenes.points_xy, axis=-1)))
  ten = median_error(Tracker.load(num_masks=10, readout="window"), some_scenes)
  one = median_error(Tracker.load(num_masks=1, readout="window"), some_scenes)
  assert ten < 0.85 * still
  assert ten < one


def test_with_frame_2_of_another_pair_nothing_is_found(some_scenes):
  still = float(np.median(np.linalg.norm(some_scenes.truth_xy - some_scenes.points_xy, axis=-1)))
  frames = some_scenes.frames.copy()
  frames[:, 1] = np.roll(frames[:, 1], 1, axis=0)
  assert median_error(Tracker.load(num_masks=10, readout="window"), some_scenes, frames) > still


def test_the_student_is_smaller_than_three_megabytes_and_no_worse_than_its_teacher(some_scenes):
  path = weights.shipped("student-tiny")
  assert path.stat().st_size < 3e6 and path.with_suffix(".md").is_file()

  def average(tracker, frames=some_scenes.frames):
    answer = tracker.pairs(frames, some_scenes.points_xy)
    return float(np.mean(np.linalg.norm(answer.xy - some_scenes.truth_xy, axis=-1)))

  student = Tracker.load("student-tiny")
  assert average(student) <= average(Tracker.load(num_masks=10, readout="window"))
  still = float(np.mean(np.linalg.norm(some_scenes.truth_xy - some_scenes.points_xy, axis=-1)))
  exchanged = some_scenes.frames.copy()
  exchanged[:, 1] = np.roll(exchanged[:, 1], 1, axis=0)
  assert average(student) < 0.7 * still < average(student, exchanged)
