"""`cwm-jax dense`: one whole flow file a pair, and a video of them."""

from __future__ import annotations

import json

import command_line
import numpy as np
import pytest

from cwm_jax import inputs, viz
from cwm_jax.data import flowfiles, video


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
