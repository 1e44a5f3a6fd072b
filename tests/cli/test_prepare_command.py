"""`cwm-jax prepare`."""

from __future__ import annotations

import json
import shlex
from fractions import Fraction

import av
import command_line
import numpy as np
import tensorflow_datasets as tfds

from cwm_jax import arguments, cli, jobs, viz
from cwm_jax.data import loader


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


def test_the_command_that_it_prints_trains_on_the_clips(tmp_path, capsys):
  folder = tmp_path / "my videos"
  folder.mkdir()
  pictures = command_line.frames(10, 24, 32)
  viz.write_mp4(folder / "a.mp4", pictures, fps=10)
  argv = ["prepare", folder, "--out", tmp_path / "the clips", "--workers", 0]
  code, out, _ = command_line.run(capsys, *argv, "--seconds", 0.5, "--fps", 10)
  assert code == 0 and "--config." not in out
  words = shlex.split(out.partition("to train on them:\n")[2])
  assert words[:3] == ["cwm-jax", "train", "WORKDIR"]
  asked = vars(arguments.parser().parse_args(words[1:]))
  config = jobs.load_config("finetune")
  jobs.set_keys(config, asked["settings"])
  assert config.data.sources.tfds.gap == 2  # of 100 ms each
  config.data.sources.scenes.weight = 0.0
  config.data.batch_size = 2
  data = loader.make_loader(config.data, image_hw=(16, 16), seed=0)
  try:
    assert next(data)["frames"].shape == (2, 2, 16, 16, 3)
  finally:
    data.close()


def test_no_videos_is_a_sentence_and_exit_code_2(tmp_path, capsys):
  assert cli.main(["prepare", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
  assert "holds no video files" in capsys.readouterr().err
