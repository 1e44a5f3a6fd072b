"""`cwm-jax prepare`."""

from __future__ import annotations

import json
import shlex

import command_line
import tensorflow_datasets as tfds
import tiny_clips

from cwm_jax import arguments, cli, jobs, viz
from cwm_jax.data import loader


def test_a_folder_of_videos_becomes_a_dataset(tmp_path, capsys):
  folder = tmp_path / "videos"
  folder.mkdir()
  tiny_clips.write_video(folder / "a.mp4", 8, 0)
  (folder / "b.mp4").write_text("not a video")
  asked = ["prepare", str(folder), "--out", str(tmp_path / "out"), "--workers", "0", "--json"]
  asked += ["--seconds", "0.4", "--fps", "10", "--set", "prepare.quality=95"]
  assert cli.main(asked) == 0
  told = json.loads(capsys.readouterr().out)
  assert (told["clips"], told["videos"], told["skipped"]) == (2, 1, 1)
  data = tfds.data_source("clips", data_dir=str(tmp_path / "out"), split="train")
  assert len(data) == 2 and len(data[0]["frames"]) == 4


def test_the_settings_that_it_prints_for_train_make_a_loader_read_the_clips(tmp_path, capsys):
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
