"""The mark that a run's weights recommend: that of the weights it was begun with, at its own size.

A training on pairs of frames does not touch the mark that its first parameters were stored with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cwm_jax import checkpoint
from cwm_jax.counterfactual import perturb
from cwm_jax.pretrained import learned_marks, sections, weights
from cwm_jax.types import InputError


class Inherited(NamedTuple):
  """A recommended mark.

  mark:   JSON-ready description, as a weights file's config has it under `mark`.
  params: the perturber's of a learned one, a nested dict of float32 arrays; else None.
  told:   a line for people: which mark, and where it comes from.
  """

  mark: dict[str, Any]
  params: dict[str, Any] | None
  told: str


def of_run(config: Mapping[str, Any]) -> Inherited | None:
  """The mark of the weights file that a run was begun with, also through other runs.

  Its size in pixels grows with the images, so that its size in the scene stays.

  Args:
    config: the run's, JSON-ready.

  Returns:
    None where the run was begun with nothing, or with weights that recommend no mark.

  Raises:
    InputError: what the run was begun with cannot be read, or its mark cannot be had at this size.
  """
  seen: set[Path] = set()
  given = config
  while source := given.get("init_from"):
    path = Path(source).absolute()
    if not path.is_dir():
      return _of_file(path, config["model"]["image_hw"])
    if path in seen:  # begun anew with a checkpoint of its own
      return None
    seen.add(path)
    given = checkpoint.read_config(path)
  return None


def _of_file(path: Path, image_hw: Sequence[int]) -> Inherited | None:
  config = weights.read_header(path).config
  kind = sections.kind_of(config, "mark")
  if kind is None:
    return None
  params = weights.load_perturber(path)
  factor = min(image_hw) / min(config["model"]["image_hw"])
  mark = config["mark"] if factor == 1 else _enlarged(config["mark"], factor, where=path)
  settings = ", ".join(f"{name} {value}" for name, value in mark.items() if name != "kind")
  told = f"mark: {kind} ({settings}), as {path} recommends"
  if factor != 1:
    told += f" for images {1 / factor:g} times as large"
  return Inherited(mark, params, told)


def _enlarged(mark: Mapping[str, Any], factor: float, *, where: Path) -> dict[str, Any]:
  """A mark for images so many times as large."""
  if mark["kind"] == learned_marks.KIND:
    scale = mark["scale"] * factor
    if scale != int(scale):
      raise InputError(f"the learned mark of {where} cannot be drawn at {scale:g} times its grid")
    return {**mark, "scale": int(scale)}
  made = dataclasses.asdict(perturb.build(mark))
  if "sigma" in made:
    made["sigma"] *= factor
  else:
    made["size"] = max(1, round(made["size"] * factor))
  return {"kind": mark["kind"], **made}
