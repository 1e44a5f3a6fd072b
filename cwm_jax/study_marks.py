"""The study's learned marks: trained, told from marks of other settings, asked about their flow.

In WORKDIR:

  train/<mark>-<seed>/              joint trainings, which go on where they were left
  marks/<mark>-<seed>.safetensors   what they learned, with a note of the settings that decided it
  bottleneck/<mark>-<seed>.json     how much Psi-flow leans on the mark's flow
"""

from __future__ import annotations

import functools
import json
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cwm_jax import checkpoint, tasks, train, whole_files
from cwm_jax.configs import base
from cwm_jax.pretrained import weights
from cwm_jax.tasks import joint, joint_building
from cwm_jax.types import InputError

_LOG = logging.getLogger(__name__)
# Name of a learned mark: how its perturber begins.
LEARNED = {"learned": "plain", "learned_white": "white"}
# What decides a training; a digest of the predictor's weights goes with it.
_SECTIONS = ("total", "seed", "init_from", "perturber", "joint", "flow_predictor", "optim", "data")
# Of these, what says only where files lie, or how it runs. How the perturber begins is in the
# mark's name. Cells of before told their clips by a path alone.
_FREE = re.compile(rf"{checkpoint.HOW_IT_RUNS}|joint\.weights|perturber\.(init|file)|tapvid")
# Notes of before these were noted say nothing about them.
_LATER = ("init_from", "data", "mark", "clips")
# In a training's folder: the SHA-256 of the predictor that it was begun with.
_PREDICTOR = "predictor.sha256"


def settings(config: Any, *, weights_sha256: str) -> dict[str, Any]:
  """What decides a joint training, {'a.b.c': value} as JSON has them.

  Args:
    config: a job's.
    weights_sha256: of the predictor's file; what it is called and where it lies change no number.
  """
  everything = config.to_dict()
  chosen = {name: everything[name] for name in _SECTIONS}
  sources = {name: source for name, source in chosen["data"]["sources"].items() if source["weight"]}
  chosen["data"] = {**chosen["data"], "sources": sources}
  return {"weights": weights_sha256, **_counting(json.loads(json.dumps(chosen)))}


def changed(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """The settings in which two notes differ, sorted.

  What the older note lacks because a later version of the project brought it keeps its default,
  which does what was done before.

  Args:
    stored: JSON's, nested or not.
    wanted: the same, of today.
  """
  before, after = _counting(stored), _counting(wanted)
  lacking = {name for name in _LATER if not any(_section(key) == name for key in before)}
  after = {key: value for key, value in after.items() if _section(key) not in lacking}
  before = {key: _defaults().get(key) for key in after} | before
  return sorted(key for key in before | after if before.get(key) != after.get(key))


def check(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], *, made: str) -> None:
  """Refuses a file of other settings.

  Args:
    path: the file.
    stored, wanted: see `changed`.
    made: what was done with the settings, "trained" or "measured".

  Raises:
    InputError: it names those that differ.
  """
  if differing := changed(stored, wanted):
    raise InputError(
      f"{path} was {made} with other settings ({', '.join(differing)}); take another --workdir"
    )


def read_kept(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
  """(settings, numbers) of a file that was measured before.

  Raises:
    InputError: it is damaged.
  """
  try:
    found = json.loads(path.read_text())
    return dict(found["settings"]), whole_files.with_nan(dict(found["numbers"]))
  except (ValueError, KeyError, TypeError):
    raise InputError(f"{path} is damaged; delete it") from None


def mark_path(workdir: Path, name: str, seed: int) -> Path:
  """Where a learned mark is kept."""
  return workdir / "marks" / f"{name}-{seed}.safetensors"


def learned(
  config: Any, workdir: Path, name: str, seed: int, *, weights_sha256: str
) -> Path | None:
  """A learned mark's file, trained if it is not there; None where its training left early.

  Args:
    config: the study's, of which all but the section `study` is the training's.
    name: of `LEARNED`.
    seed: added to the config's.
    weights_sha256: see `settings`.

  Raises:
    InputError: a mark of other settings, or as `train.train`.
  """
  path, job = mark_path(workdir, name, seed), _job(config, name, seed)
  wanted = settings(job, weights_sha256=weights_sha256)
  if path.is_file():
    note = weights.read_header(path).extra.get("training")
    if note is None:
      _LOG.info("%s does not say what it was trained with, and is taken as it is", path)
    else:
      check(path, note, wanted, made="trained")
    return path
  folder = _folder(workdir, name, seed)
  _follow_predictor(folder, job, weights_sha256)
  done = train.run(job, folder)
  if not done.finished:
    return None
  path.parent.mkdir(parents=True, exist_ok=True)
  params = done.state.params if done.state.ema is None else done.state.ema
  extra = {"name": name, "seed": seed, "steps": done.total_steps, "training": wanted}
  return joint_building.save_mark(path, jax.device_get(params), job, extra=extra)


def bottleneck(
  config: Any, workdir: Path, name: str, seed: int, *, num_scenes: int
) -> dict[str, float] | None:
  """How much the Psi-flow of a finished training leans on the flow, see `tasks.bottleneck.Probe`.

  Args:
    config: the study's, which names the predictor's weights; the rest is from the training's own.
    name, seed: of a learned mark that is there.
    num_scenes: held-out scenes, rounded up to whole groups.

  Returns:
    The probe's numbers without their prefix, and num_scenes; None, with a line in the log, where
    the training's folder has no longer the checkpoint that the mark came from.

  Raises:
    InputError: a damaged file of numbers, or a training whose task cannot be built any more.
  """
  kept = kept_bottleneck(workdir, name, seed, num_scenes=num_scenes)
  if kept is not None:
    return kept
  mark = mark_path(workdir, name, seed)
  found = _last_of_training(_folder(workdir, name, seed), mark)
  if found is None:
    return None
  params, stored = found
  _LOG.info("bottleneck of %s-%d", name, seed)
  job = base.get_config()
  job.update(stored)
  # It may have moved since.
  job.joint.weights = config.joint.weights
  job.log.eval_scenes = num_scenes
  task = tasks.build(job)
  numbers = {key.removeprefix("bottleneck/"): value for key, value in task.probe.run(task, params)}
  numbers["num_scenes"] = task.probe.num_scenes
  path = _bottleneck_path(workdir, name, seed)
  path.parent.mkdir(parents=True, exist_ok=True)
  asked = _asked_of(mark, num_scenes)
  whole_files.write_json(path, {"settings": asked, "numbers": numbers})
  return numbers


def kept_bottleneck(
  workdir: Path, name: str, seed: int, *, num_scenes: int
) -> dict[str, float] | None:
  """What `bottleneck` found before about this mark and as many scenes; None where it did not.

  Raises:
    InputError: a damaged file of numbers.
  """
  path, mark = _bottleneck_path(workdir, name, seed), mark_path(workdir, name, seed)
  if not (path.is_file() and mark.is_file()):
    return None
  asked, numbers = read_kept(path)
  return numbers if asked == _asked_of(mark, num_scenes) else None


def _bottleneck_path(workdir: Path, name: str, seed: int) -> Path:
  return workdir / "bottleneck" / f"{name}-{seed}.json"


def _asked_of(mark: Path, num_scenes: int) -> dict[str, Any]:
  return {"scenes": num_scenes, "mark": {"sha256": whole_files.sha256(mark)}}


def _last_of_training(folder: Path, mark: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
  """(params, config) of the checkpoint that a mark came from; None where it is gone."""
  try:
    with warnings.catch_warnings():
      # Orbax warns that the devices of the run are unknown here.
      warnings.simplefilter("ignore")
      params, stored = checkpoint.load_params(folder)
  except InputError as error:
    _LOG.info("no row for %s in the bottleneck table: %s", folder.name, error)
    return None
  kept, ours = weights.load_perturber(mark), params.get(joint.PERTURBER, {})
  kept, ours = weights.flatten(kept or {}), weights.flatten(ours)
  if kept.keys() != ours.keys() or not all(np.array_equal(kept[key], ours[key]) for key in kept):
    _LOG.info("no row for %s in the bottleneck table: %s is of another training", folder.name, mark)
    return None
  return params, stored


def _job(config: Any, name: str, seed: int) -> ConfigDict:
  """The training of a mark."""
  job = ConfigDict(config.to_dict())
  job.job, job.task = "train", "joint"
  job.seed = config.seed + seed
  job.perturber.init = LEARNED[name]
  # Every seed sees scenes of its own, both kinds of mark the same ones.
  job.data.sources.scenes.first_seed += 10_000_000 * seed
  job.lock()
  return job


def _follow_predictor(folder: Path, job: ConfigDict, weights_sha256: str) -> None:
  """Has a training that goes on know where its predictor lies now, if that is still the same one.

  Raises:
    InputError: it is another one.
  """
  begun, note = checkpoint.begun_with(folder), folder / _PREDICTOR
  if begun is None:
    folder.mkdir(parents=True, exist_ok=True)
    with whole_files.writing(note) as partial:
      partial.write_text(weights_sha256)
    return
  lay = begun["joint"]["weights"]
  if note.is_file():
    first = note.read_text()
  elif Path(lay).is_file():
    first = whole_files.sha256(lay)
  else:
    return
  if first != weights_sha256:
    raise InputError(f"{folder} was begun with another predictor; take another --workdir")
  if lay != job.joint.weights:
    begun["joint"]["weights"] = job.joint.weights
    whole_files.write_json(folder / checkpoint.CONFIG, begun)


def _folder(workdir: Path, name: str, seed: int) -> Path:
  return workdir / "train" / f"{name}-{seed}"


def _counting(note: Mapping[str, Any]) -> dict[str, Any]:
  """A note's settings by dotted names, without those that change no number."""
  flat = checkpoint.flat(dict(note))
  return {key: value for key, value in flat.items() if not _FREE.fullmatch(key)}


def _section(key: str) -> str:
  return key.partition(".")[0]


@functools.cache
def _defaults() -> dict[str, Any]:
  return checkpoint.flat(json.loads(json.dumps(base.get_config().to_dict())))
