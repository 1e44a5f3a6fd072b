"""The evaluation job: the trackers a config names, on the data it names, as one table a data set.

What is done is kept in WORKDIR/results.json, and TAP-Vid's answers clip by clip beside it, so that
an interrupted evaluation goes on where it was. Several processes share out clips, scenes, pairs and
points; the prediction of frame 2, a few passes, is measured by each of them. The first one writes.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cwm_jax import processes, whole_files, workdirs, writers
from cwm_jax.data import tapvid_pickles
from cwm_jax.evals import (
  flow,
  named,
  prediction,
  scenes,
  segments,
  spread,
  tapvid_job,
  tapvid_report,
)
from cwm_jax.types import InputError

RESULTS = "results.json"
_LOG = logging.getLogger(__name__)
_POINTS = tapvid_report.COLUMNS[:3]
_SCENES = (
  *_POINTS,
  ("MD/zero", "median_ratio", False),
  ("moving MD", "moving/median_distance", False),
  ("exchanged MD", "exchanged/median_distance", False),
  ("chance MD", "chance/median_distance", False),
)
_TAPVID = (
  *((head, f"pooled/{name}", fraction) for head, name, fraction in _POINTS),
  *((f"{head} (mean)", f"mean/{name}", part) for head, name, part in tapvid_report.COLUMNS),
  ("left out", "num_skipped", False),
)
_PREDICTION = (
  ("loss", "loss", False),
  ("copying's", "copy/loss", False),
  ("ratio", "loss_ratio", False),
  ("PSNR dB", "psnr", False),
  ("copying's dB", "copy/psnr", False),
)
_SEGMENTS = (
  ("IoU %", "iou", True),
  ("disc's", "disc/iou", True),
  ("ratio", "iou_ratio", False),
  ("at its size", "sized/iou", True),
  ("picture %", "share", True),
  ("movers' %", "truth/share", True),
)
# What is evaluated may grow from one run to the next; how may not change.
_MAY_GROW = ("trackers", "protocols", "tapvid", "flow_pairs", "overlays")
_MAY_GROW += ("scenes", "prediction", "segments")


class _Job(NamedTuple):
  """A data set: its table's columns, its rows, what measures a row, and pictures of all rows.

  rows: {row: of whose answers it is made}, see `named.origin`.
  """

  columns: Iterable[tuple[str, str, bool]]
  rows: Mapping[str, str]
  measure: Callable[[str], dict[str, float]]
  figures: Callable[[Sequence[str]], dict[str, np.ndarray]] = lambda rows: {}


def run(config: Any, workdir: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, float]]]:
  """Evaluates what `config.evaluate` asks for and prints a table for each data set.

  Args:
    config: see `configs/base.py`, section `evaluate`.
    workdir: for results.json, answers, reports and metrics.

  Returns:
    {data set: {tracker: {number: value}}}; fractions as fractions.

  Raises:
    InputError: nothing to evaluate, data or trackers that cannot be had, or a workdir that cannot
      be used, such as one that holds results of other settings.
    SaveError: the workdir can no longer be written.
  """
  # What is done is told by process 0; answers are kept by whoever gave them.
  with workdirs.working(workdir, shared=False) as folder:
    return _evaluate(config.evaluate, folder)


def _evaluate(settings: Any, workdir: Path) -> dict[str, dict[str, dict[str, float]]]:
  jobs = _jobs(settings, workdir)
  if not any(job.rows for job in jobs.values()):
    raise InputError(
      "nothing to evaluate: set evaluate.trackers, and scenes, tapvid, flow_pairs, prediction or "
      "segments"
    )
  stored = _Stored(workdir / RESULTS, settings.to_dict())
  # What is stored is not measured again, unless of other weights.
  most = max(len(job.rows) for job in jobs.values())
  writer = writers.create(workdir, just_logging=jax.process_index() > 0, resume_step=most)
  for data_set, job in jobs.items():
    for step, (name, origin) in enumerate(job.rows.items()):
      if stored.holds(data_set, name, origin):
        continue
      _LOG.info("%s: %s", data_set, name)
      started = time.monotonic()
      numbers = job.measure(name)
      numbers["seconds"] = time.monotonic() - started
      stored.add(data_set, name, numbers, origin)
      known = {k: v for k, v in numbers.items() if not math.isnan(v)}
      writer.write_scalars(step, {f"{data_set}/{name}/{k}": v for k, v in known.items()})
    if jax.process_index() == 0:
      pictures = {name: picture[None] for name, picture in job.figures(tuple(job.rows)).items()}
      writer.write_images(len(job.rows), pictures)
      print(f"\n{data_set}\n{table(stored.numbers[data_set], job.columns, job.rows)}", flush=True)
  writer.flush()
  writer.close()
  return stored.numbers


def table(
  rows: dict[str, dict[str, float]],
  columns: Iterable[tuple[str, str, bool]],
  order: Iterable[str],
) -> str:
  """A data set's rows and how long they took; see `tapvid_report.table`."""
  columns = [*columns, ("seconds", "seconds", False)]
  return tapvid_report.table({name: rows[name] for name in order}, columns)


class _Stored:
  """results.json: the settings it was made with, {data set: {tracker: numbers}}, and origins.

  A number that is not known is null in the file and NaN here. A tracker's origin (see
  `named.origin`) tells whether a file of the same name is the same file.
  The first process reads and writes the file; all processes hold the same numbers.
  """

  def __init__(self, path: Path, settings: dict[str, Any]):
    self._path = path
    self._settings = json.loads(json.dumps(settings))
    found = json.loads(processes.of_first_process(json.dumps(self._read()).encode()))
    if "error" in found:
      raise InputError(found["error"])
    self.numbers: dict[str, dict[str, dict[str, float]]] = found["numbers"]
    self._origins: dict[str, dict[str, str]] = found["origins"]
    self._write()

  def holds(self, data_set: str, tracker: str, origin: str) -> bool:
    """Whether a row is there, of these very weights; says where it is of others."""
    if tracker not in self.numbers.get(data_set, {}):
      return False
    if self._origins.get(data_set, {}).get(tracker, "") == origin:
      return True
    _LOG.warning(
      "%s: the stored numbers of %s are not of these weights; it is measured again",
      data_set,
      tracker,
    )
    return False

  def add(self, data_set: str, tracker: str, numbers: dict[str, float], origin: str) -> None:
    self.numbers.setdefault(data_set, {})[tracker] = numbers
    self._origins.setdefault(data_set, {})[tracker] = origin
    self._write()

  def _read(self) -> dict[str, Any]:
    if not self._path.is_file():
      return {"numbers": {}, "origins": {}}
    try:
      found = json.loads(self._path.read_text())
      settings = named.BEFORE_KEYS | found["settings"]
      # Results from before origins were noted have none.
      numbers, origins = (
        {name: dict(rows) for name, rows in part.items()}
        for part in (found["numbers"], found.get("origins", {}))
      )
    except (ValueError, KeyError, TypeError, AttributeError):
      return {"error": f"{self._path} is damaged; delete it or take another folder"}
    changed = [k for k in settings if settings[k] != self._settings.get(k) and k not in _MAY_GROW]
    changed += [k for k in self._settings if k not in settings and k not in _MAY_GROW]
    # A folder may be added to those evaluated, but answers about one are not those about another.
    for key in ("tapvid", "flow_pairs"):
      if settings.get(key) and self._settings[key] and settings[key] != self._settings[key]:
        changed.append(key)
    if changed:
      return {
        "error": f"{self._path} holds results with other settings ({', '.join(changed)}); "
        "take another folder"
      }
    for key in ("tapvid", "flow_pairs"):
      self._settings[key] = self._settings[key] or settings.get(key, "")
    return {"numbers": whole_files.with_nan(numbers), "origins": origins}

  def _write(self) -> None:
    if jax.process_index() > 0:
      return
    content = {"settings": self._settings, "numbers": self.numbers, "origins": self._origins}
    whole_files.write_json(self._path, content)


def _jobs(settings: Any, workdir: Path) -> dict[str, _Job]:
  """{data set: how it is evaluated}."""
  for key in ("scenes", "prediction", "segments"):
    if settings[key]:
      scenes.check_limit(settings[key], what=f"evaluate.{key}")
  jobs = {}
  names = _rows(settings.trackers)
  origin = functools.cache(lambda name: named.origin(name, settings))
  rows = _agreed({row: origin(name) for row, name in names.items()})
  built = functools.cache(lambda row: named.build(names[row], settings))
  if settings.scenes:
    # Drawn once for all trackers; 0.4 MB a scene.
    questions = functools.cache(lambda: list(flow.scene_questions(limit=settings.scenes)))

    def on_scenes(name):
      evaluator = flow.FlowEvaluator(built(name), questions(), honesty=settings.honesty)
      return dict(evaluator.run())

    jobs[f"scenes-test-v1[{settings.scenes}]"] = _Job(_SCENES, rows, on_scenes)
  if settings.flow_pairs:

    def on_pairs(name):
      everything = [pair for _, pair in flow.flow_pair_questions(settings.flow_pairs)]
      return dict(flow.FlowEvaluator(built(name), everything, honesty=False).run())

    jobs["flow_pairs"] = _Job(_SCENES[:-2], rows, on_pairs)
  clips = tapvid_pickles.open_clips(settings.tapvid) if settings.tapvid else None
  for protocol in settings.protocols if settings.tapvid else ():
    job = tapvid_job.TapVidJob(
      clips,
      workdir,
      protocol=protocol,
      frame_gap=settings.frame_gap,
      query_stride=settings.query_stride,
      resolution=settings.resolution,
      overlays=settings.overlays,
    )

    def on_clips(name, job=job):
      manner = named.manner(names[name], settings)
      return job.measure(name, built(name), origin=rows[name], manner=manner)

    jobs[f"tapvid/{job.title}"] = _Job(_TAPVID, rows, on_clips, job.figures)
  if settings.prediction:

    def on_frames(_):
      return dict(
        prediction.of_weights(
          settings.weights or None,
          num_scenes=settings.prediction,
          mask_ratio=settings.mask_ratio or None,
          seed=settings.masks_seed,
        )
      )

    title = f"prediction[{settings.prediction}]"
    predictor = _agreed({"predictor": origin("mm1")})
    jobs[title] = _Job(_PREDICTION, predictor, on_frames)
  if settings.segments:
    # Baselines and flow networks have nothing that could be asked.
    asked = {row: rows[row] for row in rows if named.number_of_masks(names[row]) is not None}
    if not asked:
      raise InputError("evaluate.segments asks predictors: name mm<N> in evaluate.trackers")

    def on_movers(name):
      return dict(segments.on_scenes(built(name)[0], limit=settings.segments).run())

    jobs[f"segments[{settings.segments}]"] = _Job(_SEGMENTS, asked, on_movers)
  return jobs


def _rows(trackers: Sequence[str]) -> dict[str, str]:
  """{what a tracker is called in tables and folders: the tracker}.

  A weights file is called by its name, or, as every training writes a `model.safetensors`, by its
  folder's and its own where two of them have one name.

  Raises:
    InputError: two would be called the same.
  """
  files = {
    name: Path(name).absolute().with_suffix("").parts
    for name in trackers
    if name.endswith(".safetensors")
  }
  rows = {}
  for name in trackers:
    row = name
    for depth in range(1, len(files.get(name, ())) + 1):
      row = "-".join(files[name][-depth:])
      if [parts[-depth:] for parts in files.values()].count(files[name][-depth:]) == 1:
        break
    if row in rows:
      raise InputError(
        f"evaluate.trackers: the results of {rows[row]} and {name} would be kept under one name"
      )
    rows[row] = name
  return rows


def _agreed(origins: dict[str, str]) -> dict[str, str]:
  """The same on all processes, which must leave out the same rows."""
  spread.check_same(json.dumps(origins), what="weights")
  return origins
