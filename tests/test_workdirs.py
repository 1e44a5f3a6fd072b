"""A job's folder: what is refused, and what a second job and a full disk are told."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from pathlib import Path

import jax
import label_job
import numpy as np
import pytest
import tiny_clips
import tiny_job

from cwm_jax import cli, evaluate, label, prepare, study, train, viz, whole_files, workdirs
from cwm_jax.configs import base, eval_tapvid
from cwm_jax.data import clips, labels
from cwm_jax.pretrained import weights
from cwm_jax.types import InputError, SaveError


def _evaluate(workdir):
  config = eval_tapvid.get_config()
  config.evaluate.update(scenes=1, tapvid="", trackers=("zero",))
  return evaluate.run(config, workdir)


def _prepare(workdir):
  video = workdir / "0.mp4"
  if not video.exists():
    tiny_clips.write_video(video, 4, 0)
  how = clips.Cut(seconds=0.2, fps=10.0, short_side=24, quality=90, limit=0)
  return prepare.prepare(video, workdir, how=how)


def _study(workdir):
  return study.run(base.get_config(), workdir)


def _label(workdir):
  return label.run(label_job.get_config(), workdir)


def _train(workdir):
  return train.run(tiny_job.get_config(), workdir)


def _write_mark(workdir):
  with workdirs.telling(workdir):
    weights.write(workdir / "mark.safetensors", {"a": np.zeros(2)}, {})


def _draw(workdir):
  with workdirs.telling(workdir):
    viz.write_png(workdir / "study.png", np.zeros((2, 2, 3), np.uint8))


@pytest.fixture
def quick(monkeypatch):
  """Signs of life come often."""
  monkeypatch.setattr(workdirs, "_BEAT_S", 0.02)


@pytest.mark.parametrize("text", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run")])
def test_a_url_is_no_folder(text):
  with pytest.raises(InputError, match="gcsfuse.*MOUNT"):
    workdirs.local(text)
  assert workdirs.local("run:1/a") == Path.cwd() / "run:1" / "a"


@pytest.mark.parametrize(
  "argv", [["train", "gs://bucket/run", "--videos", "v"], ["label", "--out", "gs://bucket/run"]]
)
def test_a_url_is_refused_by_the_command_line_with_its_usage(argv, capsys):
  with pytest.raises(SystemExit) as left:
    cli.main(argv)
  assert left.value.code == 2 and "gs://bucket/run is a URL" in capsys.readouterr().err


@pytest.mark.parametrize("job", [_train, _evaluate, _label, _prepare])
def test_a_second_job_in_a_folder_is_told_which_one_uses_it(job, tmp_path, quick):
  with workdirs.held(tmp_path), pytest.raises(InputError, match=f"in use .* {os.getpid()} of "):
    job(tmp_path)


def test_a_folder_is_free_again_once_its_job_has_left(tmp_path, quick):
  with pytest.raises(KeyError), workdirs.working(tmp_path):
    raise KeyError
  with workdirs.working(tmp_path) as folder:
    assert folder == tmp_path


def test_a_lock_that_a_dead_host_left_behind_is_passed_over(tmp_path, quick, monkeypatch, caplog):
  monkeypatch.setattr(workdirs, "_DEAD_S", 0.3)
  with open(tmp_path / "lock", "w") as file:
    file.write("process 7 of another-host")
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    with caplog.at_level(logging.WARNING, logger="cwm_jax"), workdirs.held(tmp_path):
      pass
  assert "process 7 of another-host" in caplog.text


def test_a_file_system_without_locks_goes_without(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", refuse)
  with workdirs.held(tmp_path), workdirs.held(tmp_path):
    pass


@pytest.mark.parametrize("job", [_train, _evaluate, _label, _study])
def test_a_folder_that_cannot_be_written_is_a_sentence(job):
  # Not even the system's administrator makes files there.
  with pytest.raises(InputError, match="/proc cannot be written"):
    job("/proc")


@pytest.mark.parametrize("job", [_train, _evaluate, _label, _write_mark, _draw])
def test_a_disk_without_room_is_a_sentence_in_every_job(job, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(whole_files.os, "replace", full)
  with pytest.raises(SaveError, match="No space left on device.*the same command"):
    job(tmp_path)


def test_a_shard_of_labels_for_which_there_is_no_room_is_a_sentence(tmp_path):
  path = tmp_path / "shard"
  partial = f"shard.{os.getpid()}.{threading.get_ident()}.partial"
  (tmp_path / partial).symlink_to("/dev/full")
  record = dict.fromkeys(labels.FIELDS, np.zeros((4096,)))
  with pytest.raises(SaveError, match="could not be written .*make room"):
    label._write_shard(path, [record] * 8)


def test_preparing_in_several_processes_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(InputError, match="by one process"):
    prepare.run(base.get_config(), tmp_path)
