"""The study job: the paper's Table 3, marks against numbers of masks, one cell a file.

A cell is one mark, one number of masks, one data set and one seed. A seed is that of the masks and,
for learned marks, of the training that made the mark. In WORKDIR, beside what `study_marks` keeps:

  cells/<data>/<cell>.json      what was measured; those that are there are not measured again
  answers/<cell>/<clip>.npz     so that a cell on clips goes on where it was left
  answers/scenes/<cell>/        the same of a cell on scenes, ten scenes a file
  study.md, study.png           made from all that is there and was measured as the config says

With `study.masks` empty no cell is measured: marks are trained where they are not there, asked how
much their Psi-flow leans on the flow, and the tables made.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cwm_jax import study_marks, viz, whole_files, workdirs
from cwm_jax.counterfactual import flow as flow_program
from cwm_jax.counterfactual import multimask, perturb
from cwm_jax.data import tapvid_pickles
from cwm_jax.evals import flow, protocols, scenes, study_report, tapvid
from cwm_jax.study_marks import LEARNED
from cwm_jax.tasks import joint_building
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError

_LOG = logging.getLogger(__name__)
HAND_MADE = ("red", "green", "white")
_MARKS = (*HAND_MADE, *LEARNED)
# A setting of every cell whose mark's middle is no pixel's centre. Cells that lack it were measured
# as if it were one, half a pixel beside the truth, by versions of before.
_MIDDLE = "mark_middle"


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
    InputError: a setting that cannot be, data that cannot be had, cells of other settings, or a
      workdir that cannot be written.
    SaveError: the workdir can no longer be written.
  """
  # Not one at a time: several studies may share out their marks or seeds.
  folder = workdirs.check_writable(workdir)
  with workdirs.telling(folder):
    return _study(config, folder)


def _study(config: Any, workdir: Path) -> dict[Cell, dict[str, float]]:
  settings = config.study
  data = _checked(settings)
  asks = _Asks(config, workdir)
  report = _Report(asks, data)
  found: dict[Cell, dict[str, float]] = {}
  marks: dict[tuple[str, int], Any] = {}
  # Few masks first: a study that was stopped compares all marks, rather than knowing some wholly.
  order = itertools.product(sorted(settings.masks) or [None], settings.seeds, settings.marks)
  for masks, seed, mark in order:
    if mark in HAND_MADE and seed not in settings.hand_made_seeds:
      continue
    if (mark, seed) not in marks:
      made = asks.mark(mark, seed)
      if made is None:
        _LOG.info("the training of %s-%d was left early; the same command goes on", mark, seed)
        break
      marks[mark, seed] = made
      if mark in LEARNED:
        report.ask_bottleneck(mark, seed)
    for name in data if masks is not None else ():
      cell = Cell(mark, masks, name, seed)
      found[cell] = _measure(cell, marks[mark, seed], asks)
      report.write()
  return found


def _checked(settings: Any) -> list[str]:
  """The data sets to measure on, once all settings are seen to be possible.

  A learned mark may take hours to train, after which it would be late to tell.
  """
  unknown = [name for name in settings.marks if name not in _MARKS]
  if unknown:
    raise InputError(f"study.marks names {unknown[0]!r}; choose from {', '.join(_MARKS)}")
  if jax.process_count() > 1:
    raise InputError("a study runs in one process; share out its marks or seeds between several")
  data = [name for name, on in (("scenes", settings.scenes), ("tapvid", settings.tapvid)) if on]
  if not data:
    raise InputError("nothing to measure on: set study.scenes or study.tapvid")
  if any(count < 1 for count in settings.masks):
    raise InputError(f"study.masks is {tuple(settings.masks)}; a point takes 1 mask or more")
  if settings.scenes:
    scenes.check_limit(settings.scenes, what="study.scenes")
  if settings.tapvid:
    protocols.find(settings.protocol)
    if settings.frame_gap < 1:
      raise InputError(f"study.frame_gap is {settings.frame_gap}; give 1 or more")
  multimask.check_averaging(settings.order, settings.average)
  flow_program.check_protocol(
    "half_pixel", readout=settings.readout, average=settings.average, zoom=0
  )
  hand_made = [name for name in settings.marks if name in HAND_MADE]
  if hand_made and not set(settings.seeds) & set(settings.hand_made_seeds):
    _LOG.info(
      "%s: not measured, for none of study.seeds %s is one of study.hand_made_seeds %s",
      ", ".join(hand_made),
      tuple(settings.seeds),
      tuple(settings.hand_made_seeds),
    )
  return data


class _Report:
  """The tables and the figure, made anew after each measurement from all that is there by then.

  Args:
    asks: the study's questions.
    data: names of the data sets that it measures on.
  """

  def __init__(self, asks: _Asks, data: Sequence[str]):
    self._asks, self._data = asks, data

  def ask_bottleneck(self, mark: str, seed: int) -> None:
    """Adds a learned mark's row, as far as the config asks for it and its training is there."""
    count = self._asks.settings.bottleneck_scenes
    if not count:
      return
    numbers = study_marks.bottleneck(
      self._asks.config, self._asks.workdir, mark, seed, num_scenes=count
    )
    if numbers is not None:
      self.write()

  def write(self) -> None:
    """Writes study.md, and study.png where there are cells."""
    # Another study may have added to them.
    cells, rows = _kept_cells(self._asks, self._data), _kept_bottlenecks(self._asks)
    masks = sorted({cell.masks for cell in cells})
    parts = [study_report.markdown(cells, marks=_MARKS, masks=masks)] if cells else []
    if rows:
      parts.append(study_report.bottleneck(rows))
    with whole_files.writing(self._asks.workdir / "study.md") as partial:
      partial.write_text("\n".join(parts))
    if cells:
      figure = study_report.figure(cells, marks=_MARKS)
      viz.write_png(self._asks.workdir / "study.png", figure)


def _kept_cells(asks: _Asks, data: Sequence[str]) -> dict[Cell, dict[str, float]]:
  """The cells that are there, of whatever mark, masks and seed, and of the config's settings.

  In the order of the data sets and marks.
  """
  cells = {}
  for path in sorted(asks.workdir.glob("cells/*/*.json")):
    match = re.fullmatch(r"(\w+)-mm(\d+)-(\d+)", path.stem)
    if not match or match[1] not in _MARKS or path.parent.name not in data:
      continue
    cell = Cell(match[1], int(match[2]), path.parent.name, int(match[3]))
    mark = study_marks.mark_path(asks.workdir, cell.mark, cell.seed)
    if cell.mark in LEARNED and not mark.is_file():
      continue
    if cell.mark in HAND_MADE:
      mark = _hand_made(asks.config, cell.mark)
    try:
      numbers = _kept(path, asks, asks.stored(cell, mark))
    except InputError as error:
      asks.tell(f"not in the tables: {error}")
      continue
    if numbers is not None:
      cells[cell] = numbers
  order = sorted(cells, key=lambda cell: (data.index(cell.data), _MARKS.index(cell.mark), cell))
  return {cell: cells[cell] for cell in order}


def _kept_bottlenecks(asks: _Asks) -> dict[tuple[str, int], dict[str, float]]:
  """The same of the bottleneck's rows, {(mark, seed): numbers}."""
  rows = {}
  for path in asks.workdir.glob("bottleneck/*.json"):
    mark, _, seed = path.stem.rpartition("-")
    if mark not in LEARNED or not seed.isdigit():
      continue
    try:
      rows[mark, int(seed)] = study_marks.kept_bottleneck(
        asks.workdir, mark, int(seed), num_scenes=asks.settings.bottleneck_scenes
      )
    except InputError as error:
      asks.tell(f"not in the tables: {error}")
  return {key: numbers for key, numbers in rows.items() if numbers is not None}


def _hand_made(config: Any, name: str) -> dict[str, Any]:
  """The squares of the paper's baseline, half a patch wide, and a white Gaussian."""
  _, model = joint_building.predictor_file(config.joint.weights)
  if name == "white":
    return dict(kind="gaussian", **config.study.white)
  size = config.study.square or max(1, model["model"]["patch"] // 2)
  return dict(kind="square", colour=dict(red=(255, 0, 0), green=(0, 255, 0))[name], size=size)


class _Asks:
  """What is asked of whom: marks, and the questions of each data set, drawn or opened once."""

  def __init__(self, config: Any, workdir: Path):
    self.config, self.settings, self.workdir = config, config.study, workdir
    self.weights, _ = joint_building.predictor_file(config.joint.weights)
    for name in (name for name in self.settings.marks if name in HAND_MADE):
      perturb.build(_hand_made(config, name))
    self.clips = tapvid_pickles.open_clips(self.settings.tapvid) if self.settings.tapvid else None
    self._told: set[str] = set()

  @functools.cached_property
  def digest(self) -> str:
    """Of the predictor's file: what it is called and where it lies change no number."""
    return whole_files.sha256(self.weights)

  @functools.cached_property
  def scenes(self) -> list[flow.FlowQuestions]:
    return list(flow.scene_questions(limit=self.settings.scenes))

  @functools.cached_property
  def clips_digest(self) -> str:
    """Of the clips' files: where they lie, or by which path, changes no number."""
    return tapvid_pickles.digest(self.settings.tapvid)

  def tell(self, line: str) -> None:
    """Logs a line, once: what is kept is looked at again and again."""
    if line not in self._told:
      self._told.add(line)
      _LOG.info("%s", line)

  def mark(self, name: str, seed: int) -> Any:
    """What `Tracker.load` takes as a mark; None where its training was told to leave early."""
    if name in HAND_MADE:
      return _hand_made(self.config, name)
    return study_marks.learned(self.config, self.workdir, name, seed, weights_sha256=self.digest)

  def stored(self, cell: Cell, mark: Any) -> dict[str, Any]:
    """The settings on which a cell's numbers depend, as JSON has them."""
    about = {"scenes": ("scenes",), "tapvid": ("protocol", "frame_gap")}[cell.data]
    own = {key: self.settings[key] for key in (*about, "readout", "order", "average")}
    own["weights"] = self.digest
    if cell.data == "tapvid":
      own["clips"] = self.clips_digest
    if cell.mark in LEARNED:
      own |= study_marks.settings(self.config, weights_sha256=self.digest)
      own["mark"] = {"sha256": whole_files.sha256(mark)}
    else:
      own["mark"] = mark
      middle = perturb.middle(perturb.build(mark))
      if middle not in (None, 0.5) and self.settings.readout != "argmax":
        own[_MIDDLE] = middle
    return json.loads(json.dumps(own))


def _measure(cell: Cell, mark: Any, asks: _Asks) -> dict[str, float]:
  """A cell's numbers, from its file or by asking."""
  path, wanted = cell.path(asks.workdir), asks.stored(cell, mark)
  kept = _kept(path, asks, wanted) if path.is_file() else None
  # Clips that could not be read then may be readable now; the others' answers are there.
  if kept is not None and not kept.get("num_skipped"):
    return kept
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
  # Answers that were given under other settings are no part of this cell.
  origin = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
  evaluator: Any
  if cell.data == "scenes":
    kept_in = asks.workdir / "answers" / "scenes" / path.stem
    evaluator = flow.FlowEvaluator(tracker, asks.scenes, honesty=False, kept=kept_in, origin=origin)
    numbers = dict(evaluator.run())
  else:
    numbers = dict(_on_clips(tracker, cell, asks, origin))
  numbers["seconds"] = time.monotonic() - started
  path.parent.mkdir(parents=True, exist_ok=True)
  whole_files.write_json(path, {"settings": wanted, "numbers": numbers})
  return numbers


def _on_clips(
  tracker: Tracker, cell: Cell, asks: _Asks, origin: str
) -> Iterator[tuple[str, float]]:
  """Pooled over all clips, as the paper's; means over clips beside them."""
  settings = asks.settings
  evaluator = tapvid.TapVidEvaluator(
    tracker,
    asks.clips,
    protocol=settings.protocol,
    frame_gap=settings.frame_gap,
    kept=asks.workdir / "answers" / cell.path(asks.workdir).stem,
    origin=origin,
  )
  for name, value in evaluator.run():
    if name.startswith("pooled/"):
      yield name.removeprefix("pooled/"), value
    elif name.startswith(("mean/", "num_")):
      yield name, value


def _kept(path: Path, asks: _Asks, wanted: dict[str, Any]) -> dict[str, float] | None:
  """A cell's numbers from its file.

  None where they are of a mark read beside its middle, or where clips that could not be read then
  were mended since.
  """
  stored, numbers = study_marks.read_kept(path)
  differing = study_marks.changed(stored, wanted)
  if numbers.get("num_skipped") and differing == ["clips"]:
    asks.tell(f"{path} was measured without some clips that changed, and counts as not measured")
    return None
  if differing == [_MIDDLE]:
    asks.tell(f"{path} was measured half a pixel beside its mark and counts as not measured")
    return None
  study_marks.check(path, stored, wanted, made="measured")
  return numbers
