"""The demo: table, pictures, files."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import command_line
import numpy as np
import pytest

from cwm_jax import commands, demo, inputs, viz
from cwm_jax.data import procedural, video
from cwm_jax.types import Tracks


def test_the_demo_renders_tracks_measures_and_draws(capsys, tmp_path, weights_path):
  code, out, err = command_line.run(
    capsys, "demo", "--weights", weights_path, "--masks", 2, "--out", tmp_path
  )
  assert (code, err) == (0, "")
  assert [line.split("  ")[0] for line in out.splitlines()[3:6]] == [
    "best mark, MM-2",
    "red square, MM-1",
    "zero motion",
  ]
  for name in ("overlay.mp4", "flow.png", "heatmaps.png", "explanation.png", "tracks.npz"):
    assert str(tmp_path / name) in out and (tmp_path / name).stat().st_size > 1000
  assert len(list(video.iter_frames(tmp_path / "overlay.mp4"))) == 24
  assert np.load(tmp_path / "tracks.npz")["tracks_xy"].shape == (16, 24, 2)


def test_the_demo_of_a_flow_network_shows_its_tracks_and_flow(capsys, tmp_path, clip_path):
  argv = ["demo", clip_path, "--weights", "student-tiny", "--out", tmp_path, "--json"]
  code, out, err = command_line.run(capsys, *argv)
  assert (code, err) == (0, "")
  facts = json.loads(out)
  assert [row["name"] for row in facts["table"]] == ["flow network", "zero motion"]
  names = {"tracks.npz", "overlay.mp4", "flow.png"}
  assert {path.name for path in tmp_path.iterdir()} == names
  assert facts["files"] and {path.rpartition("/")[2] for path in facts["files"]} == names


def test_the_demo_on_a_long_video_takes_24_frames_says_so_and_claims_no_truth(
  capsys, tmp_path, weights_path
):
  path = viz.write_mp4(tmp_path / "long.mp4", command_line.frames(count=31), fps=10)
  argv = ["demo", path, "--weights", weights_path, "--masks", 1, "--out", tmp_path, "--json"]
  code, out, _ = command_line.run(capsys, *argv)
  facts = json.loads(out)
  assert code == 0 and facts["clip"] == "long.mp4 (24 of its 31 frames, evenly spread)"
  assert all(set(row) == {"name", "seconds"} for row in facts["table"])
  saved = np.load(tmp_path / "tracks.npz")
  assert saved["tracks_xy"].shape == (16, 24, 2)
  # Which of the 31 frames those are, and when they are shown.
  np.testing.assert_array_equal(saved["frame_indices"], np.linspace(0, 30, 24).round())
  np.testing.assert_allclose(saved["times_s"], saved["frame_indices"] / 10, atol=1e-3)


def test_the_demos_tracks_are_there_before_anything_else_is_asked_or_drawn(
  capsys, tmp_path, clip_path, monkeypatch
):
  def track(frames, queries):
    if (tmp_path / "tracks.npz").exists():
      raise KeyboardInterrupt
    return demo._still(queries[:, :0:-1], len(frames))

  monkeypatch.setattr(commands, "load_tracker", lambda *_, **__: SimpleNamespace(track=track))
  code, _, _ = command_line.run(capsys, "demo", clip_path, "--out", tmp_path)
  assert code == 130 and np.load(tmp_path / "tracks.npz")["tracks_xy"].shape == (16, 6, 2)


def test_a_clip_whose_name_is_no_text_can_be_named(tmp_path):
  odd = os.fsdecode(b"a\xff")
  film = viz.write_mp4(tmp_path / f"{odd}.mp4", command_line.frames(2), fps=10)
  (tmp_path / odd).mkdir()
  viz.write_png(tmp_path / odd / "0.png", command_line.frames(1)[0])
  names = [inputs.open_clip(str(path)).name for path in (film, tmp_path / odd)]
  assert names == ["a\\udcff.mp4", "a\\udcff"]


def test_the_demos_errors_are_those_of_visible_points_at_256():
  xy = np.zeros((2, 3, 2), np.float32)
  visible = np.array([[True, True, True], [True, False, True]])
  truth = Tracks(xy, visible, visible.astype(np.float32))
  guess = xy.copy()
  guess[0, 1] = (1.5, 0)  # 3 px at 256 in a video of 128
  guess[1, 1] = (50, 50)  # hidden: not counted
  row = demo._Row("guess", Tracks(guess, visible, np.ones((2, 3))), 0.5)
  line = demo._measured(row, truth, (128, 128))
  assert line["average_distance"] == 1.0 and line["median_distance"] == 0.0
  # Of three errors (3, 0, 0), 2/3 lie below 1 and 2 px, all below 4, 8 and 16.
  assert line["delta_avg"] == pytest.approx((2 * 2 / 3 + 3) / 5, abs=1e-4)


def test_the_demos_scene_is_the_first_one_without_a_texture_that_repeats_itself():
  def repeats(seed):
    scene = procedural.draw_scene(seed, procedural.PRESETS["demo"])
    layers = 1 + np.count_nonzero(scene["shape"][:, 0])
    stripes, checkers, text = scene["texture"][:layers, [4, 7, 8]].T
    return (stripes + checkers + text).any()

  assert next(seed for seed in range(100) if not repeats(seed)) == demo._SCENE
