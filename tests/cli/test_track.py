"""`cwm-jax track`: queries, modes, tables, any kind of video, what is kept of unfinished work."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import av
import command_line
import numpy as np
import pytest
from PIL import Image

from cwm_jax import commands, inputs, track, viz
from cwm_jax.data import images, video
from cwm_jax.types import InputError, PointFlow, Tracks


def _track(capsys, tmp_path, clip, weights_path, *more):
  argv = ["track", clip, "--weights", weights_path, "--masks", 1, "--json", *more]
  code, out, err = command_line.run(capsys, *argv, "--out", tmp_path / "o")
  assert (code, err) == (0, "")
  return json.loads(out), np.load(tmp_path / "o" / "tracks.npz")


def test_points_lie_where_a_picture_is_white(tmp_path):
  mask = np.zeros((20, 28, 3), np.uint8)
  mask[4:12, 6:26] = 255
  mask[4:8, 6:16] = 90  # dark: the box is still cut by the bright part
  path = viz.write_png(tmp_path / "mask.png", mask)
  points = inputs.masked_points_xy(str(path), 2, (40, 56))
  # Cells of 10 x 4 pixels in the box; the first one's centre is dark. Frames are twice as large.
  np.testing.assert_allclose(points, [[42, 12], [22, 20], [42, 20]])


@pytest.mark.parametrize(
  "make, told",
  [
    (lambda: np.zeros((20, 28, 3), np.uint8), "nothing bright"),
    (lambda: np.full((20, 20, 3), 255, np.uint8), "20 x 20, the frames are 56 x 40"),
    (lambda: _ring(), "no centre of 1 x 1 cells is bright"),
  ],
)
def test_a_mask_picture_that_gives_no_points_is_one_sentence(tmp_path, make, told):
  path = viz.write_png(tmp_path / "mask.png", make())
  with pytest.raises(InputError, match=told):
    inputs.masked_points_xy(str(path), 1, (40, 56))


def _ring():
  mask = np.full((40, 56, 3), 255, np.uint8)
  mask[10:30, 10:46] = 0
  return mask


def test_a_grid_in_a_mask_is_asked_about_in_its_own_frame_and_a_table_is_written(
  capsys, tmp_path, clip_path, weights_path
):
  mask = np.zeros((40, 56, 3), np.uint8)
  mask[:, 28:] = 255
  path = viz.write_png(tmp_path / "mask.png", mask)
  more = ["--in-mask", path, "--grid", 2, "--at", 2, "--csv", "--mode", "anchor"]
  facts, saved = _track(capsys, tmp_path, clip_path, weights_path, *more)
  np.testing.assert_allclose(saved["queries_tyx"][0], [2, 10, 35])
  assert len(saved["queries_tyx"]) == 4 and (saved["queries_tyx"][:, 0] == 2).all()
  with open(tmp_path / "o" / "tracks.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 4 * 6 and str(tmp_path / "o" / "tracks.csv") in facts["files"]
  row = rows[1 * 6 + 4]
  assert (row["point"], row["t"]) == ("1", "4")
  np.testing.assert_allclose(
    [float(row["x"]), float(row["y"])], saved["tracks_xy"][1, 4], atol=1e-3
  )
  assert row["occluded"] == str(int(saved["occluded"][1, 4]))


@pytest.mark.parametrize("mode", ["query", "chain", "anchor"])
def test_the_mode_is_handed_to_the_tracker(
  capsys, tmp_path, clip_path, weights_path, monkeypatch, mode
):
  from cwm_jax import tracking

  heard, follow = [], tracking.follow
  monkeypatch.setattr(
    tracking, "follow", lambda *args, **named: heard.append(named["mode"]) or follow(*args, **named)
  )
  _track(capsys, tmp_path, clip_path, weights_path, "--grid", 1, "--no-overlay", "--mode", mode)
  assert heard == [mode]


def test_points_of_a_table_come_with_their_own_frames(capsys, tmp_path, clip_path, weights_path):
  points = tmp_path / "p.csv"
  points.write_text("t,y,x\n0,1,1\n")
  argv = ["track", clip_path, "--points", points, "--at", 2, "--weights", weights_path]
  code, _, err = command_line.run(capsys, *argv, "--out", tmp_path / "o")
  assert code == 2 and "--in-mask and --at go with a grid" in err


def _uneven(path, frames, times_s):
  """A video whose frames come on display at those times."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=30)
    stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
    stream.codec_context.time_base = Fraction(1, 1000)
    for frame, time_s in zip(frames, times_s):
      made = av.VideoFrame.from_ndarray(frame, format="rgb24")
      made.pts, made.time_base = round(time_s * 1000), Fraction(1, 1000)
      container.mux(stream.encode(made))
    container.mux(stream.encode())
  return path


def test_a_video_of_varying_frame_rate_keeps_its_times_in_the_overlay_too(
  capsys, tmp_path, weights_path
):
  times_s = [0.0, 0.04, 0.08, 0.5, 0.52, 1.3]
  clip = _uneven(tmp_path / "v.mp4", command_line.frames(), times_s)
  _, saved = _track(capsys, tmp_path, clip, weights_path, "--grid", 2)
  np.testing.assert_allclose(saved["times_s"], times_s, atol=2e-3)
  with video.VideoFile(tmp_path / "o" / "overlay.mp4") as overlay:
    shown = [time_s for time_s, _ in overlay.timed()]
  np.testing.assert_allclose(shown, times_s, atol=2e-3)


def _gif(path, frames):
  """An animation whose upper left quarter is transparent."""
  pictures = []
  for frame in frames:
    opaque = np.full((*frame.shape[:2], 1), 255, np.uint8)
    opaque[:20, :28] = 0
    pictures.append(Image.fromarray(np.concatenate([frame, opaque], axis=-1), "RGBA"))
  pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, disposal=2)
  return path


def _container(path, frames, codec):
  """A video with alpha, whose upper left quarter is transparent."""
  stored = {"qtrle": "argb", "png": "rgba", "ffv1": "bgra"}[codec]
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=10)
    stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], stored
    for t, frame in enumerate(frames):
      opaque = np.full((*frame.shape[:2], 1), 255, np.uint8)
      opaque[:20, :28] = 0
      made = av.VideoFrame.from_ndarray(np.concatenate([frame, opaque], axis=-1), format="rgba")
      made = made.reformat(format=stored)
      made.pts, made.time_base = t, Fraction(1, 10)
      container.mux(stream.encode(made))
    container.mux(stream.encode())
  return path


def _folder(path, frames, mode):
  path.mkdir()
  for i, frame in enumerate(frames):
    picture = Image.fromarray(frame).convert(mode)
    if mode == "RGBA":
      picture.putalpha(
        Image.fromarray(
          np.pad(np.zeros((20, 28), np.uint8), ((0, 20), (0, 28)), constant_values=255)
        )
      )
    picture.save(path / f"{i}.png")
  return path


@pytest.mark.parametrize(
  "kind",
  [
    "gif",
    "qtrle.mov",
    "png.mov",
    "ffv1.mkv",
    "vertical",
    "folder with alpha",
    "grey folder",
    "odd size",
  ],
)
def test_any_kind_of_video_is_tracked_in_its_own_pixels(capsys, tmp_path, weights_path, kind):
  frames, size_hw = command_line.frames(4), (40, 56)
  if kind == "gif":
    clip = _gif(tmp_path / "a.gif", frames)
    # What is transparent is black, whatever colour lies beneath.
    assert (next(video.iter_frames(clip))[:20, :28] == 0).all()
  elif "." in kind:
    clip = _container(tmp_path / f"a.{kind.partition('.')[2]}", frames, kind.partition(".")[0])
    # Stored without loss: black where it is transparent, itself elsewhere.
    read = next(video.iter_frames(clip))
    assert (read[:20, :28] == 0).all()
    np.testing.assert_array_equal(read[20:], frames[0, 20:])
  elif kind == "vertical":
    frames, size_hw = command_line.frames(4, 64, 36), (64, 36)
    clip = viz.write_mp4(tmp_path / "a.mp4", frames, fps=10)
  elif kind == "odd size":
    frames = command_line.frames(4)[:, :39, :55]
    clip, size_hw = _folder(tmp_path / "a", frames, "RGB"), (39, 55)
  else:
    clip = _folder(tmp_path / "a", frames, "RGBA" if "alpha" in kind else "L")
    if "alpha" in kind:
      assert (images.read_image(clip / "0.png")[:20, :28] == 0).all()
      np.testing.assert_array_equal(images.read_image(clip / "0.png")[20:], frames[0, 20:])
  facts, saved = _track(capsys, tmp_path, clip, weights_path, "--grid", 2)
  assert tuple(saved["size_hw"]) == size_hw and facts["frames"] == 4
  h, w = size_hw
  np.testing.assert_allclose(saved["queries_tyx"][0], [0, h / 4, w / 4])
  assert (saved["tracks_xy"] >= 0).all() and (saved["tracks_xy"] <= (w, h)).all()
  shown = video.probe(tmp_path / "o" / "overlay.mp4")
  assert (shown.width, shown.height) == (2 * w + 2 * w % 2, 2 * h + 2 * h % 2)


def test_a_4k_clip_is_tracked_in_its_own_pixels(capsys, tmp_path, weights_path):
  small = command_line.frames(3, 36, 64)
  frames = small.repeat(60, axis=1).repeat(60, axis=2)
  clip = viz.write_mp4(tmp_path / "a.mp4", frames, fps=10)
  facts, saved = _track(capsys, tmp_path, clip, weights_path, "--grid", 1)
  assert tuple(saved["size_hw"]) == (2160, 3840) and facts["frames"] == 3
  np.testing.assert_array_equal(saved["queries_tyx"], [[0, 1080, 1920]])
  np.testing.assert_array_equal(saved["tracks_xy"][0, 0], [1920, 1080])
  shown = video.probe(tmp_path / "o" / "overlay.mp4")
  assert (shown.width, shown.height) == (3840, 2160)


def test_a_video_that_is_damaged_half_way_leaves_the_tracks_up_to_there(
  capsys, tmp_path, weights_path
):
  folder = _folder(tmp_path / "a", command_line.frames(6), "RGB")
  (folder / "4.png").write_bytes(b"broken")
  argv = ["track", folder, "--weights", weights_path, "--masks", 1, "--grid", 2]
  code, _, err = command_line.run(capsys, *argv, "--out", tmp_path / "o")
  assert code == 2 and err.count("\n") == 1
  # The answers come one frame late, so three of the four good frames are known.
  assert "4.png is not an image" in err and "tracks through the first 3 frames are in" in err
  assert np.load(tmp_path / "o" / "tracks.npz")["tracks_xy"].shape == (4, 3, 2)
  assert len(np.load(tmp_path / "o" / "tracks.npz")["times_s"]) == 3


@pytest.fixture
def still(monkeypatch):
  """A tracker to which nothing moves, so that no network need be asked."""

  def track_frames(frames, queries, *, mode):
    count = len(queries)
    for _ in frames:
      yield PointFlow(queries[:, :0:-1], np.ones(count, bool), np.ones(count, np.float32))

  tracker = SimpleNamespace(track_frames=track_frames)
  monkeypatch.setattr(commands, "load_tracker", lambda *_, **__: tracker)


def test_new_tracks_leave_no_file_of_older_ones_but_the_video_that_is_read(
  capsys, tmp_path, clip_path, still
):
  def there():
    return {path.name for path in tmp_path.iterdir()}

  argv = ["--grid", 2, "--out", tmp_path]
  assert command_line.run(capsys, "track", clip_path, *argv, "--csv")[0] == 0
  assert there() == {"tracks.npz", "tracks.csv", "overlay.mp4"}
  overlay = tmp_path / "overlay.mp4"
  assert command_line.run(capsys, "track", overlay, *argv, "--no-overlay")[0] == 0
  assert there() == {"tracks.npz", "overlay.mp4"}
  assert command_line.run(capsys, "track", clip_path, *argv, "--no-overlay")[0] == 0
  assert there() == {"tracks.npz"}


def test_an_overlay_that_cannot_be_written_leaves_the_tracks_and_says_so(
  capsys, tmp_path, clip_path, still, monkeypatch
):
  def refuse(*_, **__):
    raise InputError("cannot write overlay.mp4: too wide")

  monkeypatch.setattr(viz, "write_mp4", refuse)
  code, _, err = command_line.run(capsys, "track", clip_path, "--grid", 2, "--out", tmp_path)
  assert code == 2 and np.load(tmp_path / "tracks.npz")["tracks_xy"].shape == (4, 6, 2)
  assert f"too wide; the tracks are in {tmp_path / 'tracks.npz'}" in err


def test_ctrl_c_leaves_the_tracks_up_to_there(tmp_path, weights_path):
  frames = itertools.islice(itertools.cycle(command_line.frames(8)), 400)
  clip = viz.write_mp4(tmp_path / "long.mp4", frames, fps=25)
  out = tmp_path / "o"
  # A reader of progress that is a terminal tells when frames are answered.
  process = subprocess.Popen(
    [sys.executable, "-c", _TOLD, "track", clip, "--weights", weights_path, "--grid", "12"]
    + ["--masks", "20", "--csv", "--out", out],
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  heard = ""
  deadline = time.monotonic() + 300
  while "3 of 400 frames tracked" not in heard and time.monotonic() < deadline:
    heard += process.stderr.read(1)
  process.send_signal(signal.SIGINT)
  rest = process.communicate(timeout=120)[1]
  assert process.returncode == 130 and "Traceback" not in rest
  assert rest.strip().splitlines()[-1] == "interrupted"
  saved = np.load(out / "tracks.npz")
  count = saved["tracks_xy"].shape[1]
  assert f"the tracks through the first {count} frames are in" in rest
  assert 3 <= count < 400 and len(saved["times_s"]) == count
  assert sum(1 for _ in open(out / "tracks.csv")) == 1 + 144 * count


def test_ctrl_c_while_results_are_saved_leaves_them_whole(
  capsys, tmp_path, clip_path, weights_path, monkeypatch
):
  savez, cut = np.savez_compressed, []

  def cut_once(file, **arrays):
    if cut:
      return savez(file, **arrays)
    cut.append(file)
    if hasattr(file, "write"):
      file.write(b"PK half of it")
    else:
      file.write_bytes(b"PK half of it")
    raise KeyboardInterrupt

  monkeypatch.setattr(np, "savez_compressed", cut_once)
  argv = ["track", clip_path, "--weights", weights_path, "--masks", 1, "--grid", 2, "--csv"]
  code, _, err = command_line.run(capsys, *argv, "--out", tmp_path / "o")
  assert cut and code == 130
  assert "the tracks through the first 6 frames are in" in err and err.endswith("interrupted\n")
  assert np.load(tmp_path / "o" / "tracks.npz")["tracks_xy"].shape == (4, 6, 2)
  assert sum(1 for _ in open(tmp_path / "o" / "tracks.csv")) == 1 + 4 * 6
  assert {path.name for path in (tmp_path / "o").iterdir()} == {"tracks.npz", "tracks.csv"}


@pytest.mark.parametrize("name", ["tracks.npz", "tracks.csv"])
def test_results_that_cannot_be_written_whole_leave_those_that_were_there(tmp_path, name):
  good = Tracks(np.ones((1, 2, 2), np.float32), np.ones((1, 2), bool), np.ones((1, 2)))
  # Of the second frame nothing is known, which is met when half is written.
  short = good._replace(xy=good.xy[:, :1])
  queries = np.zeros((1, 3), np.float32)
  track.save(tmp_path / name, good, queries, (8, 8))
  before = (tmp_path / name).read_bytes()
  if name.endswith(".csv"):
    with pytest.raises(IndexError):
      track.save(tmp_path / name, short, queries, (8, 8))
  else:
    with pytest.raises(TypeError):
      inputs.save_arrays(tmp_path / name, first=good.xy, second=np.array(threading.Lock(), object))
  assert (tmp_path / name).read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == [name]


_TOLD = """
import sys
sys.stderr.isatty = lambda: True
from cwm_jax import cli, terminal
terminal._EVERY_S = 0.0
sys.exit(cli.main())
"""


def test_points_that_choose_their_masks(capsys, tmp_path, clip_path, weights_path):
  _, saved = _track(capsys, tmp_path, clip_path, weights_path, "--grid", 2)
  fixed_xy = saved["tracks_xy"]
  _, saved = _track(capsys, tmp_path, clip_path, weights_path, "--grid", 2, "--masks", "adaptive")
  assert saved["tracks_xy"].shape == fixed_xy.shape
  assert not np.array_equal(saved["tracks_xy"], fixed_xy)
  with pytest.raises(SystemExit):
    command_line.run(capsys, "track", clip_path, "--masks", "some")
  assert "'some' is not a whole number from 1 up" in capsys.readouterr().err
