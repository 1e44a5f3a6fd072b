"""`cwm-jax dense`: one whole flow file a pair, and a video of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import command_line
import numpy as np
import pytest

from cwm_jax import commands, inputs, tracking, viz
from cwm_jax.data import flowfiles, video
from cwm_jax.types import InputError


@pytest.mark.parametrize("form, gap", [("flo", 2), ("png", 1)])
def test_every_pair_becomes_a_field_that_is_the_trackers(
  capsys, tmp_path, clip_path, weights_path, form, gap
):
  from cwm_jax.tracker import Tracker

  argv = ["dense", clip_path, "--weights", weights_path, "--masks", 1, "--stride", 8, "--json"]
  code, out, err = command_line.run(
    capsys, *argv, "--gap", gap, "--format", form, "--out", tmp_path / "o"
  )
  assert (code, err) == (0, "")
  facts = json.loads(out)
  paths = sorted((tmp_path / "o").glob(f"*.{form}"))
  assert facts["fields"] == len(paths) == 6 - gap and str(paths[0]) in facts["files"]
  assert not list((tmp_path / "o").glob("*.partial"))
  read = {"flo": flowfiles.read_flo, "png": flowfiles.read_kitti}[form]
  frames = list(video.iter_frames(clip_path))
  tracker = Tracker.load(weights_path, num_masks=1, readout="window")
  coarse, at = tracker.dense_flow(frames[1], frames[1 + gap], stride=8)
  flow_xy, valid = read(paths[1])
  assert valid.all()
  tolerance = {"flo": 1e-5, "png": 1 / 64}[form]
  np.testing.assert_allclose(flow_xy, viz.spread(coarse, at, (40, 56)), atol=tolerance)
  assert len(list(video.iter_frames(tmp_path / "o" / "flow.mp4"))) == len(paths)


def test_the_video_of_flow_keeps_the_times_of_uneven_frames(capsys, tmp_path, weights_path):
  times_s = [0.0, 0.1, 0.5, 0.6]
  clip = viz.write_mp4(tmp_path / "v.mp4", command_line.frames(4), fps=10, times_s=times_s)
  argv = ["dense", clip, "--weights", weights_path, "--masks", 1, "--stride", 8]
  code, _, err = command_line.run(capsys, *argv, "--out", tmp_path / "o")
  assert (code, err) == (0, "")
  found = [time_s for time_s, _ in inputs.open_clip(str(tmp_path / "o" / "flow.mp4")).timed()]
  np.testing.assert_allclose(found, times_s[:3], atol=1e-3)


@pytest.fixture
def still(monkeypatch):
  """A tracker to which nothing moves, so that no network need be asked."""

  def dense_flow(first, second, *, stride, marks):
    tracker.marks = marks
    points_xy = tracking.grid(first.shape[:2], stride)
    return np.zeros_like(points_xy), points_xy

  tracker = SimpleNamespace(dense_flow=dense_flow)
  monkeypatch.setattr(commands, "load_tracker", lambda *_, **__: tracker)
  return tracker


def test_a_second_run_leaves_no_fields_or_video_of_the_first_and_nothing_else_is_touched(
  capsys, tmp_path, clip_path, still
):
  out = tmp_path / "o"
  argv = ["dense", clip_path, "--out", out]
  assert command_line.run(capsys, *argv)[0] == 0
  viz.write_png(out / "000007.png", command_line.frames(1)[0])
  (out / "truth.flo").write_bytes(b"mine")
  code, _, err = command_line.run(capsys, *argv, "--gap", 4, "--format", "png", "--no-overlay")
  assert (code, err) == (0, "")
  mine = {"000007.png", "truth.flo", "dense.json"}
  assert {path.name for path in out.iterdir()} == {"000000.png", "000001.png"} | mine
  # A run that comes to nothing leaves what was there.
  assert command_line.run(capsys, *argv, "--gap", 9)[0] == 2
  assert {path.name for path in out.iterdir()} == {"000000.png", "000001.png"} | mine
  assert command_line.run(capsys, *argv, "--gap", 5)[0] == 0
  assert {path.name for path in out.iterdir()} == {"000000.flo", "flow.mp4"} | mine
  # Without the note they may be anybody's.
  (out / "dense.json").unlink()
  code, _, err = command_line.run(capsys, *argv)
  assert code == 2 and "fields that this command did not write, as 000000.flo" in err
  assert {path.name for path in out.iterdir()} == {"000000.flo", "flow.mp4"} | mine - {"dense.json"}


def test_fields_are_not_written_over_the_frames(capsys, tmp_path, still):
  for i, frame in enumerate(command_line.frames(3)):
    viz.write_png(tmp_path / f"{i:06d}.png", frame)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  argv = ["dense", tmp_path, "--out", tmp_path]
  code, _, err = command_line.run(capsys, *argv, "--format", "png")
  assert code == 2 and "holds the frames" in err
  assert command_line.run(capsys, *argv)[0] == 0
  assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
  assert len(list(tmp_path.glob("*.flo"))) == 2


def test_a_video_of_flow_that_cannot_be_written_leaves_the_fields_and_says_so(
  capsys, tmp_path, clip_path, still, monkeypatch
):
  def refuse(*_, **__):
    raise InputError("cannot write flow.mp4: too wide")

  monkeypatch.setattr(viz, "write_mp4", refuse)
  code, _, err = command_line.run(capsys, "dense", clip_path, "--out", tmp_path)
  assert code == 2 and len(list(tmp_path.glob("*.flo"))) == 5
  assert f"too wide; the first 5 fields are in {tmp_path}" in err


def test_a_fine_grid_is_asked_with_many_marks_and_so_as_told(
  capsys, tmp_path, clip_path, weights_path
):
  fields = {}
  argv = ["dense", clip_path, "--weights", weights_path, "--masks", 2, "--stride", 4, "--gap", 5]
  for name, told in (("unsaid", []), ("many", ["--marks", 16]), ("one", ["--marks", 1])):
    code, _, err = command_line.run(capsys, *argv, *told, "--out", tmp_path / name)
    assert (code, err) == (0, "")
    fields[name] = flowfiles.read_flo(tmp_path / name / "000000.flo")[0]
  np.testing.assert_array_equal(fields["unsaid"], fields["many"])
  assert np.abs(fields["many"] - fields["one"]).max() > 0


@pytest.mark.parametrize("masks, marks", [("3", 16), ("adaptive", 1)])
def test_points_that_choose_their_masks_are_asked_one_by_one(
  capsys, tmp_path, clip_path, still, masks, marks
):
  argv = ["dense", clip_path, "--stride", 4, "--masks", masks, "--no-overlay", "--out", tmp_path]
  code, _, err = command_line.run(capsys, *argv)
  assert (code, err, still.marks) == (0, "", marks)


def test_a_video_shorter_than_the_gap_is_one_sentence(capsys, tmp_path, clip_path, weights_path):
  argv = ["dense", clip_path, "--weights", weights_path, "--gap", 6, "--out", tmp_path / "o"]
  code, out, err = command_line.run(capsys, *argv)
  assert code == 2 and out == "" and "has no two frames that are 6 apart" in err


def test_frames_that_cannot_be_read_leave_the_fields_before_them(
  capsys, tmp_path, frame_paths, weights_path
):
  folder = tmp_path / "frames"
  folder.mkdir()
  for path in frame_paths[:4]:
    (folder / path.name).write_bytes(path.read_bytes())
  (folder / "3.png").write_bytes(b"broken")
  argv = ["dense", folder, "--weights", weights_path, "--masks", 1, "--out", tmp_path / "o"]
  code, _, err = command_line.run(capsys, *argv)
  assert code == 2 and "3.png is not an image" in err and "the first 2 fields are in" in err
  assert len(list((tmp_path / "o").glob("*.flo"))) == 2


def test_a_vector_that_kittis_format_cannot_hold_is_not_valid_there(
  capsys, tmp_path, clip_path, weights_path, monkeypatch
):
  def far(self, first, second, stride, *, marks):
    flow_xy, points_xy = np.zeros((2, 5, 7, 2), np.float32)
    flow_xy[2, 3, 0] = 600
    return flow_xy, points_xy + (np.indices((5, 7))[::-1].transpose(1, 2, 0) * 8 + 4)

  monkeypatch.setattr("cwm_jax.tracker.Tracker.dense_flow", far)
  argv = ["dense", clip_path, "--weights", weights_path, "--format", "png", "--no-overlay"]
  code, _, err = command_line.run(capsys, *argv, "--gap", 5, "--out", tmp_path)
  assert (code, err) == (0, "")
  flow_xy, valid = flowfiles.read_kitti(tmp_path / "000000.png")
  assert valid[0, 0] and 0 < (~valid).sum() < 64
  assert np.abs(flow_xy[valid]).max() < 512
