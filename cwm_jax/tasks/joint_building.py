"""From a config to the joint task: a frozen predictor's file, a perturber and Psi-flow."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import models, tasks
from cwm_jax.counterfactual import perturb
from cwm_jax.models.perturber import INITS, Perturber
from cwm_jax.pretrained import (
  flow_networks,
  learned_marks,
  mark_files,
  releases,
  sections,
  weights,
)
from cwm_jax.tasks import bottleneck, joint, readout
from cwm_jax.types import FramePair, InputError

_LOG = logging.getLogger(__name__)

# The paper's mark: 20 pixels of an image of 256.
_MARK_SHARE = 20 / 256
_GEOMETRY = ("size", "scale", "on_pixel", "reach")
# What the `flow_predictor` section says of a Psi-flow whose sizes a file tells.
_RUNNING = ("dtype", "attention_impl", "remat")


def build(config: Any) -> joint.Joint:
  """Makes the task from the sections `joint`, `perturber`, `flow_predictor`, `log` and `data`.

  Raises:
    InputError: settings or files it cannot work with, or an optimizer that would move the frozen
      predictor.
  """
  settings = config.joint
  path, _ = predictor_file(settings.weights)
  params, stored = weights.load(path)
  weights.check_fit(params, stored, where=f"weights file {path}")
  model = models.in_dtype(stored["model"], settings.dtype)
  predictor_hw = tuple(model["image_hw"])
  image_hw = tuple(settings.image_hw) or predictor_hw
  try:
    predictor = models.build(model)
    flow_predictor, begun = _flow_predictor(config.flow_predictor, stored, params, path)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise InputError(f"config.joint or config.flow_predictor cannot be built: {error}") from None
  perturber, given, geometry = _perturber(config.perturber, model)
  _tell_overruled(config.perturber, geometry)
  ratio = settings.mask_ratio or model["mask_ratio"]
  preset = readout.presets(config.data.sources.scenes)[-1]
  task = joint.Joint(
    predictor=predictor,
    perturber=perturber,
    flow_predictor=flow_predictor,
    given={joint.PREDICTOR: params, **given, **begun},
    image_hw=image_hw,
    predictor_hw=predictor_hw,
    mask_ratio=ratio,
    mark_size=geometry["size"],
    mark_settings={name: value for name, value in geometry.items() if name != "size"},
    held_out=readout.build(config, predictor, image_hw=predictor_hw, mask_ratio=ratio),
    own_mark=_own_mark(stored, path),
    probe=bottleneck.Probe(
      image_hw=image_hw,
      preset=preset,
      num_scenes=config.log.eval_scenes,
      **readout.scene_settings(config),
    ),
    **{
      name: settings[name]
      for name in "num_points query masks num_masks inverse_temperature order average protocol "
      "points_at_once".split()
    },
  )
  _check(task, config.optim.freeze)
  return task


def predictor_file(named: str) -> tuple[Path, dict[str, Any]]:
  """The file of the frozen predictor (`joint.weights`, "" being the shipped one) and its config.

  Raises:
    InputError: no such file, or it holds no predictor.
  """
  path = releases.locate(named) if named else weights.shipped()
  config = weights.read_header(path).config
  if flow_networks.is_flow_network(config):
    raise InputError(f"{path} holds a flow network; name by joint.weights a predictor's file")
  return path, config


def save_mark(
  path: str | os.PathLike,
  params: dict[str, Any],
  config: Any,
  *,
  extra: dict[str, Any] | None = None,
  dtype: str = "float32",
) -> Path:
  """Writes the mark that a joint training learned to a file for `Tracker.load(mark=...)`.

  A mark that began from a file keeps that one's geometry, so the file must still be there.

  Args:
    path: where to; its folder must exist.
    params: the training's, of which the perturber's are written; the running average where it keeps
      one.
    config: the training's.
    extra, dtype: as `weights.save`.

  Raises:
    InputError: as `mark_files.save`, a config of no joint training, or as `mark_files.read` for the
      file that the perturber began from.
  """
  if config.task != "joint" or joint.PERTURBER not in params:
    raise InputError("only a joint training learns a mark")
  _, stored = predictor_file(config.joint.weights)
  model = stored["model"]
  _, _, geometry = _perturber(config.perturber, model)
  return mark_files.save(
    path, params[joint.PERTURBER], model=model, **geometry, extra=extra, dtype=dtype
  )


def mark_size(section: Any, predictor_hw: tuple[int, int]) -> int:
  """Side of the mark's grid: as the `perturber` section says, or the paper's share of the image.

  With `scale` the grid is that of an image so many times smaller, and its pixels are enlarged.
  """
  if section.scale < 1:
    raise InputError(f"perturber.scale is {section.scale}; give 1 or more")
  return section.size or round(_MARK_SHARE * min(predictor_hw) / section.scale)


def _perturber(
  section: Any, model: dict[str, Any]
) -> tuple[Perturber, dict[str, Any], dict[str, Any]]:
  """The module, its parameters where they come from a file, and the mark's geometry.

  The geometry, `_GEOMETRY` of `gaussian.GaussianMark`, is the file's where there is one: what its
  parameters say depends on it.
  """
  if section.init not in (*INITS, "file"):
    raise InputError(f"perturber.init is {section.init!r}; choose one of {', '.join(INITS)}, file")
  if section.init != "file":
    if not 0 <= section.reach <= 1:
      raise InputError(f"perturber.reach is {section.reach}; give a share from 0 to 1")
    geometry = {name: section[name] for name in _GEOMETRY}
    geometry["size"] = mark_size(section, tuple(model["image_hw"]))
    return Perturber(hidden_width=section.hidden_width, init_kind=section.init), {}, geometry
  if not section.file:
    raise InputError("perturber.init is 'file': name it by perturber.file")
  params, stored = mark_files.read(section.file, model=model)
  mark = learned_marks.build(stored, params).func
  geometry = {name: getattr(mark, name) for name in _GEOMETRY}
  return mark.perturber, {joint.PERTURBER: params}, geometry


def _tell_overruled(section: Any, geometry: dict[str, Any]) -> None:
  """One line in the log where a mark's file says otherwise than the `perturber` section."""
  if section.init != "file":
    return
  differ = [name for name in _GEOMETRY if section[name] != geometry[name]]
  if not section.size:  # which says nothing
    differ.remove("size")
  if differ:
    told = ", ".join(f"{name} {geometry[name]} (not {section[name]})" for name in differ)
    _LOG.info("the mark of %s keeps what its file says: %s", section.file, told)


def _flow_predictor(
  section: Any, stored: dict[str, Any], params: dict[str, Any], path: Path
) -> tuple[Any, dict[str, Any]]:
  """Psi-flow's module, and its parameters where it does not begin at random.

  Args:
    section: `flow_predictor`; of a Psi-flow that comes from a file it says how it runs.
    stored, params: config and parameters of the frozen predictor's file.
    path: that file.
  """
  if section.kind == "file":
    found = weights.load_flow_predictor(path)
    if found is None:
      raise InputError(f"{path} holds no Psi-flow that flow_predictor.kind='file' could go on from")
    theirs = {**stored["flow_predictor"], **{name: section[name] for name in _RUNNING}}
    return models.build_flow_predictor(theirs), {joint.FLOW_PREDICTOR: found[1]}
  module = models.build_flow_predictor(section, stored["model"])
  if section.kind != "moved":
    return module, {}
  if not sections.predicts_colours(stored):
    raise InputError(
      "flow_predictor.kind 'moved' begins as a predictor of colours, and that of "
      f"{path} predicts patches without their brightness and contrast (pretrain.target)"
    )
  # Its own copies: these are trained, and a step gives up its parameters' memory.
  return module, {joint.FLOW_PREDICTOR: jax.tree.map(np.copy, params)}


def _own_mark(stored: dict[str, Any], path: Any) -> perturb.Mark:
  """What the predictor's weights file recommends; a red square where it says nothing."""
  if learned_marks.is_learned(stored):
    return learned_marks.build(stored, jax.tree.map(jnp.asarray, weights.load_perturber(path)))
  if "mark" in stored:
    return perturb.build(stored["mark"])
  return perturb.default(stored["model"]["patch"])


def _check(task: joint.Joint, freeze: str) -> None:
  """Traces a step, and sees that the optimizer leaves the predictor alone and nothing else."""
  what = "config.joint, perturber or flow_predictor"
  shapes = tasks.trace(task.init, jax.random.key(0), what=what)
  pair = FramePair(jax.ShapeDtypeStruct((1, 2, *task.image_hw, 3), jnp.float32))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  tasks.trace(task.loss, shapes, pair, keys, what=what)
  frozen = {name: bool(freeze and re.search(freeze, name)) for name in weights.flatten(shapes)}
  if any(is_frozen != name.startswith(f"{joint.PREDICTOR}/") for name, is_frozen in frozen.items()):
    raise InputError(
      f"the joint task trains all but the predictor: set optim.freeze to '^{joint.PREDICTOR}/', "
      f"not {freeze!r}"
    )
