"""Ctrl-C to long commands: exit code 130, no traceback, and what is finished can be used."""

from __future__ import annotations

import itertools
import json
import logging
import os

import command_line
import numpy as np

from cwm_jax import viz
from cwm_jax.data import flowfiles, labels


def _interrupted(argv, ready):
  """Interrupts a command once there is something finished; returns its stderr."""
  _, stderr = command_line.interrupted(ready, *argv)
  assert stderr.strip().splitlines()[-1] == "interrupted"
  return stderr


def test_dense_leaves_whole_fields_and_says_how_many(tmp_path, weights_path):
  frames = itertools.islice(itertools.cycle(command_line.frames(8)), 2000)
  clip = viz.write_mp4(tmp_path / "long.mp4", frames, fps=25)
  out = tmp_path / "o"
  argv = ["dense", clip, "--weights", weights_path, "--masks", 1, "--stride", 20, "--out", out]
  # The third one is counted, for the fourth is there.
  stderr = _interrupted(argv, (out / "000003.flo").exists)
  fields = sorted(out.glob("*.flo"))
  assert all(flowfiles.read_flo(path)[0].shape == (40, 56, 2) for path in fields)
  told = int(stderr.partition("the first ")[2].partition(" fields are in")[0])
  # While this is told, the command goes on with the next ones.
  assert 3 <= told <= len(fields) < 1999


def test_eval_leaves_its_finished_rows_and_does_not_measure_them_again(
  capsys, tmp_path, weights_path
):
  out = tmp_path / "o"
  argv = ["eval", "--scenes", 1, "--set", "evaluate.honesty=False", "--weights", weights_path]
  # The second tracker asks with so many masks that it is under way when the first is done.
  asked = [*argv, "--trackers", "zero,mm5000", "--out", out]
  results = out / "results.json"
  _interrupted(asked, lambda: results.exists() and "median_distance" in results.read_text())
  ((_, rows),) = json.loads(results.read_text())["numbers"].items()
  assert list(rows) == ["zero"]
  code, printed, _ = command_line.run(capsys, *argv, "--trackers", "zero", "--out", out, "--json")
  ((_, again),) = json.loads(printed)["results"].items()
  assert code == 0 and again == rows  # the very seconds


def test_label_leaves_whole_shards(tmp_path, videos):
  out = tmp_path / "o"
  argv = ["label", "--videos", videos, "--tracker", "zero", "--pairs", 100_000, "--points", 3]
  argv += ["--set", "label.image_hw=(16, 16)", "--set", "label.shard_pairs=4"]
  argv += ["--set", "data.batch_size=2", "--out", out]
  _interrupted(argv, lambda: len(list(out.glob("*.json"))) >= 3)
  shards = labels.find_shards(out)
  assert len(shards) >= 1
  assert not json.loads((out / "manifest.json").read_text())["complete"]
  example = labels.LabelsSource(out, image_hw=(16, 16)).example(0, 0)
  np.testing.assert_array_equal(example["labels/flow_xy"], np.zeros((3, 2)))


def test_prepare_goes_on_with_the_shards_that_are_left(capsys, caplog, tmp_path, videos):
  folder = tmp_path / "videos"
  folder.mkdir()
  for i in range(120):
    os.link(videos / "0.mp4", folder / f"{i}.mp4")
  out = tmp_path / "o"
  argv = ["prepare", folder, "--seconds", 0.4, "--fps", 10, "--workers", 0, "--out", out]
  argv += ["--set", "prepare.shard_videos=1"]
  work = out / "clips" / "1.0.0" / "unfinished"
  _interrupted(argv, (work / "00000.json").exists)
  done = len(list(work.glob("0*.json")))
  assert 1 <= done < 120
  caplog.set_level(logging.INFO, "cwm_jax.prepare")
  code, printed, err = command_line.run(capsys, *argv, "--json")
  assert code == 0, err
  told = json.loads(printed)
  assert told["videos"] == 120 and told["skipped"] == 0
  assert f"120 videos, 120 shards, of which {120 - done} are left" in caplog.text
