"""Whatever a command is given that it cannot use is told in one sentence, with exit code 2."""

from __future__ import annotations

import re

import command_line
import numpy as np
import pytest

from cwm_jax import viz
from cwm_jax.pretrained import weights


def _write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def _changed(tmp_path, change):
  """A weights file whose parameters or config have been changed."""
  config = {"model": dict(command_line.MODEL)}
  flat = weights.flatten(command_line.random_params(config))
  change(flat, config)
  return weights.save(tmp_path / "w.safetensors", weights.unflatten(flat), config)


def _folder(path):
  path.mkdir()
  return path


def _track_points(tmp_path, clip, weights_file, text):
  points = _write(tmp_path / "p.csv", text)
  return ["track", clip, "--points", points, "--weights", weights_file, "--masks", 1]


_URL = "https://example.org/a.txt"


def _training(tmp_path, weights_file):
  """A training on an address; it has a WORKDIR instead of --out."""
  return ["train", tmp_path / "run", "--videos", _URL, "--from", weights_file]


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
  **{
    f"URL {name}": (lambda t, c, i, w, make=make: make(t, c, i, w), "is a URL; download it first")
    for name, make in {
      "as an image of flow": lambda t, c, i, w: ["flow", i[0], _URL, "--weights", w],
      "as a picture": lambda t, c, i, w: ["segments", _URL, "--weights", w],
      "as a mask": lambda t, c, i, w: ["track", c, "--in-mask", _URL, "--weights", w],
      "as points": lambda t, c, i, w: ["track", c, "--points", _URL, "--weights", w],
      "as videos to prepare": lambda t, c, i, w: ["prepare", _URL, "--workers", 0],
      "as videos to label": lambda t, c, i, w: ["label", "--videos", _URL, "--tracker", "zero"],
      "as videos to train on": lambda t, c, i, w: _training(t, w),
    }.items()
  },
  "empty folder": (lambda t, c, i, w: ["demo", _folder(t / "d"), "--weights", w], "holds no image"),
  "folder of broken frames": (
    lambda t, c, i, w: ["track", _write(_folder(t / "d") / "0.png", "x").parent, "--weights", w],
    "0.png is not an image",
  ),
  "folder of frames of two sizes": (
    lambda t, c, i, w: ["track", _two_sizes(t), "--weights", w, "--masks", 1],
    r"1.png is 56 x 44, the frames before it 56 x 40; frames need one size",
  ),
  "demo of frames of two sizes": (
    lambda t, c, i, w: ["demo", _two_sizes(t), "--weights", w, "--masks", 1],
    r"1.png is 56 x 44, the frames before it 56 x 40; frames need one size",
  ),
  "video of one frame": (
    lambda t, c, i, w: [
      "demo",
      viz.write_mp4(t / "a.mp4", command_line.frames(1), fps=5),
      "--weights",
      w,
    ],
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
    lambda t, c, i, w: _track_points(t, c, w, ""),
    "must begin with the header t,y,x",
  ),
  "points without header": (
    lambda t, c, i, w: _track_points(t, c, w, "0,1,2\n"),
    "header t,y,x, not '0,1,2'",
  ),
  "points without rows": (
    lambda t, c, i, w: _track_points(t, c, w, "t,y,x\n"),
    "holds no points",
  ),
  "a point that is a word": (
    lambda t, c, i, w: _track_points(t, c, w, "t,y,x\n0,1,2\n0,left,2\n"),
    "line 3: '0,left,2' is not a point",
  ),
  "a point with a column too few": (
    lambda t, c, i, w: _track_points(t, c, w, "t,y,x\n0,1\n"),
    "line 2: '0,1' is not a point",
  ),
  "a point outside the frame": (
    lambda t, c, i, w: _track_points(t, c, w, "t,y,x\n0,40,3\n"),
    "line 2: y = 40, x = 3 lies outside the frame of 56 x 40",
  ),
  "a point that is not a number": (
    lambda t, c, i, w: _track_points(t, c, w, "t,y,x\n0,nan,3\n"),
    "lies outside the frame",
  ),
  "a point between frames": (
    lambda t, c, i, w: _track_points(t, c, w, "t,y,x\n0.5,1,3\n"),
    "t is 0.5, which is no frame",
  ),
  "a point after the last frame": (
    lambda t, c, i, w: _track_points(t, c, w, "t,y,x\n6,1,3\n"),
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
    lambda t, c, i, w: ["flow", i[0], viz.write_png(t / "b.png", command_line.frames(h=44)[0])],
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


def _two_sizes(tmp_path):
  folder = _folder(tmp_path / "d")
  viz.write_png(folder / "0.png", command_line.frames()[0])
  viz.write_png(folder / "1.png", command_line.frames(h=44)[0])
  return folder


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
  out = (
    []
    if {"--out", "info", "convert", "train"} & set(map(str, argv))
    else ["--out", tmp_path / "out"]
  )
  code, stdout, stderr = command_line.run(capfd, *argv, *out)
  lines = stderr.strip().splitlines()
  assert code == 2 and stdout == ""
  assert len(lines) == 1 and lines[0].startswith("error: ")
  assert re.search(sentence, lines[0])
