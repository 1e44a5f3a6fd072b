import subprocess
import sys

import numpy as np
import pytest

from cwm_jax.evals import tapvid_metrics as tm
from cwm_jax.types import InputError


def _answers(pred_xy, gt_occluded, pred_occluded, mode="first"):
  gt = np.zeros((1, 5, 2))
  pred = np.stack([np.array(pred_xy, float), np.zeros(5)], axis=-1)[None]
  flags = [np.array(flag, bool)[None] for flag in (gt_occluded, pred_occluded)]
  return tm.compare(np.array([1]), gt, flags[0], pred, flags[1], query_mode=mode)


def test_numbers_of_a_case_done_by_hand():
  # Frame 1 is the query's; frames 2 to 4 count: 0.5 off, 3 off but called occluded, occluded.
  got = tm.summarise(_answers([9, 7, 0.5, 3, 100], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0]))
  assert got["average_distance"] == got["median_distance"] == 1.75
  assert (got["within_1"], got["within_2"], got["within_4"], got["within_16"]) == (0.5, 0.5, 1, 1)
  assert got["delta_avg"] == pytest.approx(0.8)
  # Right: frame 2. Missed: frame 3. False: frame 4, which is called visible.
  assert got["jaccard_1"] == got["average_jaccard"] == pytest.approx(1 / 3)
  assert got["occlusion_accuracy"] == pytest.approx(1 / 3)
  assert (got["occlusion_tp"], got["occlusion_fp"], got["occlusion_fn"]) == (0, 1, 1)
  assert got["occlusion_f1"] == 0 and got["num_visible"] == 2


def test_the_query_frame_counts_for_distances_only_where_asked_for():
  answers = _answers([9, 6, 0, 3, 0], [0] * 5, [0] * 5)
  assert tm.summarise(answers)["average_distance"] == 1.0
  with_query = tm.summarise(answers, distance_at_query=True)
  assert with_query["average_distance"] == 2.25
  assert with_query["within_4"] == 1.0


def test_strided_queries_are_asked_about_earlier_frames_too():
  got = tm.summarise(_answers([8, 6, 0, 0, 0], [0] * 5, [0] * 5, mode="strided"))
  assert got["average_distance"] == 2.0 and got["num_visible"] == 4


def test_thresholds_are_strict():
  got = tm.summarise(_answers([0, 0, 1, 1, 1], [0] * 5, [0] * 5))
  assert got["within_1"] == 0.0 and got["within_2"] == 1.0


def test_without_any_visible_point_a_number_is_nan_and_not_an_error():
  got = tm.summarise(_answers([0] * 5, [1] * 5, [1] * 5))
  assert np.isnan([got["average_distance"], got["within_1"], got["delta_avg"]]).all()
  assert got["occlusion_accuracy"] == 1.0


def test_videos_are_pooled_by_points_or_averaged_with_one_f1():
  one = _answers([0, 0, 2, 2, 2], [0] * 5, [0, 0, 1, 0, 0])
  two = _answers([0, 0, 8, 8, 8], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1])
  numbers = [tm.summarise(one), tm.summarise(two)]
  assert tm.mean_over_videos(numbers)["average_distance"] == 5.0
  assert tm.summarise(tm.pool([one, two]))["average_distance"] == 3.5
  # Two right, one wrong, none missed, over both.
  assert tm.mean_over_videos(numbers)["occlusion_f1"] == pytest.approx(0.8)


def test_the_raster_is_256_on_both_sides():
  np.testing.assert_allclose(tm.to_raster(np.array([[854.0, 240.0]]), (480, 854)), [[256, 128]])


def test_an_unknown_query_mode_is_refused():
  with pytest.raises(InputError, match="query mode"):
    _answers([0] * 5, [0] * 5, [0] * 5, mode="last")


def test_the_metrics_need_numpy_only():
  code = "import sys; import cwm_jax.evals.tapvid_metrics; print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert done.stdout.strip() == "False", done.stderr
