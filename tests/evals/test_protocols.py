"""What the named conventions change in the numbers of one and the same tracker."""

from __future__ import annotations

import numpy as np
import pytest

from cwm_jax.data.tapvid import TapVidClip
from cwm_jax.evals import protocols, tapvid_answers, tapvid_metrics
from cwm_jax.types import InputError, PointFlow, Tracks

SIZE = 64  # a pixel of the clip is 4 on the raster


def _clip():
  """Three points over four frames that move right by 4 px a frame; one is hidden for a while."""
  start = np.array([[10.25, 20.75], [5.0, 40.0], [30.5, 8.5]], np.float32)
  points = start[:, None] + np.arange(4, dtype=np.float32)[:, None] * np.float32([4, 0])
  occluded = np.zeros((3, 4), bool)
  occluded[1, [0, 2]] = True
  return TapVidClip("clip", np.zeros((4, SIZE, SIZE, 3), np.uint8), points, occluded)


class _Knowing:
  """Knows the motion; off by `error` px in y, and by `own` where asked about the query's frame."""

  def __init__(self, error=0.0, own=0.0):
    self.error, self.own, self.asked = error, own, []

  def track(self, video, queries, *, mode="query"):
    queries, t = np.asarray(queries), np.arange(len(video))
    # Frames are told apart by nothing but their order, and backwards things move left.
    self.asked.append(queries)
    pace = -4.0 if len(self.asked) > 1 else 4.0
    later = t[None] - queries[:, :1]
    xy = queries[:, None, :0:-1] + later[..., None] * [pace, 0.0] + [0.0, self.error]
    return Tracks(xy, later >= 0, (later >= 0) * 1.0)

  def flow(self, frame1, frame2, points):
    self.asked.append(points)
    ones = np.ones(len(points))
    move = [0.0, self.own] if np.shares_memory(frame1, frame2) else [8.0, self.error]
    return PointFlow(points + move, ones.astype(bool), ones)


def _numbers(name, tracker, **settings):
  protocol = protocols.find(name)
  answers = tapvid_answers.ask(tracker, _clip(), protocol, **settings)
  return tapvid_metrics.summarise(
    tapvid_answers.compare(answers, protocol),
    distance_at_query=protocol.query_frame != "out",
    nan_spreads=protocol.nan_spreads,
  )


@pytest.mark.parametrize("name", ["first", "strided", "cfg"])
def test_a_perfect_tracker_is_perfect_forwards_and_backwards(name):
  tracker = _Knowing()
  got = _numbers(name, tracker, frame_gap=2, query_stride=1)
  assert got["average_distance"] == pytest.approx(0, abs=1e-4)
  assert got["delta_avg"] == 1.0
  if name == "strided":
    # Queries at frame t of the clip are asked at frame 3 - t of the clip played backwards.
    forwards, backwards = tracker.asked
    np.testing.assert_array_equal(backwards[:, 0], 3 - forwards[:, 0])
    # Every visible (point, frame) asks about each other frame in which the point is visible.
    assert got["num_visible"] == 2 * (4 * 3) + 2 * 1


def test_the_query_s_own_frame_counts_as_each_table_has_it():
  tracker = _Knowing(error=1.0, own=3.0)  # 4 and 12 px on the raster
  assert _numbers("first", tracker)["average_distance"] == pytest.approx(4.0, abs=1e-4)
  asked = _numbers("doduo_first", _Knowing(error=1.0, own=3.0))
  # Seven later frames in which a point is visible, and three queries.
  assert asked["average_distance"] == pytest.approx((7 * 4 + 3 * 12) / 10, abs=1e-4)
  pairs = _numbers("cfg", _Knowing(1.0), frame_gap=2)
  given = _numbers("release_cfg", _Knowing(1.0), frame_gap=2)
  assert pairs["average_distance"] == pytest.approx(4.0, abs=1e-4)
  # Each pair adds a distance of 0 for its own frame: half of all.
  assert given["average_distance"] < 0.62 * pairs["average_distance"]


def test_bare_indices_lose_the_fraction_of_the_query_and_the_half_pixel():
  tracker = _Knowing()
  got = _numbers("release_first", tracker)
  np.testing.assert_array_equal(tracker.asked[0] % 1, [[0, 0.5, 0.5]] * 3)
  # (10.25, 20.75) is reported as (10, 20), (5, 40) as itself, (30.5, 8.5) as (30, 8).
  off = [np.hypot(0.25, 0.75)] * 4 + [0.0] * 2 + [np.hypot(0.5, 0.5)] * 4
  assert got["average_distance"] == pytest.approx(4 * np.mean(off), rel=1e-5)


def test_true_occlusion_stands_in_for_the_predicted_one_where_a_table_has_it_so():
  assert _numbers("first", _Knowing())["occlusion_accuracy"] == pytest.approx(7 / 8)
  got = _numbers("doduo_first", _Knowing())
  assert got["occlusion_accuracy"] == got["average_jaccard"] == 1.0


def test_f1_without_a_hit_is_nan_only_where_the_release_has_it_so():
  # Frame 2 of point 1 is hidden, and the tracker says that it is not.
  assert _numbers("first", _Knowing())["occlusion_f1"] == 0.0
  assert np.isnan(_numbers("release_first", _Knowing())["occlusion_f1"])


def test_a_video_without_a_number_is_left_out_or_spreads():
  videos = [{"average_distance": 2.0}, {"average_distance": float("nan")}]
  for video in videos:
    video |= {f"occlusion_{kind}": 1.0 for kind in ("tp", "fp", "fn")}
  assert tapvid_metrics.mean_over_videos(videos)["average_distance"] == 2.0
  spread = tapvid_metrics.mean_over_videos(videos, nan_spreads=True)
  assert np.isnan(spread["average_distance"]) and spread["occlusion_f1"] == 0.5


def test_errors_are_grouped_by_their_distance_from_the_query():
  protocol = protocols.find("first")
  answers = tapvid_answers.compare(tapvid_answers.ask(_Knowing(1.0), _clip(), protocol), protocol)
  got = tapvid_metrics.by_gap(answers, bins=3)
  assert got["gap"].tolist() == [1, 2, 3]
  np.testing.assert_allclose(got["average_distance"], 4.0, atol=1e-5)
  # Point 1 begins in frame 1, is hidden in frame 2 and seen in frame 3.
  assert got["num_visible"].tolist() == [2, 3, 2]
  assert tapvid_metrics.by_gap(answers, bins=2)["gap"].tolist() == [1.5, 3.5]


def test_every_protocol_says_which_table_it_is_for_and_titles_carry_their_number():
  for protocol in protocols.PROTOCOLS.values():
    assert protocol.about and protocol.queries in protocols.QUERIES
    assert protocol.query_frame in protocols.QUERY_FRAMES
  titles = [protocols.title(n, frame_gap=7, query_stride=3) for n in ("first", "cfg", "strided")]
  assert titles == ["first", "cfg-7", "strided-3"]
  with pytest.raises(InputError, match="release_first"):
    protocols.find("last")
