"""Videos made into a dataset: what it holds, killed and gone on with, damaged while it is read."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_clips
import tiny_job

from cwm_jax import prepare
from cwm_jax.data import clips
from cwm_jax.data.tfds_source import TfdsSource
from cwm_jax.types import InputError

HOW = clips.Cut(seconds=0.2, fps=10.0, short_side=24, quality=90, limit=0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  """Seven videos of 4 frames (2 clips each), one with a single frame, one that is none."""
  folder = tmp_path_factory.mktemp("videos")
  for i in range(7):
    tiny_clips.write_video(folder / f"{i}.mp4", 4, 20 * i)
  tiny_clips.write_video(folder / "7.mp4", 1, 0)
  (folder / "8.mp4").write_text("not a video")
  return folder


def run(videos, out, **settings):
  return prepare.prepare(videos, out, how=HOW, **{"shard_videos": 3, **settings})


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
  return run(videos, tmp_path_factory.mktemp("whole"))


def files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tfds_reads_every_clip_and_the_source_of_pairs_too(whole):
  data = tfds.data_source("clips", data_dir=str(whole.parent.parent), split="train")
  assert len(data) == 14
  found = sorted((data[i]["source"].decode(), round(data[i]["start_s"], 6)) for i in range(14))
  assert found == [(f"{i}.mp4", start) for i in range(7) for start in (0.0, 0.2)]
  source = TfdsSource("", data_dir=str(whole), image_hw=(24, 32), seed=0, crop="centre", flip=False)
  # A pair is the two frames of a clip: 10 grey levels apart.
  frames = source.example(0, 5)["frames"].astype(int)
  assert abs(np.median(frames[1] - frames[0]) - 10) <= 2
  assert len(tfds.builder_from_directory(str(whole)).as_data_source(split="train[:50%]")) == 7


def test_each_shard_tells_how_long_the_rest_will_take(caplog, monkeypatch):
  note = {"clips": 5}
  monkeypatch.setattr(prepare, "_write_some", lambda shards, _: ((shard, note) for shard in shards))
  clock = itertools.count(0, 10)
  monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=lambda: next(clock)))
  caplog.set_level(logging.INFO, "cwm_jax.prepare")
  # One of four was there before.
  left = [prepare._Shard("", i, "", [], HOW, frozenset()) for i in (1, 2, 3)]
  prepare._write_all(left, 0, done=1, count=4)
  assert [record.message for record in caplog.records if record.name == "cwm_jax.prepare"] == [
    "shard 2 of 4: 5 clips, 0.5 clips/s  eta 0:20",
    "shard 3 of 4: 5 clips, 0.5 clips/s  eta 0:10",
    "shard 4 of 4: 5 clips, 0.5 clips/s  eta 0:00",
  ]


def test_the_manifest_counts_hashes_and_tells_what_was_skipped_and_why(whole, videos):
  manifest = json.loads((whole / "manifest.json").read_text())
  assert (manifest["clips"], manifest["videos"]) == (14, 7)
  assert sum(shard["clips"] for shard in manifest["shards"]) == 14
  for shard in manifest["shards"]:
    data = (whole / shard["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == shard["sha256"] and len(data) == shard["bytes"]
  for source in manifest["sources"]:
    video = (videos / source["path"]).read_bytes()
    assert source["clips"] == 2 and hashlib.sha256(video).hexdigest() == source["sha256"]
  why = {entry["path"]: entry["why"] for entry in manifest["skipped"]}
  assert why.keys() == {"7.mp4", "8.mp4"}
  assert "lasts 0.10 s" in why["7.mp4"] and "8.mp4" in why["8.mp4"]


# Prepares without workers; is killed as by `kill -9` in the middle of the second shard.
KILLED = """
import os, signal, sys
from cwm_jax.data import clips
import test_prepare

cut, count = clips.cut, []

def cut_or_die(path, how):
  count.append(1)
  if len(count) == 5:
    os.kill(os.getpid(), signal.SIGKILL)
  return cut(path, how)

clips.cut = cut_or_die
test_prepare.run(*sys.argv[1:])
"""


def test_a_run_killed_in_a_shard_goes_on_to_the_same_files(whole, videos, tmp_path):
  killed = tiny_job.run_script(KILLED, str(videos), str(tmp_path))
  assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
  work = tmp_path / "clips" / "1.0.0" / "unfinished"
  assert {path.name for path in work.glob("*.json")} == {"begun.json", "00000.json"}
  kept = (work / "00000.array_record").stat().st_mtime_ns
  folder = run(videos, tmp_path)
  assert files(folder) == files(whole)
  first = folder / "clips-train.array_record-00000-of-00003"
  assert first.stat().st_mtime_ns == kept  # not written again
  # Nothing is left to do, and nothing is done.
  before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
  run(videos, tmp_path)
  assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


# Prepares with two workers. The first time, the one that comes to the third shard has their parent
# killed as by `kill -9`; a worker comes to it when another shard is done.
PARALLEL = """
import os, signal, sys, time
from cwm_jax.data import clips
import test_prepare

cut = clips.cut

def cut_or_kill(path, how):
  killed = os.path.join(os.path.dirname(__file__), "killed")
  if path.endswith("5.mp4") and not os.path.exists(killed):
    open(killed, "w").close()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)  # what is left without its parent ends by itself, sooner
  return cut(path, how)

clips.cut = cut_or_kill
if __name__ == "__main__":
  test_prepare.run(*sys.argv[1:], workers=2)
"""


def run_file(script, *arguments):
  """Runs a file of Python to its end, and that of all processes it started."""
  return subprocess.run(
    [sys.executable, str(script), *map(str, arguments)],
    env=tiny_job.environment(),
    capture_output=True,
    text=True,
    timeout=200,
  )


def test_two_workers_killed_with_their_parent_go_on_to_the_same_files(whole, videos, tmp_path):
  script, out = tmp_path / "parallel.py", tmp_path / "out"  # workers import it anew
  script.write_text(PARALLEL)
  killed = run_file(script, videos, out)
  assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
  work = out / "clips" / "1.0.0" / "unfinished"
  noted = sorted(path.stem for path in work.glob("0*.json"))
  assert noted and "00002" not in noted and list(work.glob("00002.array_record.*.partial"))
  kept = {name: (work / f"{name}.array_record").stat().st_mtime_ns for name in noted}
  again = run_file(script, videos, out)
  assert again.returncode == 0, again.stderr[-2000:]
  folder = out / "clips" / "1.0.0"
  assert files(folder) == files(whole)
  for name, written in kept.items():  # not written again
    assert (folder / clips.shard_name(int(name), 3)).stat().st_mtime_ns == written


def test_a_note_that_a_power_cut_left_short_is_as_none_and_its_shard_is_written_again(
  whole, videos, tmp_path, monkeypatch
):
  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(prepare, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
      run(videos, tmp_path)
  work = tmp_path / "clips" / "1.0.0" / "unfinished"
  for name, left in (("00000", ""), ("00001", (work / "00001.json").read_text()[:40])):
    (work / f"{name}.json").write_text(left)
    (work / f"{name}.array_record").write_bytes(b"")
  assert files(run(videos, tmp_path)) == files(whole)
  # Without what was begun, no shard can be told from another dataset's.
  damaged = tmp_path / "other" / "clips" / "1.0.0" / "unfinished" / "begun.json"
  damaged.parent.mkdir(parents=True)
  damaged.write_text('{"how": {')
  with pytest.raises(InputError, match="begun.json is damaged"):
    run(videos, tmp_path / "other")


def test_what_gets_its_name_is_on_the_disk_first(videos, tmp_path, monkeypatch):
  synced, named, replace, fsync = set(), [], os.replace, os.fsync

  def sync(descriptor):
    synced.add(os.fstat(descriptor).st_ino)
    fsync(descriptor)

  def rename(old, new):
    named.append((os.path.basename(new), os.stat(old).st_ino in synced))
    replace(old, new)

  monkeypatch.setattr(os, "fsync", sync)
  monkeypatch.setattr(os, "replace", rename)
  run(videos / "0.mp4", tmp_path)
  first = dict(reversed(named))  # as it was named at first; a shard is moved once more
  for name in ("begun.json", "00000.array_record", "00000.json", "manifest.json"):
    assert first[name], name


# Prepares with two workers, of which any that reads 4.mp4 dies as of a fault in a decoder.
DEADLY = """
import os, signal, sys
from cwm_jax.data import clips
import test_prepare

cut = clips.cut

def cut_or_die(path, how):
  if path.endswith("4.mp4"):
    os.kill(os.getpid(), signal.SIGSEGV)
  return cut(path, how)

clips.cut = cut_or_die
if __name__ == "__main__":
  test_prepare.run(*sys.argv[1:], workers=2)
"""


def test_workers_write_the_same_and_a_video_that_ends_them_is_left_out_by_name(
  whole, videos, tmp_path
):
  script = tmp_path / "deadly.py"  # workers import it anew
  script.write_text(DEADLY)
  done = run_file(script, videos, tmp_path / "out")
  assert done.returncode == 0, done.stderr[-3000:]
  folder = tmp_path / "out" / "clips" / "1.0.0"
  manifest = json.loads((folder / "manifest.json").read_text())
  why = {entry["path"]: entry["why"] for entry in manifest["skipped"]}
  assert why["4.mp4"] == "ends the process that reads it" and manifest["clips"] == 12
  same = {
    name: data
    for name, data in files(whole).items()
    if "array_record" in name and name[-14:-9] != "00001"  # 4.mp4 is of the second shard
  }
  assert len(same) == 2 and same.items() <= files(folder).items()


def workers_that(monkeypatch, *ends):
  """Workers end as told, round by round: before they read, or while they read; then they work."""
  rounds = iter(ends)

  def write_some(shards, workers):
    for shard in shards:
      end = next(rounds, "works")
      assert end != "too often"
      if end == "while reading":
        prepare._reading(shard).write_text(shard.videos[0])
      yield shard, prepare._write(shard) if end == "works" else None

  monkeypatch.setattr(prepare, "_write_some", write_some)


def test_workers_that_end_before_they_begin_are_not_started_for_ever(videos, tmp_path, monkeypatch):
  workers_that(monkeypatch, *["before"] * 3, "too often")
  with pytest.raises(InputError, match="3 times before they read anything.*__main__"):
    run(videos / "0.mp4", tmp_path, workers=1)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_good_video_is_not_blamed_for_workers_that_end_before_they_read_it(
  videos, tmp_path, monkeypatch, earlier
):
  video, work = str(videos / "0.mp4"), tmp_path / "clips" / "1.0.0" / "unfinished"
  if earlier:
    # Left by a run that was killed.
    work.mkdir(parents=True)
    (work / "00000.reading").write_text(video)
  workers_that(monkeypatch, "before" if earlier else "while reading", "before")
  manifest = json.loads((run(video, tmp_path, workers=1) / "manifest.json").read_text())
  assert manifest["clips"] == 2 and not manifest["skipped"]


def test_other_videos_or_settings_do_not_mix_with_what_is_there(whole, videos):
  with pytest.raises(InputError, match="other videos or settings"):
    prepare.prepare(videos, whole.parent.parent, how=HOW._replace(fps=20.0), shard_videos=3)


def test_an_unfinished_run_with_other_settings_is_refused_by_name(videos, tmp_path):
  work = tmp_path / "clips" / "1.0.0" / "unfinished"
  work.mkdir(parents=True)
  (work / "begun.json").write_text(json.dumps({"how": {}, "shard_videos": 3}))
  with pytest.raises(InputError, match="begun with other how, videos"):
    run(videos, tmp_path)


def test_videos_without_a_single_clip_end_with_a_sentence(tmp_path):
  (tmp_path / "a.mp4").write_text("not a video")
  with pytest.raises(InputError, match=r"not one clip could be cut; of 1 videos"):
    run(tmp_path, tmp_path / "out")
  with pytest.raises(InputError, match="cannot be cut like this"):
    prepare.prepare(tmp_path, tmp_path / "out", how=HOW._replace(seconds=0.1))


def test_a_shard_that_turns_to_garbage_or_vanishes_in_an_epoch_is_passed_over(whole, tmp_path):
  folder = tmp_path / "clips" / "1.0.0"
  shutil.copytree(whole, folder)
  shards = sorted(folder.glob("*.array_record*"))
  for spoil in (lambda: shards[0].write_bytes(bytes(shards[0].stat().st_size)), shards[0].unlink):
    source = TfdsSource(
      "", data_dir=str(folder), image_hw=(24, 32), seed=0, crop="none", flip=False
    )
    good = source.example(0, 13)["frames"]
    spoil()
    passed = [int(source.example(position, 0)["skipped"]) for position in range(4)]
    assert max(passed) > 0
    np.testing.assert_array_equal(source.example(0, 13)["frames"], good)
    shutil.copy(whole / shards[0].name, shards[0])
