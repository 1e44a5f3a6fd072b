"""`cwm-jax label`: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import json
import logging

import command_line
import numpy as np
import pytest

from cwm_jax.data import labels

_TINY = ["--tracker", "zero", "--pairs", 6, "--points", 3, "--set", "label.image_hw=(16, 16)"]
_TINY += ["--set", "label.shard_pairs=4", "--set", "data.batch_size=2"]


def test_videos_are_labelled_into_shards_that_training_reads(capsys, caplog, tmp_path, videos):
  caplog.set_level(logging.INFO, "cwm_jax.label")
  argv = ["label", "--videos", videos, *_TINY, "--out", tmp_path]
  code, out, err = command_line.run(capsys, *argv, "--json")
  assert code == 0, err
  # Throughput, the time that is left and what the filters keep, shard by shard.
  lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("shard ")]
  assert len(lines) == 2 and lines[0].startswith("shard 1/2 ") and "eta 0:00" in lines[1]
  assert all("pairs/s" in line and "kept 100%" in line for line in lines)
  facts = json.loads(out)
  assert (facts["complete"], facts["pairs"], facts["points"]) == (True, 6, 18)
  shards = labels.find_shards(tmp_path)
  assert facts["files"] == [*map(str, shards), str(tmp_path / "manifest.json")]
  source = labels.LabelsSource(tmp_path, image_hw=(16, 16))
  assert source.items == 6
  example = source.example(0, 5)
  assert example["labels/points_xy"].shape == (3, 2)
  np.testing.assert_array_equal(example["labels/flow_xy"], 0)
  # Given again, nothing is left to do.
  caplog.clear()
  code, out, _ = command_line.run(capsys, *argv)
  assert code == 0 and "18 points of 6 pairs" in out and "manifest.json" in out
  assert not [r for r in caplog.records if r.getMessage().startswith("shard ")]


def test_without_videos_scenes_are_labelled_by_the_config_s_own_settings(capsys, tmp_path):
  argv = ["label", *_TINY, "--set", "data.sources.scenes.max_objects=1", "--out", tmp_path]
  code, out, err = command_line.run(capsys, *argv, "--json")
  assert code == 0, err
  settings = json.loads(out)["settings"]
  assert settings["data"]["sources"]["scenes"]["weight"] == 1.0
  assert settings["label"]["tracker"] == "zero"
  assert settings["label"]["min_confidence"] > 0


@pytest.mark.parametrize(
  "argv, told",
  [
    (["--videos", "gone"], "gone"),
    (["--tracker", "best"], "there is no tracker 'best'"),
    (["--set", "label.shard_pairs=3"], "no multiple of data.batch_size"),
    (["--set", "label.pears=3"], "did you mean 'label.pairs'"),
  ],
)
def test_what_cannot_be_is_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, told):
  monkeypatch.chdir(tmp_path)
  code, _, err = command_line.run(capsys, "label", *_TINY, *argv)
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert code == 2 and len(lines) == 1 and told in lines[0] and "Traceback" not in err


def test_a_folder_of_another_job_s_labels_is_refused_and_one_without_labels_is_taken(
  capsys, tmp_path
):
  other = ["--videos", "gone", "--out", tmp_path]
  assert command_line.run(capsys, "label", *_TINY, *other)[0] == 2
  argv = ["label", *_TINY, "--set", "data.sources.scenes.max_objects=1", "--out", tmp_path]
  assert command_line.run(capsys, *argv)[0] == 0
  code, _, err = command_line.run(capsys, *argv, "--points", 4)
  assert code == 2 and "is of a job with other settings (label.points)" in err
