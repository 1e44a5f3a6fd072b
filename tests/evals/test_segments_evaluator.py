"""Segments measured on movers whose outlines are known."""

import logging

import numpy as np
import pytest
from jax import numpy as jnp

from cwm_jax import evaluate
from cwm_jax.configs import base
from cwm_jax.evals import scenes, segments, spread, trackers
from cwm_jax.types import InputError

SIDE = 32
TRUTH = np.zeros((SIDE, SIDE), bool)
TRUTH[8:24, 4:20] = True
QUESTION = segments.SegmentQuestion(
  np.zeros((SIDE, SIDE, 3), np.uint8), np.array([12.0, 16.0], np.float32), TRUTH
)


class Answers:
  """Says of every point that `score` moves along."""

  def __init__(self, score):
    self.score, self.asked = np.asarray(score, np.float32), []

  def ask(self, program, frame1, frame2, point_xy):
    assert frame1 is frame2
    self.asked.append(np.asarray(point_xy))
    return jnp.asarray(self.score)


def _measure(score, radius=0.25):
  tracker = Answers(score)
  return dict(segments.SegmentsEvaluator(tracker, [QUESTION] * 2, radius=radius).run())


def test_who_knows_the_mover_is_wholly_right_and_the_disc_is_not():
  got = _measure(np.where(TRUTH, 1.0, -1.0))
  assert got["iou"] == 1.0 and got["num_points"] == 2
  assert got["share"] == got["truth/share"] == 0.25
  # A disc of 8 pixels in a square of side 16: pi / 4 of it.
  assert got["disc/iou"] == pytest.approx(np.pi / 4, abs=0.03)
  assert got["iou_ratio"] == pytest.approx(1 / got["disc/iou"])
  # As many pixels as the disc has, all of them on the mover.
  assert got["sized/iou"] == pytest.approx(got["disc/iou"])


def test_who_takes_the_whole_picture_has_the_movers_share_of_it_right():
  got = _measure(np.ones((SIDE, SIDE)))
  assert got["iou"] == 0.25 and got["share"] == 1.0
  assert got["iou_ratio"] < 0.5


def test_scores_right_in_order_with_a_threshold_too_high_show_when_as_many_pixels_are_taken():
  got = _measure(np.where(TRUTH, -1.0, -2.0))
  assert got["iou"] == 0.0 and got["sized/iou"] > 0.7


def test_a_smaller_answer_is_brought_to_the_frames_size():
  got = _measure(np.where(TRUTH[::4, ::4], 1.0, -1.0))
  assert got["iou"] > 0.85


def test_two_points_on_movers_are_asked_about_in_each_scene_and_the_time_left_is_told(
  caplog, monkeypatch
):
  caplog.set_level(logging.INFO, "cwm_jax")
  monkeypatch.setattr(spread, "_EVERY_S", -1.0)
  tracker = Answers(np.zeros((8, 8)))
  evaluator = segments.on_scenes(tracker, limit=2)
  got = dict(evaluator.run())
  assert got["num_points"] == 4
  assert [line.split("  eta ")[0] for line in caplog.messages] == [
    f"  {i}/4 points" for i in (1, 2, 3)
  ]
  (pairs,) = scenes.scenes_test_v1(limit=2, at_a_time=2)
  np.testing.assert_array_equal(tracker.asked, pairs.points_xy[:, 1::2].reshape(-1, 2))
  # The movers' sizes: a disc in the middle of their range overlaps with them, and is none of them.
  assert 0.1 < got["disc/iou"] < 0.9 and 0.005 < got["truth/share"] < 0.2


def test_nothing_to_ask_about_is_told():
  with pytest.raises(InputError, match="no point on a mover"):
    dict(segments.SegmentsEvaluator(Answers(np.zeros((8, 8))), [], radius=0.2).run())


def test_the_evaluation_job_asks_the_predictors_among_its_trackers(tmp_path, monkeypatch, capsys):
  asked = []

  def build(name, settings):
    asked.append(name)
    return [Answers(np.zeros((8, 8))) if name == "mm3" else trackers.build(name)]

  monkeypatch.setattr(evaluate.named, "build", build)
  c = base.get_config()
  c.evaluate.update(trackers=("mm3", "zero"), segments=1)
  numbers = evaluate.run(c, tmp_path)
  assert asked == ["mm3"] and set(numbers["segments[1]"]) == {"mm3"}
  assert numbers["segments[1]"]["mm3"]["iou"] == 0.0
  assert "movers' %" in capsys.readouterr().out
  c.evaluate.trackers = ("zero",)
  with pytest.raises(InputError, match="mm<N>"):
    evaluate.run(c, tmp_path / "other")
