"""What each protocol asks about a clip, and the size it is asked at."""

from __future__ import annotations

import numpy as np
import pytest

from cwm_jax.data import tapvid, tapvid_queries
from cwm_jax.types import InputError

OCCLUDED = np.array([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)


def _clip(occluded=OCCLUDED, size_hw=(4, 4)):
  count, frames = occluded.shape
  points = np.arange(count * frames * 2, dtype=np.float32).reshape(count, frames, 2) / 8
  video = np.random.default_rng(0).integers(0, 256, (frames, *size_hw, 3), dtype=np.uint8)
  return tapvid.TapVidClip("clip", video, points, occluded)


def test_first_asks_from_the_first_visible_frame_and_leaves_out_what_is_never_visible():
  asked = tapvid_queries.queries_first(_clip())
  assert (asked.point.tolist(), asked.start.tolist()) == ([0, 2], [1, 0])
  assert asked.frames.tolist() == [[0, 1, 2, 3]] * 2


def test_strided_asks_from_every_other_frame_in_which_a_point_is_visible():
  occluded = np.concatenate([OCCLUDED, ~OCCLUDED[:1]])
  asked = tapvid_queries.queries_strided(_clip(occluded), stride=2)
  assert list(zip(asked.point.tolist(), asked.start.tolist())) == [(2, 0), (3, 0), (2, 2), (3, 2)]
  assert asked.frames.shape == (4, 4)
  with pytest.raises(InputError, match="stride of the queries is 0"):
    tapvid_queries.queries_strided(_clip(), stride=0)


def test_cfg_asks_from_every_visible_frame_about_the_one_a_gap_later():
  asked = tapvid_queries.queries_cfg(_clip(), gap=2)
  assert asked.point.tolist() == [0, 2, 2]
  assert asked.frames.tolist() == [[1, 3], [0, 2], [1, 3]]
  assert tapvid_queries.queries_cfg(_clip(), gap=4).frames.shape == (0, 2)
  with pytest.raises(InputError, match="the frame gap is 0"):
    tapvid_queries.queries_cfg(_clip(), gap=0)


def test_a_query_is_the_point_in_its_frame_or_the_centre_of_its_pixel():
  clip = _clip()
  asked = tapvid_queries.queries_first(clip)
  x, y = clip.points_xy[0, 1]
  assert tapvid_queries.queries_tyx(clip, asked)[0].tolist() == [1, y, x]
  whole = tapvid_queries.queries_tyx(clip, asked, whole_pixels=True)
  assert whole[0].tolist() == [1, np.floor(y) + 0.5, np.floor(x) + 0.5]


def test_a_query_outside_the_frame_is_moved_onto_its_border():
  clip = _clip()
  clip.points_xy[2, 0] = (-3.0, 4.25)
  asked = tapvid_queries.queries_first(clip)
  assert tapvid_queries.queries_tyx(clip, asked)[1].tolist() == [0, 4.0, 0.0]
  assert tapvid_queries.queries_tyx(clip, asked, whole_pixels=True)[1].tolist() == [0, 3.5, 0.5]


@pytest.mark.parametrize(
  "name, want", [("native", (50, 37)), ("nearest_16", (48, 32)), ("24x40", (24, 40))]
)
def test_a_resolution_is_a_size(name, want):
  assert tapvid_queries.resolution_hw(name, (50, 37)) == want


@pytest.mark.parametrize("name", ["nearest_8", "24x", "0x4", "24,40", ""])
def test_an_unknown_resolution_is_refused(name):
  with pytest.raises(InputError, match="choose native, nearest_16"):
    tapvid_queries.resolution_hw(name, (50, 37))
  with pytest.raises(InputError, match="no multiple of 16"):
    tapvid_queries.resolution_hw("nearest_16", (15, 37))


def test_points_move_with_the_frames():
  clip = _clip(size_hw=(8, 16))
  assert tapvid_queries.at_resolution(clip, "native") is clip
  seen = tapvid_queries.at_resolution(clip, "4x32")
  assert seen.video.shape == (4, 4, 32, 3) and seen.video.dtype == np.uint8
  np.testing.assert_allclose(seen.points_xy, clip.points_xy * [2.0, 0.5])
