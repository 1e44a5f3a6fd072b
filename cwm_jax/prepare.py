"""The preparing job: a folder of videos into ArrayRecord shards of short clips, a TFDS dataset.

Videos are dealt to shards by their order, so a shard is the same whoever writes it and whenever. It
is written beside its place and moved there whole, with a note of what it holds; a run that is
killed writes only the shards that are not noted. The last files are `manifest.json` (counts,
hashes, what was skipped and why) and those by which TFDS knows a dataset.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from cwm_jax import supervision, whole_files, workdirs
from cwm_jax.data import clips, listing
from cwm_jax.types import InputError, SaveError, first_line

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_WORK = "unfinished"
_FRUITLESS = 3  # times that workers may end without having finished or begun anything


class _Shard(NamedTuple):
  """What a worker is told: where to write, which videos, how, and which ended a worker before."""

  folder: str
  index: int
  root: str
  videos: list[str]
  how: clips.Cut
  deadly: frozenset[str]


def run(config: Any, workdir: str | os.PathLike) -> Path:
  """Prepares what `config.prepare` asks for; see `prepare`."""
  import jax

  if jax.process_count() > 1:
    raise InputError("videos are prepared by one process, with prepare.workers of its own")
  settings = config.prepare
  how = clips.Cut(**{name: settings[name] for name in clips.Cut._fields})
  return prepare(
    settings.videos, workdir, how=how, shard_videos=settings.shard_videos, workers=settings.workers
  )


def prepare(
  videos: str | os.PathLike,
  out: str | os.PathLike,
  *,
  how: clips.Cut,
  shard_videos: int = 64,
  workers: int = 0,
) -> Path:
  """Cuts clips from videos, in `workers` processes, going on where an earlier run was ended.

  Args:
    videos: as in `listing.list_videos`.
    out: folder; the dataset is OUT/clips/1.0.0.
    how: how clips are cut.
    shard_videos: how many videos a shard takes.
    workers: processes; 0 cuts in this one.

  Returns:
    The dataset's folder, for `data.sources.tfds.data_dir` or `tfds.builder_from_directory`.

  Raises:
    InputError: settings that cannot be used, no videos, no clip in any of them, workers that do not
      begin, or an `out` that was begun with other videos or settings or is in use.
    SaveError: a shard, or what goes with it, cannot be written.
  """
  if how.frames < 2 or how.fps <= 0 or how.short_side < 1 or not 1 <= how.quality <= 95:
    raise InputError(f"clips cannot be cut like this (2 frames or more, quality 1 to 95): {how}")
  if shard_videos < 1 or workers < 0 or how.limit < 0:
    raise InputError("shard_videos is 1 or more; workers and limit are 0 or more")
  paths = listing.list_videos(videos)
  root = os.fspath(videos) if os.path.isdir(videos) else os.path.dirname(os.path.abspath(videos))
  place = workdirs.check_writable(out)
  folder = place / clips.NAME / clips.VERSION
  begun = dict(how=how._asdict(), shard_videos=shard_videos, videos=_digest(paths, root))
  with workdirs.telling(place), workdirs.held(place):
    if _is_done(folder, begun):
      log.info("%s is prepared already", folder)
    else:
      _prepare(folder, begun, paths, root, how, workers)
  return folder


def _prepare(
  folder: Path, begun: dict[str, Any], paths: list[str], root: str, how: clips.Cut, workers: int
) -> None:
  work, shard_videos = folder / _WORK, begun["shard_videos"]
  work.mkdir(parents=True, exist_ok=True)
  _begin(work / "begun.json", begun)
  # What a run that was killed was reading and writing just then.
  for left_over in (*work.glob("*.reading"), *work.glob("*.partial")):
    left_over.unlink()
  count = -(-len(paths) // shard_videos)
  shards = [
    _Shard(os.fspath(work), i, root, paths[i::count], how, frozenset()) for i in range(count)
  ]
  left = [shard for shard in shards if _stored(shard) is None]
  log.info("%d videos, %d shards, of which %d are left", len(paths), count, len(left))
  _write_all(left, workers, done=count - len(left), count=count)
  _finish(folder, [json.loads(_note(shard).read_text()) for shard in shards], begun)


def _write_all(left: list[_Shard], workers: int, *, done: int, count: int) -> None:
  """Writes shards; a video that ends the process that reads it, twice, is left out.

  Raises:
    InputError: workers end, again and again, before they read anything.
  """
  # Here, not above: workers import this module, and have no need of JAX.
  from cwm_jax.progress import format_seconds

  began, clip_count, done_before = time.monotonic(), 0, done
  waiting, suspects = collections.deque(left), collections.deque()
  deaths = collections.Counter()
  fruitless = 0
  while waiting or suspects:
    # When a worker dies, any shard in the making may be to blame: each of them is tried alone.
    batch = [suspects.popleft()] if suspects else [waiting.popleft() for _ in range(len(waiting))]
    deadly = frozenset(video for video, times in deaths.items() if times > 1)
    fruitless += 1
    for shard, note in _write_some([shard._replace(deadly=deadly) for shard in batch], workers):
      if note is not None:
        fruitless, done, clip_count = 0, done + 1, clip_count + note["clips"]
        took = max(1e-6, time.monotonic() - began)
        log.info(
          "shard %d of %d: %d clips, %.1f clips/s  eta %s",
          *(done, count, note["clips"], clip_count / took),
          format_seconds(took / (done - done_before) * (count - done)),
        )
        continue
      # A worker that is not yet ended may take its file away meanwhile.
      try:
        video = _reading(shard).read_text()
      except FileNotFoundError:
        waiting.append(shard)
        continue
      fruitless = 0
      suspects.append(shard)
      if len(batch) == 1:
        deaths[video] += 1
      # Its next worker may end before it reads anything.
      _reading(shard).unlink(missing_ok=True)
    if fruitless == _FRUITLESS:
      raise InputError(
        f"workers ended {fruitless} times before they read anything; what they said is above: a "
        'script needs `if __name__ == "__main__":` around its call, each worker memory of its own; '
        "with workers=0 there are none"
      )


def _write_some(shards: list[_Shard], workers: int):
  """Yields (shard, its note), or (shard, None) where its worker died."""
  if not workers:
    for shard in shards:
      yield shard, _write(shard)
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    min(workers, len(shards)), context, initializer=_begin_worker, initargs=(os.getpid(),)
  ) as pool:
    futures = {pool.submit(_write, shard): shard for shard in shards}
    for future in concurrent.futures.as_completed(futures):
      try:
        yield futures[future], future.result()
      except BrokenProcessPool:
        yield futures[future], None


def _begin_worker(parent: int) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
  threading.Thread(target=supervision.end_with_parent, args=(parent,), daemon=True).start()


def _write(shard: _Shard) -> dict[str, Any]:
  """Writes one shard and its note, which is returned."""
  from array_record.python.array_record_module import ArrayRecordWriter

  described = clips.features()
  note = dict(index=shard.index, clips=0, bytes=0, sha256="", sources=[], skipped=[])
  try:
    with whole_files.writing(_records(shard)) as partial:
      # One record a group: pairs are read from anywhere.
      writer = ArrayRecordWriter(os.fspath(partial), "group_size:1")
      for path in shard.videos:
        name = os.path.relpath(path, shard.root)
        _reading(shard).write_text(path)
        cut, why = 0, ""
        try:
          if path in shard.deadly:
            raise InputError("ends the process that reads it")
          for clip in clips.cut(path, shard.how):
            writer.write(clips.serialise(described, clip, name))
            cut += 1
        except InputError as error:
          why = str(error)
        note["clips"] += cut
        if cut:
          note["sources"].append(dict(path=name, clips=cut, sha256=whole_files.sha256(path)))
        if why:
          note["skipped"].append(dict(path=name, why=why, after_clips=cut))
      writer.close()
      note["bytes"], note["sha256"] = partial.stat().st_size, whole_files.sha256(partial)
    whole_files.write_json(_note(shard), note)
  # ArrayRecord tells of a full disk by a RuntimeError.
  except (OSError, RuntimeError) as error:
    reason = first_line(error)
    raise SaveError(
      f"shard {shard.index} could not be written ({reason}): make room, and the same command goes "
      "on with it"
    ) from None
  # Where a file system knows no locks, another run may have taken it away.
  _reading(shard).unlink(missing_ok=True)
  return note


def _finish(folder: Path, notes: list[dict[str, Any]], begun: dict[str, Any]) -> None:
  """Moves the shards that hold clips to their places and writes what describes them."""
  full = [note for note in notes if note["clips"]]
  skipped = [entry for note in notes for entry in note["skipped"]]
  if not full:
    raise InputError(
      f"not one clip could be cut; of {len(skipped)} videos the first one: {skipped[0]['path']} "
      f"{skipped[0]['why']}"
    )
  shards = []
  for place, note in enumerate(full):
    name = clips.shard_name(place, len(full))
    written = folder / _WORK / f"{note['index']:05d}.array_record"
    if written.exists():  # else an earlier run got so far
      os.replace(written, folder / name)
    shards.append(dict(file=name, **{key: note[key] for key in ("clips", "bytes", "sha256")}))
  manifest = dict(
    clips=sum(shard["clips"] for shard in shards),
    bytes=sum(shard["bytes"] for shard in shards),
    videos=sum(len(note["sources"]) for note in notes),
    settings=begun,
    shards=shards,
    skipped=skipped,
    sources=[source for note in notes for source in note["sources"]],
  )
  whole_files.write_json(folder / MANIFEST, manifest)
  clips.describe(folder, [shard["clips"] for shard in shards], manifest["bytes"])
  shutil.rmtree(folder / _WORK)
  log.info(
    "%d clips of %d videos in %s; %d left out or cut short, see %s",
    *(manifest["clips"], manifest["videos"], folder, len(skipped), MANIFEST),
  )


def _is_done(folder: Path, begun: dict[str, Any]) -> bool:
  """Whether the dataset is there already. Raises InputError when it is another one."""
  if not (folder / "dataset_info.json").exists():
    return False
  try:
    same = json.loads((folder / MANIFEST).read_text())["settings"] == begun
  except (OSError, ValueError, KeyError):
    same = False
  if not same:
    raise InputError(f"{folder} holds a dataset of other videos or settings; take another folder")
  shutil.rmtree(folder / _WORK, ignore_errors=True)
  return True


def _begin(path: Path, begun: dict[str, Any]) -> None:
  """Notes what is prepared here. Raises InputError when that is something else."""
  if path.exists():
    try:
      stored = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
      raise InputError(
        f"{path} is damaged, so it cannot be told what was begun there: delete "
        f"{path.parent.parent} and give the same command again"
      ) from None
    changed = [key for key in begun if stored.get(key) != begun[key]]
    if changed:
      raise InputError(
        f"{path.parent.parent} was begun with other {', '.join(changed)}; take another folder"
      )
    return
  whole_files.write_json(path, begun)


def _digest(paths: list[str], root: str) -> str:
  """Of the names and sizes of all videos, in order."""
  told = hashlib.sha256()
  for path in paths:
    size = os.path.getsize(path) if os.path.exists(path) else -1
    told.update(f"{os.path.relpath(path, root)}\0{size}\0".encode())
  return told.hexdigest()


def _stored(shard: _Shard) -> dict[str, Any] | None:
  """A shard's note; None where the shard must be written, or written again after a power cut."""
  try:
    return json.loads(_note(shard).read_text())
  except (OSError, ValueError):
    return None


def _records(shard: _Shard) -> Path:
  return Path(shard.folder) / f"{shard.index:05d}.array_record"


def _note(shard: _Shard) -> Path:
  return Path(shard.folder) / f"{shard.index:05d}.json"


def _reading(shard: _Shard) -> Path:
  """Names the video that is being read, while it is."""
  return Path(shard.folder) / f"{shard.index:05d}.reading"
