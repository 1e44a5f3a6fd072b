"""Trackers by the names that configs give them."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from cwm_jax import whole_files
from cwm_jax.counterfactual import perturb
from cwm_jax.evals import spread, trackers
from cwm_jax.pretrained import (
  flow_networks,
  learned_marks,
  mark_files,
  releases,
  sections,
  weights,
)
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError

# What held before a key of `evaluate` said it, so that what is kept from then stays of use.
BEFORE_KEYS = {"tracker_protocol": "half_pixel"}
# Keys of `evaluate` that change what a tracker with weights answers; its files are its origin.
_CHANGE_ANSWERS = ("mask_ratio", "zoom", "mark", "readout", "order", "average", "tracker_protocol")
_CHANGE_ANSWERS += ("masks_seed", "dtype", "attention_dtype", "flow")


def number_of_masks(name: str) -> int | None:
  """N of mm<N>; None for a name that says no such number."""
  found = re.fullmatch(r"mm(\d+)", name)
  return int(found[1]) if found else None


def build(name: str, settings: Any) -> list[Any]:
  """A tracker by name, one a worker (see `spread.one_each`).

  mm<N> is `evaluate.weights` with N masks, "adaptive" the same with masks that each point chooses;
  a release, a shipped file or a weights file is itself, a predictor with 10 masks; others are
  baselines. All answer continuous places, whatever `evaluate.tracker_protocol`.

  Args:
    name: of the tracker.
    settings: a config's `evaluate` section.

  Raises:
    InputError: no such tracker, or one that cannot be had.
  """
  path, masks = weights_path(name, settings), _masks(name)
  if path is None:
    return [trackers.build(name)]
  if flow_networks.is_flow_network(weights.read_header(path).config):
    if masks is not None:
      raise InputError(
        f"{name} asks a predictor, and {path} is a flow network; name it in evaluate.trackers"
      )
    chosen = dict(
      occlusion=settings.flow.occlusion,
      occlusion_threshold=settings.flow.occlusion_threshold or None,
      iterations=settings.flow.iterations or None,
    )
  else:
    chosen = dict(
      num_masks=10 if masks is None else masks,
      mask_ratio=settings.mask_ratio or None,
      zoom=settings.zoom,
      mark=_mark(settings.mark),
      readout=settings.readout,
      masks_seed=settings.masks_seed,
      attention_dtype=settings.attention_dtype or None,
      memory_budget=settings.memory_budget or None,
      order=settings.order or None,
      average=settings.average,
    )
  protocol = settings.tracker_protocol
  load = functools.partial(
    Tracker.load, path, dtype=settings.dtype or None, protocol=protocol, **chosen
  )
  if protocol == "release":
    return spread.one_each(lambda: trackers.AtPixelCentres(load()))
  return spread.one_each(load)


def weights_path(name: str, settings: Any) -> Path | None:
  """The weights file that a tracker asks; None for a baseline, which has none.

  Args:
    name, settings: as in `build`.

  Raises:
    InputError: no such tracker, or a file that cannot be had.
  """
  if _masks(name) is not None:
    return releases.locate(settings.weights or weights.shipped())
  if name in trackers.BASELINES:
    return None
  if name in (*releases.names(), *weights.shipped_names()) or name.endswith(".safetensors"):
    return releases.locate(name)
  raise InputError(
    f"there is no tracker {name!r}; choose mm<N>, adaptive, a baseline "
    f"({', '.join(trackers.BASELINES)}), a weights file or a release's name; {releases.near(name)}"
  )


def origin(name: str, settings: Any) -> str:
  """SHA-256 of the files that a tracker's answers come from; "" for a baseline.

  A path is no sign of what it holds: every training writes a `model.safetensors`.

  Args:
    name, settings: as in `build`.

  Raises:
    InputError: as `weights_path`.
  """
  path = weights_path(name, settings)
  if path is None:
    return ""
  told = whole_files.sha256(path)
  mark = Path(settings.mark.file)
  # Without its file no tracker is built, which says so better.
  if settings.mark.kind == "learned" and mark.is_file():
    told = hashlib.sha256(f"{told} {whole_files.sha256(mark)}".encode()).hexdigest()
  if _read_from_a_corner(path, settings):
    told = hashlib.sha256(f"{told} middle".encode()).hexdigest()
  return told


def _read_from_a_corner(path: Path, settings: Any) -> bool:
  """Whether places are counted from a mark's middle that is no pixel's centre.

  It is an even square's, or that of a learned mark of an odd grid that is enlarged evenly. Versions
  of before counted them from the centre, half a pixel beside; what is kept of theirs is not to be
  mixed with what is answered now.
  """
  try:
    config = weights.read_header(path).config
    bare = settings.readout == "argmax" or settings.tracker_protocol == "release"
    if bare or flow_networks.is_flow_network(config):
      return False
    described = {"mark": _mark(settings.mark) or sections.section(config, "mark")}
    if isinstance(described["mark"], str):
      _, described = mark_files.read(described["mark"], model=config["model"])
    if learned_marks.is_learned(described):
      mark = learned_marks.build(described, params=None)
    else:
      patch = config["model"]["patch"]
      mark = perturb.build(described["mark"]) if described["mark"] else perturb.default(patch)
  except InputError:  # no tracker is built of it, which says so better
    return False
  return perturb.middle(mark) not in (None, 0.5)


def manner(name: str, settings: Any) -> str:
  """SHA-256 of the settings that decide a tracker's answers about clips, beside its origin.

  Args:
    name, settings: as in `build`.

  Raises:
    InputError: as `weights_path`.
  """
  keys = ("resolution",)
  if weights_path(name, settings) is not None:
    keys += _CHANGE_ANSWERS
  content = settings.to_dict()
  told = json.dumps({key: content[key] for key in keys}, sort_keys=True)
  return hashlib.sha256(told.encode()).hexdigest()


def _masks(name: str) -> int | str | None:
  """What a predictor of `evaluate.weights` is asked with; None for trackers that are something
  else."""
  return name if name == "adaptive" else number_of_masks(name)


def _mark(settings: Any) -> dict[str, Any] | str | None:
  """The description that `perturb.build` takes: the kind's own settings out of the config's.

  A learned mark is described by its file.
  """
  own = {"square": ("colour", "size"), "gaussian": ("amplitude", "sigma")}
  if settings.kind == "learned":
    if not settings.file:
      raise InputError("evaluate.mark.kind is 'learned': name its file by evaluate.mark.file")
    return settings.file
  if not settings.kind:
    return None
  return {"kind": settings.kind, **{key: settings[key] for key in own.get(settings.kind, ())}}
