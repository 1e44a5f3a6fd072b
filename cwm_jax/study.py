"""The study job: the paper's Table 3, marks against numbers of masks, one cell a file.

A cell is one mark, one number of masks, one data set and one seed. A seed is that of the masks and,
for learned marks, of the training that made the mark. In WORKDIR:

  train/<mark>-<seed>/        joint trainings, which go on where they were left
  marks/<mark>-<seed>.safetensors
  cells/<data>/<cell>.json    what was measured; those that are there are not measured again
  study.md, study.png         made from the cells that are there
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from cwm_jax import schedule, train, viz, whole_files
from cwm_jax.data import tapvid_pickles
from cwm_jax.evals import flow, study_report, tapvid
from cwm_jax.tasks import joint_building
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError

_LOG = logging.getLogger(__name__)
HAND_MADE = ("red", "green", "white")
# Name of a learned mark: how its perturber begins.
LEARNED = {"learned": "plain", "learned_white": "white"}


class Cell(NamedTuple):
  """One measurement: mark, masks a point, data set ("scenes" or "tapvid"), seed."""

  mark: str
  masks: int
  data: str
  seed: int

  def path(self, workdir: Path) -> Path:
    """Where it is kept."""
    return workdir / "cells" / self.data / f"{self.mark}-mm{self.masks}-{self.seed}.json"


def run(config: Any, workdir: str | os.PathLike[str]) -> dict[Cell, dict[str, float]]:
  """Trains the marks and measures the cells that `config.study` asks for, as far as not yet done.

  Args:
    config: see `configs/base.py`, section `study`; the rest is the joint training's.
    workdir: for everything that is kept.

  Returns:
    {cell: numbers}; fewer than asked for where a training was told to leave.

  Raises:
    InputError: an unknown mark, data that cannot be had, or cells of other settings.
  """
  workdir = Path(workdir)
  settings = config.study
  unknown = [name for name in settings.marks if name not in (*HAND_MADE, *LEARNED)]
  if unknown:
    known = ", ".join((*HAND_MADE, *LEARNED))
    raise InputError(f"study.marks names {unknown[0]!r}; choose from {known}")
  if jax.process_count() > 1:
    raise InputError("a study runs in one process; share out its marks or seeds between several")
  data = [name for name, on in (("scenes", settings.scenes), ("tapvid", settings.tapvid)) if on]
  if not data:
    raise InputError("nothing to measure on: set study.scenes or study.tapvid")
  asks = _Asks(config)
  found: dict[Cell, dict[str, float]] = {}
  # Few masks first: a study that was stopped compares all marks, rather than knowing some wholly.
  order = itertools.product(sorted(settings.masks), settings.seeds, settings.marks)
  for masks, seed, mark in order:
    if mark in HAND_MADE and seed not in settings.hand_made_seeds:
      continue
    made = _mark(config, workdir, mark, seed)
    if made is None:
      _LOG.info("the training of %s-%d was left early; the same command goes on", mark, seed)
      break
    for name in data:
      cell = Cell(mark, masks, name, seed)
      found[cell] = _measure(cell, made, asks, workdir)
      _report(found, settings, workdir)
  return found


def _report(found: dict[Cell, dict[str, float]], settings: Any, workdir: Path) -> None:
  table = study_report.markdown(found, marks=settings.marks, masks=settings.masks)
  (workdir / "study.md").write_text(table)
  viz.write_png(workdir / "study.png", study_report.figure(found, marks=settings.marks))


def _mark(config: Any, workdir: Path, name: str, seed: int) -> Any:
  """What `Tracker.load` takes as a mark; None where its training was told to leave early."""
  if name not in LEARNED:
    return _hand_made(config, name)
  path = workdir / "marks" / f"{name}-{seed}.safetensors"
  if path.is_file():
    return path
  job = ConfigDict(config.to_dict())
  job.job, job.task = "train", "joint"
  job.seed = config.seed + seed
  job.perturber.init = LEARNED[name]
  # Every seed sees scenes of its own, both kinds of mark the same ones.
  job.data.sources.scenes.first_seed += 10_000_000 * seed
  folder = workdir / "train" / f"{name}-{seed}"
  job.lock()
  state = train.train(job, folder)
  total = schedule.to_steps(
    job.total,
    batch_size=job.data.batch_size,
    epoch_examples=job.data.epoch_examples or None,
  )
  if int(state.step) < total:
    return None
  path.parent.mkdir(parents=True, exist_ok=True)
  params = state.params if state.ema is None else state.ema
  extra = {"name": name, "seed": seed, "steps": total}
  return joint_building.save_mark(path, jax.device_get(params), job, extra=extra)


def _hand_made(config: Any, name: str) -> dict[str, Any]:
  """The squares of the paper's baseline, half a patch wide, and a white Gaussian."""
  _, model = joint_building.predictor_file(config.joint.weights)
  if name == "white":
    return dict(kind="gaussian", **config.study.white)
  size = config.study.square or max(1, model["model"]["patch"] // 2)
  return dict(kind="square", colour=dict(red=(255, 0, 0), green=(0, 255, 0))[name], size=size)


class _Asks:
  """The questions of each data set, drawn or opened once."""

  def __init__(self, config: Any):
    self.config, self.settings = config, config.study
    self.weights, _ = joint_building.predictor_file(config.joint.weights)

  @functools.cached_property
  def digest(self) -> str:
    """Of the predictor's file: what it is called and where it lies change no number."""
    return whole_files.sha256(self.weights)

  @functools.cached_property
  def scenes(self) -> list[flow.FlowQuestions]:
    return list(flow.scene_questions(limit=self.settings.scenes))

  @functools.cached_property
  def clips(self) -> Any:
    return tapvid_pickles.open_clips(self.settings.tapvid)

  def stored(self, cell: Cell, mark: Any) -> dict[str, Any]:
    """The settings on which a cell's numbers depend, as JSON has them."""
    about = {"scenes": ("scenes",), "tapvid": ("tapvid", "protocol", "frame_gap")}[cell.data]
    own = {key: self.settings[key] for key in (*about, "readout", "order", "average")}
    trained = {}
    if cell.mark in LEARNED:
      sections = ("total", "seed", "perturber", "joint", "flow_predictor", "optim")
      trained = {key: self.config.to_dict()[key] for key in sections}
    else:
      own["mark"] = mark
    return json.loads(json.dumps({**own, "weights": self.digest, **trained}))


def _measure(cell: Cell, mark: Any, asks: _Asks, workdir: Path) -> dict[str, float]:
  """A cell's numbers, from its file or by asking."""
  path, wanted = cell.path(workdir), asks.stored(cell, mark)
  if path.is_file():
    return _kept(path, wanted)
  _LOG.info("%s", path.stem)
  settings, started = asks.settings, time.monotonic()
  tracker = Tracker.load(
    asks.weights,
    num_masks=cell.masks,
    mark=mark,
    readout=settings.readout,
    masks_seed=cell.seed,
    order=settings.order,
    average=settings.average,
  )
  evaluator: Any
  if cell.data == "scenes":
    evaluator = flow.FlowEvaluator(tracker, asks.scenes, honesty=False)
    numbers = dict(evaluator.run())
  else:
    numbers = dict(_on_clips(tracker, cell, asks, workdir))
  numbers["seconds"] = time.monotonic() - started
  path.parent.mkdir(parents=True, exist_ok=True)
  whole_files.write_json(path, {"settings": wanted, "numbers": numbers})
  return numbers


def _on_clips(
  tracker: Tracker, cell: Cell, asks: _Asks, workdir: Path
) -> Iterator[tuple[str, float]]:
  """Pooled over all clips, as the paper's; means over clips beside them."""
  settings = asks.settings
  evaluator = tapvid.TapVidEvaluator(
    tracker,
    asks.clips,
    protocol=settings.protocol,
    frame_gap=settings.frame_gap,
    kept=workdir / "answers" / cell.path(workdir).stem,
  )
  for name, value in evaluator.run():
    if name.startswith("pooled/"):
      yield name.removeprefix("pooled/"), value
    elif name.startswith(("mean/", "num_")):
      yield name, value


def _kept(path: Path, wanted: dict[str, Any]) -> dict[str, float]:
  try:
    found = json.loads(path.read_text())
    settings, numbers = found["settings"], dict(found["numbers"])
  except (ValueError, KeyError, TypeError):
    raise InputError(f"{path} is damaged; delete it") from None
  changed = sorted(key for key in {*settings, *wanted} if settings.get(key) != wanted.get(key))
  if changed:
    raise InputError(
      f"{path} was measured with other settings ({', '.join(changed)}); take another --workdir"
    )
  return numbers
