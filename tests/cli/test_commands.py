"""What each command writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import command_line
import numpy as np

from cwm_jax import inputs
from cwm_jax.data import flowfiles, images, video
from cwm_jax.pretrained import weights


def test_track_writes_tracks_that_the_tracker_gives_and_a_video_of_them(
  capsys, tmp_path, clip_path, weights_path
):
  from cwm_jax.tracker import Tracker

  argv = ["track", clip_path, "--grid", 3, "--weights", weights_path, "--masks", 2]
  code, out, err = command_line.run(capsys, *argv, "--out", tmp_path / "o")
  assert (code, err) == (0, "")
  assert "9 points through 6 frames" in out and str(tmp_path / "o" / "tracks.npz") in out
  saved = np.load(tmp_path / "o" / "tracks.npz")
  names = {"tracks_xy", "occluded", "confidence", "queries_tyx", "size_hw", "times_s"}
  assert set(saved) == names
  np.testing.assert_allclose(saved["times_s"], np.arange(6) / 10, atol=1e-4)
  np.testing.assert_array_equal(saved["size_hw"], [40, 56])
  assert saved["queries_tyx"].shape == (9, 3) and (saved["queries_tyx"][:, 0] == 0).all()
  np.testing.assert_allclose(saved["queries_tyx"][1], [0, 40 / 6, 28], rtol=1e-6)
  frames = np.stack(list(video.iter_frames(clip_path)))
  tracks = Tracker.load(weights_path, num_masks=2, readout="window").track(
    frames, saved["queries_tyx"]
  )
  np.testing.assert_array_equal(saved["tracks_xy"], tracks.xy)
  np.testing.assert_array_equal(saved["occluded"], ~tracks.visible)
  np.testing.assert_array_equal(saved["confidence"], tracks.confidence)
  overlay = video.probe(tmp_path / "o" / "overlay.mp4")
  assert (overlay.height, overlay.width) == (80, 112)
  assert len(list(video.iter_frames(tmp_path / "o" / "overlay.mp4"))) == 6


def test_track_follows_points_of_a_file_through_a_folder_of_frames(
  capsys, tmp_path, frame_paths, weights_path
):
  points = tmp_path / "points.csv"
  points.write_text("\ufefft,y,x\n0,10.5,20.25\n3,30,40\n")
  folder = frame_paths[0].parent
  argv = ["track", folder, "--points", points, "--weights", weights_path, "--masks", 1]
  code, out, _ = command_line.run(capsys, *argv, "--no-overlay", "--json", "--out", tmp_path)
  facts = json.loads(out)
  assert code == 0 and (facts["points"], facts["frames"]) == (2, 6)
  assert facts["files"] == [str(tmp_path / "tracks.npz")]
  saved = np.load(tmp_path / "tracks.npz")
  np.testing.assert_array_equal(saved["queries_tyx"], [[0, 10.5, 20.25], [3, 30, 40]])
  np.testing.assert_array_equal(saved["occluded"][1, :3], [True] * 3)
  np.testing.assert_array_equal(saved["tracks_xy"][1, 3], [40, 30])
  assert not (tmp_path / "overlay.mp4").exists()


def test_programs_are_kept_for_the_next_command_in_the_cache_folder(
  tmp_path, weights_path, frame_paths
):
  hidden = {"JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"}
  environment = {name: value for name, value in os.environ.items() if name not in hidden}
  # A quick machine compiles these small programs in less than the time from which they are kept.
  environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
  argv = ["flow", *frame_paths[:2], "--stride", "20", "--masks", "1", "--weights", weights_path]
  subprocess.run(
    [sys.executable, "-m", "cwm_jax.cli", *argv, "--out", tmp_path / "o"],
    check=True,
    stdout=subprocess.DEVNULL,
    env=environment | {"CWM_JAX_CACHE": str(tmp_path / "cache")},
  )
  (kind,) = (tmp_path / "cache" / "programs").iterdir()
  assert len(list(kind.iterdir())) >= 1


def test_flow_writes_a_flo_file_of_the_images_size_and_a_picture(
  capsys, tmp_path, frame_paths, weights_path
):
  from cwm_jax.tracker import Tracker

  argv = ["flow", frame_paths[0], frame_paths[2], "--weights", weights_path, "--masks", 2]
  code, out, _ = command_line.run(capsys, *argv, "--stride", 8, "--out", tmp_path, "--json")
  assert code == 0 and json.loads(out)["read_outs"] == 35
  flow_xy, valid = flowfiles.read_flo(tmp_path / "flow.flo")
  assert flow_xy.shape == (40, 56, 2) and valid.all()
  first, second = (images.read_image(frame_paths[i]) for i in (0, 2))
  tracker = Tracker.load(weights_path, num_masks=2, readout="window")
  coarse, at = tracker.dense_flow(first, second, stride=8)  # few points: one mark a pass
  # A read-out lies between pixels 3 and 4 of its cell, so it is the mean of the four round it.
  four = flow_xy[3:5, 3:5].mean((0, 1))
  np.testing.assert_array_equal(at[0, 0], [4, 4])
  np.testing.assert_allclose(
    four,
    coarse[0, 0]
    + (coarse[1, 0] - coarse[0, 0]) / 32
    + (coarse[0, 1] - coarse[0, 0]) / 32
    + (coarse[1, 1] - coarse[1, 0] - coarse[0, 1] + coarse[0, 0]) / 1024,
    rtol=1e-4,
    atol=1e-4,
  )
  assert images.read_image(tmp_path / "flow.png").shape[1] > 3 * 420


def test_flow_writes_kitti_s_format_too(capsys, tmp_path, frame_paths, weights_path):
  argv = ["flow", *frame_paths[:2], "--weights", weights_path, "--masks", 1, "--stride", 8]
  assert command_line.run(capsys, *argv, "--out", tmp_path)[0] == 0
  code, out, _ = command_line.run(capsys, *argv, "--format", "png", "--out", tmp_path, "--json")
  kept = tmp_path / "flow-kitti.png"
  assert code == 0 and json.loads(out)["files"] == [str(kept), str(tmp_path / "flow.png")]
  flow_xy, valid = flowfiles.read_kitti(kept)
  assert valid.all()
  np.testing.assert_allclose(flow_xy, flowfiles.read_flo(tmp_path / "flow.flo")[0], atol=1 / 64)


def test_flow_at_given_points_writes_where_they_went(capsys, tmp_path, frame_paths, weights_path):
  points = tmp_path / "points.csv"
  points.write_text("x,y\n20.5,10\n40,30\n")
  argv = ["flow", *frame_paths[:2], "--points", points, "--weights", weights_path]
  code, out, _ = command_line.run(capsys, *argv, "--masks", 1, "--out", tmp_path)
  saved = np.load(tmp_path / "points.npz")
  assert code == 0 and "2 points" in out and (tmp_path / "points.png").exists()
  np.testing.assert_array_equal(saved["from_xy"], [[20.5, 10], [40, 30]])
  assert saved["to_xy"].shape == (2, 2) and saved["occluded"].dtype == bool


def test_info_tells_names_shapes_config_and_card(capsys, weights_path):
  code, out, _ = command_line.run(capsys, "info", weights_path)
  count = sum(
    v.size
    for v in weights.flatten(command_line.random_params({"model": command_line.MODEL})).values()
  )
  assert code == 0 and f"{count:,} parameters" in out
  assert "mask_token" in out and "image_hw         [32, 32]" in out and "median: 1.25" in out
  facts = json.loads(command_line.run(capsys, "info", weights_path, "--json")[1])
  assert facts["parameters"] == count and facts["dtypes"] == {"F32": len(facts["tensors"])}
  assert facts["config"] == {"model": command_line.MODEL} and facts["tensors"]["mask_token"] == [
    "F32",
    [16],
  ]


def test_info_lists_all_weights_that_have_a_name(capsys):
  code, out, err = command_line.run(capsys, "info", "--list")
  assert (code, err) == (0, "")
  told = {line.split()[0] for line in out.partition("\n\n")[0].splitlines()}
  assert {"predictor-tiny", "student-tiny", "opt-cwm-512"} <= told
  assert set(json.loads(command_line.run(capsys, "info", "--list", "--json")[1])["names"]) == told


def _workdir(tmp_path, params, config):
  """A training run's folder with one checkpoint, as the loop leaves it."""
  import grain

  from cwm_jax import checkpoint
  from cwm_jax.types import TrainState

  iterator = iter(grain.MapDataset.range(8).to_iter_dataset())
  kept = checkpoint.Checkpoints(tmp_path / "run")
  checkpoint.keep_config(tmp_path / "run", config)
  kept.save(5, TrainState(np.array(5), params, {"count": np.array(5)}, None), iterator)
  kept.close()
  return tmp_path / "run"


def test_convert_turns_a_checkpoint_into_a_weights_file_that_tracks(capsys, tmp_path):
  config = {"model": command_line.MODEL, "task": "pretrain"}
  workdir = _workdir(tmp_path, command_line.random_params(config), config)
  target = tmp_path / "out.safetensors"
  code, out, err = command_line.run(capsys, "convert", workdir, target, "--dtype", "bfloat16")
  assert (code, err) == (0, "") and str(target) in out
  _, params, loaded = weights.load_model(target)
  assert loaded == config
  want = weights.flatten(command_line.random_params(config))
  for name, value in weights.flatten(params).items():
    np.testing.assert_allclose(value, want[name], rtol=2**-8)


def test_a_run_with_attention_that_this_machine_lacks_is_converted_for_any(capsys, tmp_path):
  model = dict(command_line.MODEL, attention_impl="cudnn")
  config = {"model": model, "task": "pretrain"}
  params = command_line.random_params({"model": command_line.MODEL})
  workdir = _workdir(tmp_path, params, config)
  code, _, err = command_line.run(capsys, "convert", workdir, tmp_path / "out.safetensors")
  assert (code, err) == (0, "")
  assert weights.read_header(tmp_path / "out.safetensors").config["model"]["attention_impl"] == ""


def test_grid_points_are_the_centres_of_equal_cells():
  points = inputs.grid_points_xy(2, (40, 80))
  np.testing.assert_array_equal(points, [[20, 10], [60, 10], [20, 30], [60, 30]])
