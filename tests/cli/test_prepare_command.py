"""`cwm-jax prepare`."""

from __future__ import annotations

import json
from fractions import Fraction

import av
import numpy as np
import tensorflow_datasets as tfds

from cwm_jax import cli


def test_a_folder_of_videos_becomes_a_dataset(tmp_path, capsys):
  folder = tmp_path / "videos"
  folder.mkdir()
  with av.open(str(folder / "a.mp4"), "w") as container:
    stream = container.add_stream("libx264", rate=10)
    stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
    for i in range(8):
      picture = np.full((24, 32, 3), 20 * i, np.uint8)
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
      frame.pts, frame.time_base = i, Fraction(1, 10)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  (folder / "b.mp4").write_text("not a video")
  asked = ["prepare", str(folder), "--out", str(tmp_path / "out"), "--workers", "0", "--json"]
  asked += ["--seconds", "0.4", "--fps", "10", "--set", "prepare.quality=95"]
  assert cli.main(asked) == 0
  told = json.loads(capsys.readouterr().out)
  assert (told["clips"], told["videos"], told["skipped"]) == (2, 1, 1)
  data = tfds.data_source("clips", data_dir=str(tmp_path / "out"), split="train")
  assert len(data) == 2 and len(data[0]["frames"]) == 4


def test_no_videos_is_a_sentence_and_exit_code_2(tmp_path, capsys):
  assert cli.main(["prepare", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
  assert "holds no video files" in capsys.readouterr().err
