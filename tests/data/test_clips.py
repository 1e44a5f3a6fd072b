"""Clips cut from videos at even times."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cwm_jax.data import clips
from cwm_jax.types import InputError

HOW = clips.Cut(seconds=0.4, fps=10.0, short_side=24, quality=95, limit=0)


def numbers(movies, clip):
  return [movies.number_of(np.asarray(Image.open(io.BytesIO(data)))) for data in clip.frames]


def test_clips_follow_each_other_at_even_times_whatever_the_video_s_rate(tmp_path, movies):
  # 30 frames a second: every third frame; 1.0 s hold two whole clips.
  found = list(clips.cut(str(movies.write_video(tmp_path / "a.mp4", 30)), HOW))
  assert [clip.start_s for clip in found] == [0.0, 0.4]
  assert [numbers(movies, clip) for clip in found] == [[0, 3, 6, 9], [12, 15, 18, 21]]
  assert all(clip.size_hw == (24, 32) for clip in found)
  # Frames at times of their own: what is on display counts.
  times = [0, 90, 190, 230, 300, 390, 480, 600, 700, 800]
  path = movies.write_video(tmp_path / "b.mkv", len(times), times_ms=times)
  assert numbers(movies, next(clips.cut(str(path), HOW))) == [0, 1, 2, 4]


def test_few_clips_are_spread_over_the_video(tmp_path, movies):
  path = str(movies.write_video(tmp_path / "a.mp4", 30))
  found = list(clips.cut(path, HOW._replace(limit=2, seconds=0.3)))
  assert [clip.start_s for clip in found] == pytest.approx([0.0, 0.7])
  assert [numbers(movies, clip) for clip in found] == [[0, 3, 6], [21, 24, 27]]


@pytest.mark.parametrize(
  "frames, rate, told",
  [(9, 30, "lasts 0.30 s, a clip 0.4 s"), (30, 5, "fewer than 10 frames a second")],
)
def test_a_video_that_gives_no_clip_says_why(tmp_path, movies, frames, rate, told):
  path = movies.write_video(tmp_path / "a.mp4", frames, rate=rate)
  with pytest.raises(InputError, match=told):
    list(clips.cut(str(path), HOW))


def test_small_videos_keep_their_size(tmp_path, movies):
  path = str(movies.write_video(tmp_path / "a.mp4", 30))
  assert next(clips.cut(path, HOW._replace(short_side=500))).size_hw == (48, 64)
