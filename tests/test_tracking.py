"""With which frames points are compared, mode by mode; frames here are their own numbers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

from cwm_jax import tracking
from cwm_jax.types import InputError, PointFlow

SIZE_HW = (40, 60)
POINTS_XY = np.array([[10.0, 20.0], [30.0, 5.0]], np.float32)


class Answers:
  """Points move by (2, 1) a frame, and one pixel more to the right for each comparison.

  Hidden are the points of the frames in `hidden`; confidence falls with the time between frames.
  """

  def __init__(self, hidden=()):
    self.hidden, self.asked = set(hidden), []

  def __call__(self, pairs, pair_of, points_xy, size_hw):
    assert size_hw == SIZE_HW
    gap = np.array([pairs[i][1] - pairs[i][0] for i in pair_of], np.float32)
    self.asked.append([pairs[i] for i in pair_of])
    answer = PointFlow(
      points_xy + gap[:, None] * np.float32([2, 1]) + np.float32([1, 0]),
      np.array([pairs[i][1] not in self.hidden for i in pair_of]),
      1 / gap,
    )
    return SimpleNamespace(fetch=lambda: answer)


def _follow(answers, mode, start=(0, 0), count=5, **named):
  frames = ((t, SIZE_HW) for t in range(count))
  columns = tracking.follow(frames, np.array(start), POINTS_XY, mode=mode, ask=answers, **named)
  return PointFlow(*(np.stack(values, axis=1) for values in zip(*columns)))


def test_query_compares_each_frame_with_the_querys_own():
  answers = Answers()
  found = _follow(answers, "query", start=(0, 2))
  assert answers.asked == [[(0, 1)], [(0, 2)], [(0, 3), (2, 3)], [(0, 4), (2, 4)]]
  np.testing.assert_array_equal(found.xy[0, 1:, 0], 10 + 2 * np.arange(1, 5) + 1)
  np.testing.assert_array_equal(found.xy[1, :3], [[30, 5]] * 3)
  np.testing.assert_array_equal(found.visible[1], [False, False, True, True, True])


def test_chain_compares_each_frame_with_the_one_before_and_adds_up_errors():
  answers = Answers()
  found = _follow(answers, "chain")
  assert [asked[0] for asked in answers.asked] == [(0, 1), (1, 2), (2, 3), (3, 4)]
  np.testing.assert_array_equal(found.xy[0, :, 0], 10 + 3 * np.arange(5))


def test_chain_asks_a_hidden_point_from_where_it_was_last_seen():
  answers = Answers(hidden=(2, 3))
  found = _follow(answers, "chain")
  assert [asked[0] for asked in answers.asked] == [(0, 1), (1, 2), (1, 3), (1, 4)]
  np.testing.assert_array_equal(found.visible[0], [True, True, False, False, True])
  # Two comparisons led to frame 4, not four.
  assert found.xy[0, 4, 0] == 10 + 2 * 4 + 2


def test_anchor_believes_the_querys_frame_where_it_is_sure_and_else_the_last_one():
  answers = Answers()
  found = _follow(answers, "anchor", sure=0.5)
  # Confidence 1 and 1/2 from the query's frame; from frame 3 on the chain goes on from frame 2.
  assert [asked[0] for asked in answers.asked] == [(0, 1), (1, 2), (2, 3), (3, 4)]
  assert [asked[2] for asked in answers.asked] == [(0, 1), (0, 2), (0, 3), (0, 4)]
  extra = found.xy[0, :, 0] - 10 - 2 * np.arange(5)
  np.testing.assert_array_equal(extra, [0, 1, 1, 2, 3])
  np.testing.assert_array_equal(found.confidence[0], [1, 1, 0.5, 1, 1])


@pytest.mark.parametrize("mode", tracking.MODES)
def test_what_leaves_the_frame_is_asked_again_from_its_border(mode):
  answers = Answers()
  frames = ((t, SIZE_HW) for t in range(3))
  points = np.array([[59.0, 20.0]], np.float32)
  columns = list(tracking.follow(frames, np.array([0]), points, mode=mode, ask=answers, sure=1.0))
  assert columns[1].xy[0, 0] == 62
  assert columns[2].xy[0, 0] == {"query": 64, "chain": 63, "anchor": 63}[mode]


@pytest.mark.parametrize("mode", tracking.MODES)
def test_only_frames_that_are_compared_with_are_held(mode):
  class Frame(int):
    alive = 0

    def __new__(cls, value):
      cls.alive += 1
      return super().__new__(cls, value)

    def __del__(self):
      type(self).alive -= 1

  most = 0
  frames = ((Frame(t), SIZE_HW) for t in range(50))
  answers = Answers()
  for _ in tracking.follow(frames, np.array([0, 3]), POINTS_XY, mode=mode, ask=answers):
    answers.asked.clear()
    most = max(most, Frame.alive)
  assert 1 <= most <= 4


@pytest.mark.parametrize(
  "named, sentence",
  [
    ({"mode": "chains"}, "the mode is 'chains'; choose one of query, chain, anchor"),
    ({"mode": "anchor", "sure": 2.0}, "lies between 0 and 1"),
    ({"mode": "chain", "count": 0}, "no frames"),
    ({"mode": "chain", "start": (0, 7)}, "names frame 7, but the video has 5 frames"),
  ],
)
def test_what_cannot_be_followed_is_one_sentence(named, sentence):
  with pytest.raises(InputError, match=sentence):
    _follow(Answers(), **named)


@pytest.mark.parametrize("points", [np.zeros(3), np.zeros((2, 3)), np.zeros(()), np.zeros((4, 1))])
def test_points_that_are_no_pairs_of_coordinates_are_told_before_where_they_lie(points):
  with pytest.raises(
    InputError, match=re.escape(f"points are (x, y), [2] or [points, 2], not {[*points.shape]}")
  ):
    tracking.check_inside(points, SIZE_HW)


def test_a_point_outside_is_named_and_one_on_the_edge_is_none():
  tracking.check_inside(np.array([[0.0, 0.0], [60.0, 40.0]]), SIZE_HW)
  tracking.check_inside(np.zeros((0, 2)), SIZE_HW)
  for points in (np.array([60.5, 3.0]), np.array([[1.0, 2.0], [60.5, 3.0]])):
    with pytest.raises(InputError, match=r"\(x=60.5, y=3\) lies outside the 60 x 40 frames"):
      tracking.check_inside(points, SIZE_HW)
