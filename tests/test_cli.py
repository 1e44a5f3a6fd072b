"""The command line: what each command writes, and how whatever is wrong is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_model

from cwm_jax import cli, demo, inputs, viz
from cwm_jax.data import flowfiles, images, video
from cwm_jax.pretrained import weights
from cwm_jax.types import Tracks

MODEL = tiny_model.config(image_hw=[32, 32])


def _random_params(config):
  _, shapes = weights.expected_shapes(config, where="test")
  rng = np.random.default_rng(0)
  flat = {n: 0.2 * rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
  return weights.unflatten(flat)


@pytest.fixture(scope="session")
def weights_path(tmp_path_factory):
  config = {"model": MODEL}
  path = tmp_path_factory.mktemp("weights") / "random.safetensors"
  return weights.save(path, _random_params(config), config, extra={"scores": {"median": 1.25}})


def _frames(count=6, h=40, w=56):
  """A textured picture that drifts to the right."""
  wide = np.random.default_rng(1).integers(0, 256, (h // 4, w // 2, 3), np.uint8)
  wide = viz.resized(wide, (h, w * 2))
  return np.stack([wide[:, count - t : count - t + w] for t in range(count)])


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory):
  return viz.write_mp4(tmp_path_factory.mktemp("clip") / "clip.mp4", _frames(), fps=10)


@pytest.fixture(scope="session")
def frame_paths(tmp_path_factory):
  folder = tmp_path_factory.mktemp("frames")
  return [viz.write_png(folder / f"{i}.png", frame) for i, frame in enumerate(_frames())]


def _run(capsys, *argv):
  """Runs one command line; returns (exit code, stdout, stderr)."""
  code = cli.main([str(arg) for arg in argv])
  return code, *capsys.readouterr()


def test_track_writes_tracks_that_the_tracker_gives_and_a_video_of_them(
  capsys, tmp_path, clip_path, weights_path
):
  from cwm_jax.tracker import Tracker

  argv = ["track", clip_path, "--grid", 3, "--weights", weights_path, "--masks", 2]
  code, out, err = _run(capsys, *argv, "--out", tmp_path / "o")
  assert (code, err) == (0, "")
  assert "9 points through 6 frames" in out and str(tmp_path / "o" / "tracks.npz") in out
  saved = np.load(tmp_path / "o" / "tracks.npz")
  assert set(saved) == {"tracks_xy", "occluded", "confidence", "queries_tyx", "size_hw"}
  np.testing.assert_array_equal(saved["size_hw"], [40, 56])
  assert saved["queries_tyx"].shape == (9, 3) and (saved["queries_tyx"][:, 0] == 0).all()
  np.testing.assert_allclose(saved["queries_tyx"][1], [0, 40 / 6, 28], rtol=1e-6)
  frames = np.stack(list(video.iter_frames(clip_path)))
  tracks = Tracker.load(weights_path, num_masks=2).track(frames, saved["queries_tyx"])
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
  code, out, _ = _run(capsys, *argv, "--no-overlay", "--json", "--out", tmp_path)
  facts = json.loads(out)
  assert code == 0 and (facts["points"], facts["frames"]) == (2, 6)
  assert facts["files"] == [str(tmp_path / "tracks.npz")]
  saved = np.load(tmp_path / "tracks.npz")
  np.testing.assert_array_equal(saved["queries_tyx"], [[0, 10.5, 20.25], [3, 30, 40]])
  np.testing.assert_array_equal(saved["occluded"][1, :3], [True] * 3)
  np.testing.assert_array_equal(saved["tracks_xy"][1, 3], [40, 30])
  assert not (tmp_path / "overlay.mp4").exists()


def test_flow_writes_a_flo_file_of_the_images_size_and_a_picture(
  capsys, tmp_path, frame_paths, weights_path
):
  from cwm_jax.tracker import Tracker

  argv = ["flow", frame_paths[0], frame_paths[2], "--weights", weights_path, "--masks", 2]
  code, out, _ = _run(capsys, *argv, "--stride", 8, "--out", tmp_path, "--json")
  assert code == 0 and json.loads(out)["read_outs"] == 35
  flow_xy, valid = flowfiles.read_flo(tmp_path / "flow.flo")
  assert flow_xy.shape == (40, 56, 2) and valid.all()
  first, second = (images.read_image(frame_paths[i]) for i in (0, 2))
  coarse, at = Tracker.load(weights_path, num_masks=2).dense_flow(first, second, stride=8)
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


def test_flow_at_given_points_writes_where_they_went(capsys, tmp_path, frame_paths, weights_path):
  points = tmp_path / "points.csv"
  points.write_text("x,y\n20.5,10\n40,30\n")
  argv = ["flow", *frame_paths[:2], "--points", points, "--weights", weights_path]
  code, out, _ = _run(capsys, *argv, "--masks", 1, "--out", tmp_path)
  saved = np.load(tmp_path / "points.npz")
  assert code == 0 and "2 points" in out and (tmp_path / "points.png").exists()
  np.testing.assert_array_equal(saved["from_xy"], [[20.5, 10], [40, 30]])
  assert saved["to_xy"].shape == (2, 2) and saved["occluded"].dtype == bool


def test_info_tells_names_shapes_config_and_card(capsys, weights_path):
  code, out, _ = _run(capsys, "info", weights_path)
  count = sum(v.size for v in weights.flatten(_random_params({"model": MODEL})).values())
  assert code == 0 and f"{count:,} parameters" in out
  assert "mask_token" in out and "image_hw         [32, 32]" in out and "median: 1.25" in out
  facts = json.loads(_run(capsys, "info", weights_path, "--json")[1])
  assert facts["parameters"] == count and facts["dtypes"] == {"F32": len(facts["tensors"])}
  assert facts["config"] == {"model": MODEL} and facts["tensors"]["mask_token"] == ["F32", [16]]


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
  config = {"model": MODEL, "task": "pretrain"}
  workdir = _workdir(tmp_path, _random_params(config), config)
  target = tmp_path / "out.safetensors"
  code, out, err = _run(capsys, "convert", workdir, target, "--dtype", "bfloat16")
  assert (code, err) == (0, "") and str(target) in out
  _, params, loaded = weights.load_model(target)
  assert loaded == config
  want = weights.flatten(_random_params(config))
  for name, value in weights.flatten(params).items():
    np.testing.assert_allclose(value, want[name], rtol=2**-8)


def test_the_demo_renders_tracks_measures_and_draws(capsys, tmp_path, weights_path):
  code, out, err = _run(capsys, "demo", "--weights", weights_path, "--masks", 2, "--out", tmp_path)
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


def test_the_demo_on_a_long_video_takes_24_frames_says_so_and_claims_no_truth(
  capsys, tmp_path, weights_path
):
  path = viz.write_mp4(tmp_path / "long.mp4", _frames(count=31), fps=10)
  argv = ["demo", path, "--weights", weights_path, "--masks", 1, "--out", tmp_path, "--json"]
  code, out, _ = _run(capsys, *argv)
  facts = json.loads(out)
  assert code == 0 and facts["clip"] == "long.mp4 (24 of its 31 frames, evenly spread)"
  assert all(set(row) == {"name", "seconds"} for row in facts["table"])
  assert np.load(tmp_path / "tracks.npz")["tracks_xy"].shape == (16, 24, 2)


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


def test_grid_points_are_the_centres_of_equal_cells():
  points = inputs.grid_points_xy(2, (40, 80))
  np.testing.assert_array_equal(points, [[20, 10], [60, 10], [20, 30], [60, 30]])


def _write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def _changed(tmp_path, change):
  """A weights file whose parameters or config have been changed."""
  config = {"model": dict(MODEL)}
  flat = weights.flatten(_random_params(config))
  change(flat, config)
  return weights.save(tmp_path / "w.safetensors", weights.unflatten(flat), config)


def _folder(path):
  path.mkdir()
  return path


# name -> (what to run, given a folder, a clip, two images and weights; what the sentence says)
BROKEN = {
  "missing video": (lambda t, c, i, w: ["track", t / "no.mp4", "--weights", w], "does not exist"),
  "text as video": (
    lambda t, c, i, w: ["track", _write(t / "a.mp4", "hello " * 50), "--weights", w],
    "cannot be read as a video|no video stream",
  ),
  "empty video": (
    lambda t, c, i, w: ["track", _write(t / "a.mp4", ""), "--weights", w],
    "is empty",
  ),
  "video cut to its header": (
    lambda t, c, i, w: ["track", _write(t / "a.mp4", c.read_bytes()[:600]), "--weights", w],
    "cannot be read|no video stream|no frames",
  ),
  "URL": (
    lambda t, c, i, w: ["demo", "https://example.org/a.mp4", "--weights", w],
    "is a URL; download it first",
  ),
  "empty folder": (lambda t, c, i, w: ["demo", _folder(t / "d"), "--weights", w], "holds no image"),
  "folder of broken frames": (
    lambda t, c, i, w: ["track", _write(_folder(t / "d") / "0.png", "x").parent, "--weights", w],
    "0.png is not an image",
  ),
  "folder of frames of two sizes": (
    lambda t, c, i, w: [
      "track",
      viz.write_png(
        viz.write_png(_folder(t / "d") / "0.png", _frames()[0]).parent / "1.png",
        _frames(h=44)[0],
      ).parent,
      *("--weights", w, "--masks", 1),
    ],
    "size|shape",
  ),
  "video of one frame": (
    lambda t, c, i, w: ["demo", viz.write_mp4(t / "a.mp4", _frames(1), fps=5), "--weights", w],
    "has 1 frame; motion needs two",
  ),
  "points missing": (
    lambda t, c, i, w: ["track", c, "--points", t / "no.csv", "--weights", w],
    "no.csv cannot be read: No such file",
  ),
  "points that are a folder": (
    lambda t, c, i, w: ["track", c, "--points", t, "--weights", w],
    "cannot be read: Is a directory",
  ),
  "points not text": (
    lambda t, c, i, w: ["track", c, "--points", i[0], "--weights", w],
    "is not a CSV text file",
  ),
  "points empty": (
    lambda t, c, i, w: ["track", c, "--points", _write(t / "p.csv", ""), "--weights", w],
    "must begin with the header t,y,x",
  ),
  "points without header": (
    lambda t, c, i, w: ["track", c, "--points", _write(t / "p.csv", "0,1,2\n"), "--weights", w],
    "header t,y,x, not '0,1,2'",
  ),
  "points without rows": (
    lambda t, c, i, w: ["track", c, "--points", _write(t / "p.csv", "t,y,x\n"), "--weights", w],
    "holds no points",
  ),
  "a point that is a word": (
    lambda t, c, i, w: [
      *("track", c, "--weights", w),
      *("--points", _write(t / "p.csv", "t,y,x\n0,1,2\n0,left,2\n")),
    ],
    "line 3: '0,left,2' is not a point",
  ),
  "a point with a column too few": (
    lambda t, c, i, w: [
      "track",
      c,
      "--points",
      _write(t / "p.csv", "t,y,x\n0,1\n"),
      "--weights",
      w,
    ],
    "line 2: '0,1' is not a point",
  ),
  "a point outside the frame": (
    lambda t, c, i, w: [
      *("track", c, "--weights", w),
      *("--points", _write(t / "p.csv", "t,y,x\n0,40,3\n")),
    ],
    "line 2: y = 40, x = 3 lies outside the frame of 56 x 40",
  ),
  "a point that is not a number": (
    lambda t, c, i, w: [
      *("track", c, "--weights", w),
      *("--points", _write(t / "p.csv", "t,y,x\n0,nan,3\n")),
    ],
    "lies outside the frame",
  ),
  "a point between frames": (
    lambda t, c, i, w: [
      *("track", c, "--weights", w),
      *("--points", _write(t / "p.csv", "t,y,x\n0.5,1,3\n")),
    ],
    "t is 0.5, which is no frame",
  ),
  "a point after the last frame": (
    lambda t, c, i, w: [
      *("track", c, "--weights", w, "--masks", 1),
      *("--points", _write(t / "p.csv", "t,y,x\n6,1,3\n")),
    ],
    "6",
  ),
  "weights missing": (
    lambda t, c, i, w: ["track", c, "--weights", t / "no.safetensors"],
    "no.safetensors",
  ),
  "weights truncated": (
    lambda t, c, i, w: ["track", c, "--weights", _write(t / "w", w.read_bytes()[:-100])],
    "cut short",
  ),
  "weights not safetensors": (
    lambda t, c, i, w: ["flow", *i, "--weights", i[0]],
    "is not a safetensors file",
  ),
  "weights of another project": (
    lambda t, c, i, w: ["info", _foreign(t)],
    "not written by this project",
  ),
  "weights with a config that lacks a key": (
    lambda t, c, i, w: [
      *("track", c, "--weights", _changed(t, lambda flat, conf: conf["model"].pop("patch"))),
    ],
    "lacks 'patch'",
  ),
  "weights with a config of another model": (
    lambda t, c, i, w: [
      *("flow", *i),
      *("--weights", _changed(t, lambda flat, conf: conf["model"].update(encoder_width=32))),
    ],
    "of another shape",
  ),
  "weights that miss a tensor": (
    lambda t, c, i, w: [
      "demo",
      "--weights",
      _changed(t, lambda flat, conf: flat.pop("mask_token")),
    ],
    "missing: mask_token",
  ),
  "weights with a tensor too many": (
    lambda t, c, i, w: [
      *("info", _changed(t, lambda flat, conf: flat.update({"more/bias": np.zeros(3)}))),
    ],
    "unexpected: more/bias",
  ),
  "output folder is a file": (
    lambda t, c, i, w: ["track", c, "--weights", w, "--out", _write(t / "f", "")],
    "cannot write into",
  ),
  "output folder below a file": (
    lambda t, c, i, w: ["demo", "--weights", w, "--out", _write(t / "f", "") / "deep"],
    "cannot write into .*Not a directory",
  ),
  "two images of different size": (
    lambda t, c, i, w: ["flow", i[0], viz.write_png(t / "b.png", _frames(h=44)[0])],
    "different sizes, 56 x 40 and 56 x 44",
  ),
  "an image that is none": (
    lambda t, c, i, w: ["flow", i[0], _write(t / "b.png", "no"), "--weights", w],
    "b.png is not an image",
  ),
  "flow at a point of another frame": (
    lambda t, c, i, w: [
      *("flow", *i, "--weights", w),
      *("--points", _write(t / "p.csv", "t,y,x\n1,2,3\n")),
    ],
    "t is 1, which is no frame",
  ),
  "a stride larger than the image": (
    lambda t, c, i, w: ["flow", *i, "--weights", w, "--stride", 64],
    "stride of 64",
  ),
  "a workdir that is none": (
    lambda t, c, i, w: ["convert", t, t / "out.safetensors"],
    "config.json cannot be read .*is it a workdir",
  ),
}


def _foreign(tmp_path):
  from safetensors.numpy import save_file

  path = tmp_path / "foreign.safetensors"
  save_file({"conv.weight": np.zeros((2, 2), np.float32)}, path)
  return path


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_is_wrong_is_one_sentence_and_exit_code_2(
  capfd, tmp_path, clip_path, frame_paths, weights_path, kind
):
  make, sentence = BROKEN[kind]
  argv = make(tmp_path, clip_path, frame_paths[:2], weights_path)
  out = [] if {"--out", "info", "convert"} & set(map(str, argv)) else ["--out", tmp_path / "out"]
  code, stdout, stderr = _run(capfd, *argv, *out)
  lines = stderr.strip().splitlines()
  assert code == 2 and stdout == ""
  assert len(lines) == 1 and lines[0].startswith("error: ")
  assert re.search(sentence, lines[0])


@pytest.mark.parametrize(
  "argv, told",
  [
    ([], "required: COMMAND"),
    (["trakc", "a.mp4"], "invalid choice: 'trakc'"),
    (["track", "a.mp4", "--grid", "0"], "'0' is not a whole number from 1 up"),
    (["track", "a.mp4", "--masks", "many"], "'many' is not a whole number from 1 up"),
    (["track", "a.mp4", "--grid", "4", "--points", "p.csv"], "not allowed with"),
    (["flow", "a.png"], "required: B"),
  ],
)
def test_a_wrong_command_line_ends_with_usage_and_exit_code_2(capsys, argv, told):
  with pytest.raises(SystemExit) as left:
    cli.main(argv)
  assert left.value.code == 2 and told in capsys.readouterr().err


def test_help_shows_every_command_with_an_example(capsys):
  with pytest.raises(SystemExit) as left:
    cli.main(["--help"])
  out = capsys.readouterr().out
  assert left.value.code == 0
  for command in ("demo", "track", "flow", "info", "convert"):
    assert f"\n  cwm-jax {command}" in out


def test_ctrl_c_leaves_with_130_and_no_traceback(clip_path, weights_path, tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-m", "cwm_jax.cli", "track", clip_path, "--weights", weights_path]
    + ["--grid", "40", "--masks", "500", "--out", tmp_path / "o"],
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  deadline = time.monotonic() + 120
  # The folder is made just before the tracker is loaded: from then on there is work to interrupt.
  while not (tmp_path / "o").exists() and time.monotonic() < deadline:
    time.sleep(0.1)
  time.sleep(1.0)
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=120)
  assert process.returncode == 130
  assert stderr.strip().splitlines()[-1] == "interrupted" and "Traceback" not in stderr


def test_the_commands_start_at_once_when_only_asked_for_help():
  best = 99.0
  for _ in range(3):
    start = time.perf_counter()
    subprocess.run(
      [sys.executable, "-m", "cwm_jax.cli", "--help"], check=True, stdout=subprocess.DEVNULL
    )
    best = min(best, time.perf_counter() - start)
  assert best < 0.5
