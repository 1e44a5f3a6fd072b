"""`cwm-jax eval` and `train`: which config they make, what they leave, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import command_line
import joint_job
import numpy as np
import pytest
import tiny_job

from cwm_jax import checkpoint, jobs, viz
from cwm_jax import train as job
from cwm_jax.pretrained import mark_files, weights
from cwm_jax.types import InputError


def test_eval_measures_weights_on_scenes_and_goes_on_where_it_was(capsys, tmp_path, weights_path):
  argv = ["eval", "--scenes", 2, "--weights", weights_path, "--trackers", "mm1,zero"]
  argv += ["--set", "evaluate.honesty=False", "--out", tmp_path]
  code, out, _ = command_line.run(capsys, *argv, "--json")
  facts = json.loads(out)
  assert code == 0
  (rows,) = facts["results"].values()
  assert set(rows) == {"mm1", "zero"} and 0 < rows["zero"]["median_distance"] < 100
  code, out, _ = command_line.run(capsys, *argv)
  assert code == 0 and "scenes-test-v1[2]" in out and "zero" in out and "results.json" in out
  again = json.loads((tmp_path / "results.json").read_text())["numbers"]
  assert again == facts["results"]


def test_eval_asks_a_predictor_what_moves_along_with_objects_and_no_scenes_beside(
  capsys, tmp_path, weights_path
):
  argv = ["eval", "--segments", 1, "--weights", weights_path, "--trackers", "mm1"]
  code, out, _ = command_line.run(capsys, *argv, "--out", tmp_path, "--json")
  assert code == 0
  ((title, rows),) = json.loads(out)["results"].items()
  assert title == "segments[1]" and rows["mm1"]["num_points"] == 2
  assert 0 < rows["mm1"]["share"] < 1


_TINY = ["--steps", 2, "--batch", 2, "--set", "data.sources.scenes.weight=0.0"]
_TINY += ["--set", "log.eval_every=0 steps", "--set", "log.images_every=0 steps"]


def test_train_carries_weights_on_with_on_videos_and_leaves_a_file_that_tracks(
  capsys, tmp_path, weights_path, videos
):
  workdir = tmp_path / "run"
  argv = ["train", workdir, "--videos", videos, "--from", weights_path, *_TINY, "--json"]
  code, out, err = command_line.run(capsys, *argv)
  assert code == 0, err
  made = workdir / "model.safetensors"
  assert json.loads(out)["files"] == [str(made)]
  first, config = weights.load(weights_path)
  trained, kept = weights.load(made)
  assert {name: kept["model"][name] for name in config["model"]} == config["model"]
  old, new = (weights.flatten(params) for params in (first, trained))
  moved = [np.abs(old[name] - new[name]).max() for name in old]
  assert 0 < max(moved) < 0.01
  argv = ["track", videos / "0.mp4", "--weights", made, "--masks", 1, "--grid", 1, "--no-overlay"]
  assert command_line.run(capsys, *argv, "--out", tmp_path / "o")[0] == 0


def test_train_takes_the_network_and_the_parameters_of_another_runs_folder(
  capsys, tmp_path, monkeypatch, videos
):
  asked = []

  def stopped(config, workdir):
    asked.append(config)
    raise InputError("far enough")

  monkeypatch.setattr(job, "train", stopped)
  other = tmp_path / "other"
  other.mkdir()
  stored = {"task": "pretrain", "model": command_line.MODEL | {"attention_impl": "cudnn"}}
  stored["pretrain"] = {"target": "normalised"}
  (other / "config.json").write_text(json.dumps(stored))
  argv = ["train", tmp_path / "run", "--videos", videos, "--from", other]
  code, _, err = command_line.run(capsys, *argv)
  assert code == 2 and "far enough" in err, err
  (config,) = asked
  assert config.init_from == str(other) and config.pretrain.target == "normalised"
  assert config.model.encoder_width == command_line.MODEL["encoder_width"]
  assert config.model.image_hw == (32, 32) and config.model.attention_impl == ""
  (other / "config.json").write_text(json.dumps(stored | {"task": "distill"}))
  code, _, err = command_line.run(capsys, *argv)
  assert code == 2 and f"{other} holds no predictor" in err
  (other / "config.json").unlink()
  code, _, err = command_line.run(capsys, *argv)
  assert code == 2 and "is it a workdir?" in err and len(asked) == 1


def test_a_joint_training_goes_on_from_one_of_its_kind_and_has_a_pretraining_s_folder_converted(
  capsys, tmp_path, monkeypatch
):
  asked = []

  def stopped(config, workdir):
    asked.append(config.init_from)
    raise InputError("far enough")

  monkeypatch.setattr(job, "train", stopped)
  other = tmp_path / "other"
  other.mkdir()
  argv = ["train", tmp_path / "run", "--config", "joint_tiny", "--from", other]
  for task, told in {"pretrain": f"cwm-jax convert {other} FILE", "joint": "far enough"}.items():
    (other / "config.json").write_text(json.dumps({"task": task}))
    code, _, err = command_line.run(capsys, *argv)
    assert code == 2 and told in err and err.count("\n") == 1
  assert asked == [str(other)]


def test_a_run_on_videos_is_lengthened_and_keeps_what_it_was_begun_with(
  capsys, tmp_path, monkeypatch, videos, weights_path
):
  workdir, asked = tmp_path / "run", []

  def saved(config, workdir):
    checkpoint.keep_config(workdir, config.to_dict())
    (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    asked.append(config)
    raise InputError("far enough")

  workdir.mkdir()
  monkeypatch.setattr(job, "train", lambda config, folder: saved(config, Path(folder)))
  for more in (["--from", weights_path, "--steps", 100], ["--steps", 1000], []):
    code, _, err = command_line.run(capsys, "train", workdir, "--videos", videos, *more)
    assert code == 2 and "far enough" in err, err
  assert [config.total for config in asked] == ["100 steps", "1000 steps", "2000 steps"]
  assert {config.optim.warmup for config in asked} == {"10 steps"}
  assert {config.init_from for config in asked} == {str(weights_path)}


@pytest.mark.parametrize(
  "name, told",
  [
    ("eval_scenes", "cwm-jax eval"),
    ("eval_tapvid:release", "cwm-jax eval"),
    ("label", "cwm-jax label"),
    ("prepare", "cwm-jax prepare"),
    ("study_interventions", "bash launch/study"),
  ],
)
def test_a_config_that_is_no_training_is_not_trained(capsys, tmp_path, name, told):
  code, _, err = command_line.run(capsys, "train", tmp_path / "run", "--config", name)
  assert code == 2 and err == f"error: config {name} is no training; run it by {told}\n"
  assert not (tmp_path / "run").exists()


def test_only_trainings_are_offered_where_there_is_no_such_config():
  with pytest.raises(InputError, match="there is no config 'pretrain'; choose one of") as told:
    jobs.load_config("pretrain")
  offered = str(told.value).partition("one of ")[2].split(", ")
  assert {"finetune", "pretrain_tiny", "joint_tiny"} <= set(offered)
  assert not {"eval_scenes", "eval_tapvid", "label", "prepare", "study_interventions"} & {*offered}


def test_ctrl_c_saves_a_training_that_the_same_command_goes_on_with(tmp_path, weights_path, videos):
  argv = ["train", tmp_path / "run", "--videos", videos, "--from", weights_path, *_TINY]
  argv[argv.index("--steps") + 1] = 100_000
  rows = tmp_path / "run" / "metrics.jsonl"
  ready = lambda: rows.exists() and rows.stat().st_size > 0  # noqa: E731
  stdout, stderr = command_line.interrupted(ready, *argv)
  assert "the same command goes on" in stderr.splitlines()[-1]
  step = int(stderr.split("interrupted at step ")[1].split(";")[0])
  saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
  assert step in saved and step >= 1
  # What was learned so far can be used at once.
  made = tmp_path / "run" / "model.safetensors"
  assert "cwm-jax convert" in stderr and str(made) in stdout
  before, now = (weights.flatten(weights.load(path)[0]) for path in (weights_path, made))
  assert max(np.abs(before[name] - now[name]).max() for name in before) > 0


def test_a_joint_training_leaves_the_mark_it_learned_and_says_so(
  capsys, tmp_path, weights_path, monkeypatch
):
  # The config names no predictor; --from does.
  changes = {"total": "2 steps", "log.peak_tflops": 1.0}
  monkeypatch.setattr(jobs, "load_config", lambda name: joint_job.get_config("", **changes))
  argv = ["train", tmp_path / "run", "--config", "joint_tiny", "--from", weights_path, "--json"]
  code, out, err = command_line.run(capsys, *argv)
  assert code == 0, err
  made = tmp_path / "run" / "mark.safetensors"
  assert json.loads(out)["files"] == [str(made)]
  mark_files.load(made, model=command_line.MODEL)
  # Its predictor is frozen, so three times its loss's FLOPs would be too many.
  row = tiny_job.rows(tmp_path / "run")[-1]
  assert "pairs_per_second" in row and "flops_utilisation" not in row
  # It can be made again, also of a run of before a key.
  stored = checkpoint.read_config(tmp_path / "run")
  del stored["perturber"]["reach"]
  (tmp_path / "run" / checkpoint.CONFIG).write_text(json.dumps(stored))
  code, _, err = command_line.run(capsys, "convert", tmp_path / "run", tmp_path / "again")
  assert (code, err) == (0, "") and (tmp_path / "again").read_bytes() == made.read_bytes()
  # And every command that reads motion takes it.
  frames = [tmp_path / f"{i}.png" for i in range(2)]
  for i, frame in enumerate(command_line.frames(count=2)):
    viz.write_png(frames[i], frame)
  (tmp_path / "points.csv").write_text("y,x\n20.5,28.5\n11.5,40.5\n")
  found = {}
  for name, options in {"learned": ["--mark", made], "recommended": []}.items():
    argv = ["flow", *frames, "--points", tmp_path / "points.csv", "--weights", weights_path]
    argv += ["--masks", 1, *options, "--out", tmp_path / name]
    code, out, err = command_line.run(capsys, *argv)
    assert code == 0, err
    with np.load(tmp_path / name / "points.npz") as file:
      found[name] = file["confidence"]
  assert np.isfinite(found["learned"]).all()
  assert not np.array_equal(found["learned"], found["recommended"])


def test_keys_are_set_with_their_own_types():
  config = jobs.load_config("pretrain_tiny:view")
  jobs.set_keys(config, ["optim.peak_lr=0.5", "total=7 steps", "model.image_hw=(64, 32)"])
  assert (config.optim.peak_lr, config.total, config.model.image_hw) == (0.5, "7 steps", (64, 32))


@pytest.mark.parametrize(
  "setting, told",
  [
    ("optim.peek_lr=1", "no key 'optim.peek_lr': did you mean 'optim.peak_lr'"),
    ("optim.peak_lr.more=1", "no key 'optim.peak_lr.more'"),
    ("nothing=1", "no key 'nothing'"),
    ("seed", "'seed' is not KEY=VALUE"),
    ("seed=many", "seed is of type int, and 'many' is not"),
    ("optim.peak_lr='a'", "is of type float"),
    ("seed=__import__('os').getpid()", "is of type int"),
  ],
)
def test_a_setting_that_cannot_be_is_one_sentence(setting, told):
  with pytest.raises(InputError, match=told.replace("(", r"\(")):
    jobs.set_keys(jobs.load_config("finetune"), [setting])


@pytest.mark.parametrize(
  "argv, told",
  [
    (["train", "W"], "name your videos by --videos FOLDER, or a config"),
    (["train", "W", "--config", "pretrain_tine"], "there is no config 'pretrain_tine'"),
    (["train", "W", "--config", "pretrain_tiny:mtach"], "unknown stage 'mtach'"),
    (["train", "W", "--videos", "gone"], "gone"),
    (["train", "W", "--videos", "v", "--from", "gone.safetensors"], "gone.safetensors"),
    (["eval", "--tapvid", "gone"], "gone"),
    (["eval", "--trackers", "best"], "there is no tracker 'best'"),
  ],
)
def test_a_job_that_cannot_be_is_one_sentence_and_exit_code_2(
  capsys, tmp_path, monkeypatch, argv, told
):
  monkeypatch.chdir(tmp_path)
  code, out, err = command_line.run(capsys, *argv)
  assert code == 2 and told in err and err.count("\n") == 1 and err.startswith("error: ")
