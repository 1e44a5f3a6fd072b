"""The labelling job: a tracker is asked about points of many pairs, and its answers are kept.

A shard is one stretch of the source's pairs. It appears in the workdir whole, under its last name,
or not at all, so that a job that was killed goes on with the shards that are missing: no pair is
lost and none is there twice. Processes take every n-th shard and write to one workdir, which all of
them see.

The workdir holds the shards, with each one's numbers beside it as JSON; manifest.json; metrics and
pictures of samples, of the first process's shards.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import (
  checkpoint,
  label_answers,
  leaving,
  processes,
  viz,
  whole_files,
  workdirs,
  writers,
)
from cwm_jax.data import labels, loader, rendering
from cwm_jax.evals import named, spread
from cwm_jax.progress import format_seconds
from cwm_jax.types import InputError, SaveError, first_line

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)

_PICTURED = 4  # pairs of a shard that are drawn
_SHOWN = 256  # pixels a side that they are enlarged to, at least
# Keys of the config that decide no label.
_FREE = {
  "label": ("pictures_every",),
  "data": ("num_workers", "prefetch"),
  "evaluate": ("memory_budget",),
}
# Numbers of a shard that are means over its points or pairs; "consistent" where that was asked.
_MEANS = ("confidence", "moved_px", "visible", "sure", "consistent", "kept")

Record = dict[str, Any]


def run(config: Any, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Labels `config.label.pairs` pairs of the sources of `config.data`, where that is not yet done.

  Args:
    config: see `configs/base.py`, sections `label`, `evaluate` (how the tracker asks) and `data`,
      whose batch is what the tracker is handed at a time.
    workdir: for shards, manifest, metrics and pictures.

  Returns:
    The manifest: settings, shards and numbers over all points; with `complete` False where SIGTERM
    came before the end. A process that it reached finishes no shard, and waits for the others.

  Raises:
    InputError: settings, sources or a tracker that cannot be, or a workdir that cannot be used,
      such as one of another job.
    SaveError: the workdir can no longer be written.
  """
  with workdirs.working(workdir) as folder:
    return _label(config, folder)


def _label(config: Any, workdir: Path) -> dict[str, Any]:
  job = _Job(config, workdir)
  with leaving.Leaving() as leave:
    job.work(leave)
  processes.meet()
  manifest = _manifest(workdir, job.settings, job.shards)
  # A network's file system may show one process less than another.
  manifest["complete"] = not processes.any_process(not manifest["complete"])
  if jax.process_index() == 0:
    whole_files.write_json(workdir / MANIFEST, manifest)
  return manifest


class _Job:
  """What stays the same from shard to shard."""

  def __init__(self, config: Any, workdir: Path):
    label = config.label
    self._config, self._label, self._workdir = config, label, workdir
    self.settings = _settings(config)
    spread.check_same(self.settings["origin"], what="weights")
    if min(label.pairs, label.points, label.shard_pairs) < 1:
      raise InputError("label.pairs, label.points and label.shard_pairs are 1 or more")
    side = math.isqrt(label.points)
    if label.marks < 1 or (label.marks > 1 and side * side != label.points):
      raise InputError(
        f"label.marks is {label.marks} and label.points {label.points}; with several marks points "
        "lie on a square grid, such as 1024"
      )
    labels.check_round_trip_limit(label.max_round_trip, asked=label.round_trip)
    if label.shard_pairs % config.data.batch_size:
      raise InputError(
        f"label.shard_pairs is {label.shard_pairs}, which is no multiple of data.batch_size, "
        f"{config.data.batch_size}"
      )
    self.shards = -(-label.pairs // label.shard_pairs)
    _check_settings(workdir / MANIFEST, self.settings)
    if jax.process_index() == 0:
      whole_files.write_json(workdir / MANIFEST, _manifest(workdir, self.settings, self.shards))

  def work(self, leave: leaving.Leaving) -> None:
    """Makes this process's missing shards."""
    mine = list(spread.my_share(self.shards))
    for number in mine:
      _drop_if_cut_short(self._path(number))
    lost = [n for n in range(self.shards) if _stored_numbers(self._path(n)) is None]
    missing = sorted(set(mine) & set(lost))
    log.info("%d of this process's %d shards are missing", len(missing), len(mine))
    if not missing:
      return
    workers = named.build(self._label.tracker, self._config.evaluate)
    if self._label.marks > 1 and not hasattr(workers[0], "flow_grid"):
      raise InputError(
        f"{self._label.tracker} paints no marks, or evaluate.tracker_protocol is 'release': set "
        "label.marks to 1"
      )
    render = _make_render(self._config)
    # Random access: every process can read every batch.
    data = loader.make_loader(
      self._config.data, image_hw=tuple(self._label.image_hw), seed=self._config.seed
    )
    # Shard n is step n + 1. Rows of what is there stay, also of shards that other processes made.
    writer = writers.create(
      self._workdir,
      just_logging=jax.process_index() > 0,
      resume_step=lost[0],
      done={n + 1 for n in set(range(lost[0], self.shards)) - set(lost)},
    )
    began, done = time.monotonic(), 0
    to_do = sum(len(self._stretch(number)) for number in missing)
    try:
      for count, number in enumerate(missing):
        records = self._label_shard(number, data, render, workers, leave)
        if records is None:
          log.info("left by SIGTERM; the same command goes on")
          return
        done += len(records)
        rate = done / (time.monotonic() - began)
        numbers = _numbers(records, self._label) | {"pairs_per_second": rate}
        # The numbers first: a shard that is there has them beside it.
        path = self._path(number)
        whole_files.write_json(path.with_suffix(".json"), numbers)
        _write_shard(path, records)
        filters = [name for name in ("sure", "consistent") if name in numbers]
        log.info(
          "shard %d/%d  %.2f pairs/s  eta %s  kept %.0f%% (%s)",
          *(number + 1, self.shards, rate, format_seconds((to_do - done) / rate)),
          100 * numbers["kept"],
          ", ".join(f"{name} {100 * numbers[name]:.0f}%" for name in filters),
        )
        skipped = {"skipped_items": data.skipped()}
        writer.write_scalars(number + 1, {k: float(v) for k, v in numbers.items()} | skipped)
        if jax.process_index() == 0:
          whole_files.write_json(
            self._workdir / MANIFEST, _manifest(self._workdir, self.settings, self.shards)
          )
          if self._label.pictures_every and count % self._label.pictures_every == 0:
            sheets = np.stack([_picture(record, self._label) for record in records[:_PICTURED]])
            writers.write_pictures(writer, self._workdir, number + 1, {"labels": sheets})
        writer.flush()
    finally:
      writer.close()
      data.close()

  def _path(self, number: int) -> Path:
    return self._workdir / labels.shard_name(number, self.shards)

  def _stretch(self, number: int) -> range:
    """The places in the source of a shard's pairs."""
    size = self._label.shard_pairs
    return range(number * size, min((number + 1) * size, self._label.pairs))

  def _label_shard(
    self, number: int, data: Any, render: Any, workers: list[Any], leave: leaving.Leaving
  ) -> list[Record] | None:
    """The records of a shard, or None where it is time to leave."""
    stretch, size = self._stretch(number), self._config.data.batch_size
    first = stretch.start // size
    if data.get_state()["next_batch"] != first:
      data.set_state({"next_batch": first, "skipped": data.skipped()})
    counts = [min(size, stretch.stop - start) for start in stretch[::size]]
    pairs = [np.asarray(render(_on_device(next(data))))[:count] for count in counts]

    def ask(worker: Any, batch: int) -> list[Record] | None:
      # One signal reaches one process: shards are its own, so it may leave without the others.
      if leave.signalled:
        return None
      start = stretch.start + batch * size
      return list(
        label_answers.records(worker, pairs[batch], start, self._label, self._config.seed)
      )

    found = dict(spread.work_through(ask, range(len(pairs)), workers))
    if leave.signalled:
      return None
    return [record for batch in range(len(pairs)) for record in found[batch]]


def kept(record: Record, label: Any) -> dict[str, np.ndarray]:
  """Which points pass the filters of `config.label`: {filter: bool [N]}, all of them as "kept".

  Raises:
    InputError: a limit of the way back, for which the record's points were not asked.
  """
  passed = {
    "visible": np.asarray(record["visible"]),
    "sure": record["confidence"] >= label.min_confidence,
  }
  asked = labels.asked_back(record)
  labels.check_round_trip_limit(label.max_round_trip, asked=asked)
  if asked:
    passed["consistent"] = record["round_trip"] <= label.max_round_trip
  return passed | {"kept": np.logical_and.reduce(list(passed.values()))}


def _numbers(records: list[Record], label: Any) -> dict[str, float]:
  """Means over a shard, and how many pairs and points it has."""
  rows = [
    {
      "confidence": record["confidence"].mean(),
      "moved_px": np.linalg.norm(record["flow_xy"], axis=-1).mean(),
      **{name: passed.mean() for name, passed in kept(record, label).items()},
    }
    for record in records
  ]
  means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
  return means | {"pairs": len(records), "points": sum(len(r["points_xy"]) for r in records)}


def _make_render(config: Any) -> Any:
  """A jitted function from a batch to pairs uint8 [B, 2, H, W, 3]."""
  scenes = config.data.sources.scenes

  @jax.jit
  def render(batch):
    pair = rendering.render_batch(
      batch,
      size_hw=tuple(config.label.image_hw),
      texture_size=scenes.texture_size,
      supersample=scenes.supersample,
    )
    return jnp.round(pair.frames * 255).astype(jnp.uint8)

  return render


def _on_device(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """What the renderer reads of a batch."""
  return {k: v for k, v in batch.items() if k == "frames" or k.startswith("scene/")}


def _write_shard(path: Path, records: list[Record]) -> None:
  """Writes a shard whole, whoever else may be writing it.

  A kill leaves what was written so far under a name that nobody reads; it stays there, for whether
  its writer lives on another machine cannot be told.

  Raises:
    SaveError: there is no room.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  with whole_files.writing(path) as partial:
    encoded = [labels.encode(record) for record in records]
    try:
      writer = ArrayRecordWriter(os.fspath(partial), "group_size:1")
      for record in encoded:
        writer.write(record)
      writer.close()
    # This is how it tells of a full disk.
    except RuntimeError as error:
      reason = first_line(error)
      raise SaveError(
        f"{path} could not be written ({reason}): make room, and the same command goes on with it"
      ) from None


def _drop_if_cut_short(path: Path) -> None:
  """Removes a shard that does not hold as many records as its numbers say: it is made again."""
  numbers = _stored_numbers(path)
  if numbers is None:
    return
  try:
    whole = labels.count_records(path) == numbers["pairs"]
  except InputError:
    whole = False
  if not whole:
    log.warning("%s is damaged and is made again", path)
    path.unlink(missing_ok=True)


def _settings(config: Any) -> dict[str, Any]:
  """What decides the labels and what is said of them, JSON-ready."""
  whole = json.loads(json.dumps(config.to_dict()))
  # These may change where a job goes on.
  for section, keys in _FREE.items():
    for key in keys:
      del whole[section][key]
  sections = {key: whole[key] for key in ("label", "data", "evaluate", "seed")}
  return sections | {"origin": named.origin(config.label.tracker, config.evaluate)}


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
  """Raises InputError where a workdir holds shards of another job."""
  if not path.is_file() or not any(path.parent.glob("*.arrayrecord")):
    return
  try:
    stored = checkpoint.flat({"evaluate": named.BEFORE_KEYS})
    stored |= checkpoint.flat(json.loads(path.read_text())["settings"])
  except (ValueError, KeyError, TypeError, AttributeError):
    raise InputError(f"{path} is damaged; delete it or take another workdir") from None
  now = checkpoint.flat(settings)
  changed = sorted(key for key in stored | now if stored.get(key) != now.get(key))
  if changed:
    told = ", ".join(changed)
    raise InputError(f"{path} is of a job with other settings ({told}); take another workdir")


def _stored_numbers(path: Path) -> dict[str, Any] | None:
  """What is said of a shard; None where it must be made, or made again after a power cut."""
  try:
    numbers = json.loads(path.with_suffix(".json").read_text()) if path.exists() else None
    return None if numbers is None else whole_files.with_nan(numbers)
  except (OSError, ValueError):
    return None


def _manifest(workdir: Path, settings: dict[str, Any], shards: int) -> dict[str, Any]:
  """What is there: settings, {shard: its numbers}, and the same over all points."""
  found = {}
  for number in range(shards):
    path = workdir / labels.shard_name(number, shards)
    numbers = _stored_numbers(path)
    if numbers is not None:
      found[path.name] = numbers
  points = [numbers["points"] for numbers in found.values()]
  asked = settings["label"]["round_trip"]
  overall = {
    name: float(np.average([n[name] for n in found.values()], weights=points)) if found else None
    for name in _MEANS
    if asked or name != "consistent"
  }
  return {
    "complete": len(found) == shards,
    "fields": labels.FIELDS,
    "pairs": sum(numbers["pairs"] for numbers in found.values()),
    "points": sum(points),
    "overall": overall,
    "shards": found,
    "settings": settings,
  }


def _picture(record: Record, label: Any) -> np.ndarray:
  """[h, 2 w, 3]: frame 1 with the points, frame 2 with the answers, hollow where filtered out."""
  h, w = record["pair"].shape[1:3]
  scale = -(-_SHOWN // min(h, w))
  first, second = (viz.resized(frame, (h * scale, w * scale)) for frame in record["pair"])
  points, passed = record["points_xy"] * scale, kept(record, label)["kept"]
  there = points + record["flow_xy"] * scale
  drawn = [
    viz.draw_points(first, points, visible=passed),
    viz.draw_points(second, there, visible=passed, from_xy=points),
  ]
  return np.concatenate(drawn, axis=1) / np.float32(255)
