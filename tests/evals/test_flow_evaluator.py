import logging
import re

import numpy as np
import pytest
import toy_predictors as toys

from cwm_jax.evals import flow, prediction, spread, trackers
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError


def _questions(shifts, hw=(24, 32), seed=0):
  rng = np.random.default_rng(seed)
  first = rng.integers(0, 256, (len(shifts), *hw, 3), dtype=np.uint8)
  second = np.stack([np.roll(f, (dy, dx), (0, 1)) for f, (dx, dy) in zip(first, shifts)])
  points = rng.integers(8, 16, (len(shifts), 3, 2)) + np.float32(0.5)
  truth = points + np.array(shifts, np.float32)[:, None]
  visible = np.ones(points.shape[:2], bool)
  return flow.FlowQuestions(np.stack([first, second], 1), points, truth, visible)


def _matcher():
  return Tracker(
    toys.matching,
    image_hw=(24, 32),
    patch=4,
    num_masks=3,
    mark={"kind": "gaussian", "amplitude": 0.5, "sigma": 1.0},
  )


def test_a_tracker_that_looks_is_right_and_falls_to_chance_when_frame_2_is_exchanged():
  groups = [_questions([(3, 0), (-3, 0)]), _questions([(0, 3), (0, -3)], seed=1)]
  got = dict(flow.FlowEvaluator(_matcher(), groups).run())
  assert got["average_distance"] == 0.0 and got["delta_avg"] == 1.0
  assert got["median_ratio"] == got["moving/median_ratio"] == 0.0
  # Three of 32 columns are 24 px at 256, three of 24 rows are 32.
  assert got["zero/average_distance"] == pytest.approx(28.0, abs=1e-3)
  assert got["chance/average_distance"] == pytest.approx(56.0, abs=1e-3)
  assert got["exchanged/median_distance"] > got["zero/median_distance"] / 2
  assert got["num_points"] == 12


def test_an_evaluation_that_was_killed_goes_on_group_by_group(tmp_path):
  groups = [_questions([(3, 0), (-3, 0)], seed=seed) for seed in range(3)]

  class Killed(trackers.ZeroMotion):
    left = 2

    def pairs(self, *asked):
      self.left -= 1
      if self.left < 0:
        raise KeyboardInterrupt
      return super().pairs(*asked)

  def run(tracker, origin="a"):
    how = dict(honesty=False, kept=tmp_path / "kept", origin=origin)
    return dict(flow.FlowEvaluator(tracker, groups, **how).run())

  with pytest.raises(KeyboardInterrupt):
    run(Killed())
  rest = Killed()
  rest.left = 1
  assert run(rest) == dict(flow.FlowEvaluator(trackers.ZeroMotion(), groups, honesty=False).run())
  # What is damaged or of another origin is asked for again.
  (tmp_path / "kept" / "001.npz").write_bytes(b"PK")
  rest.left = 1
  run(rest)
  assert rest.left == 0
  with pytest.raises(KeyboardInterrupt):
    run(rest, origin="b")


def test_a_tracker_that_does_not_look_is_found_out():
  prior = Tracker(
    toys.shifted_by(0, 3),
    image_hw=(24, 32),
    patch=4,
    num_masks=3,
    mark={"kind": "gaussian", "amplitude": 0.5, "sigma": 1.0},
  )
  got = dict(flow.FlowEvaluator(prior, [_questions([(3, 0), (3, 0)])]).run())
  assert got["average_distance"] == got["exchanged/average_distance"] == 0.0


def test_points_that_do_not_stay_visible_do_not_count():
  questions = _questions([(3, 0), (-3, 0)])
  visible = questions.visible.copy()
  visible[1] = False
  got = dict(flow.FlowEvaluator(trackers.ZeroMotion(), [questions._replace(visible=visible)]).run())
  assert got["num_points"] == 3
  assert got["median_ratio"] == 1.0
  with pytest.raises(InputError, match="no point"):
    dict(flow.FlowEvaluator(trackers.ZeroMotion(), []).run())


def test_still_points_are_left_out_of_the_moving_ones():
  got = dict(flow.FlowEvaluator(trackers.ZeroMotion(), [_questions([(4, 0), (0, 0)])]).run())
  assert got["average_distance"] == pytest.approx(16.0)
  assert got["moving/average_distance"] == pytest.approx(32.0)


def test_how_long_the_rest_will_take_is_logged_now_and_then(caplog, monkeypatch):
  caplog.set_level(logging.INFO, "cwm_jax")
  evaluator = flow.FlowEvaluator(trackers.ZeroMotion(), [_questions([(3, 0)])] * 3)
  dict(evaluator.run())
  assert "groups of pairs" not in caplog.text  # it was over at once
  monkeypatch.setattr(spread, "_EVERY_S", -1.0)
  dict(evaluator.run())
  ours = [record.message for record in caplog.records if record.name.startswith("cwm_jax")]
  told = [re.sub(r"\d+:\d\d$", "TIME", line) for line in ours]
  assert told == [f"  {i}/3 groups of pairs  eta TIME" for i in (1, 2)]


def test_pairs_with_dense_truth_become_questions(cwm_data):
  pairs = dict(flow.flow_pair_questions(cwm_data / "flow_gt" / "middlebury", per_side=4))
  assert len(pairs) == 4
  for questions in pairs.values():
    assert questions.points_xy.shape == (1, 16, 2) and questions.visible.sum() > 8
  # The true flow of these pairs is followed by DIS and not by zero motion.
  pytest.importorskip("cv2")
  got = dict(flow.FlowEvaluator(trackers.build("dis"), [*pairs.values()], honesty=False).run())
  assert got["median_ratio"] < 0.3


def test_the_frozen_scenes_become_questions():
  (group,) = flow.scene_questions(limit=2)
  assert group.frames.shape == (2, 2, 256, 256, 3) and group.visible.shape == (2, 4)
  got = dict(flow.FlowEvaluator(trackers.ZeroMotion(), [group]).run())
  assert got["moving/average_distance"] > 2.0


def test_a_perfect_prediction_has_no_loss_and_copying_has_one():
  rng = np.random.default_rng(0)
  first = rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
  frames = np.stack([first, np.roll(first, (0, 2, 1), (0, 1, 2))], axis=1)
  ask = lambda predict: dict(  # noqa: E731
    prediction.PredictionEvaluator(predict, [frames, frames], patch=4, mask_ratio=0.75).run()
  )
  good, bad = ask(toys.shifted_by(2, 1)), ask(toys.shifted_by(0, 0))
  assert good["loss"] < 1e-10 and good["psnr"] > 90
  assert bad["loss"] == pytest.approx(bad["copy/loss"], rel=1e-5)
  assert bad["loss_ratio"] == pytest.approx(1.0, rel=1e-5)
  # Two independent uniform numbers differ by 1/6 in the mean of squares: 7.8 dB.
  assert bad["copy/psnr"] == pytest.approx(7.8, abs=0.3)
  with pytest.raises(InputError, match="no pairs"):
    dict(prediction.PredictionEvaluator(toys.matching, [], patch=4, mask_ratio=0.5).run())
