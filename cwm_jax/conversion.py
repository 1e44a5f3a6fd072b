"""`cwm-jax convert`: from a training run or a public release to a weights file, and back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax.commands import report, written
from cwm_jax.pretrained import convert, flow_networks, learned_marks, releases, sections, torch_file
from cwm_jax.pretrained import weights as weights_file
from cwm_jax.pretrained.flow_predictors import FLOW_PREDICTOR
from cwm_jax.pretrained.merge import NamesError
from cwm_jax.types import InputError


def run(
  *,
  source: str,
  out: str,
  dtype: str,
  over: str | None,
  keep_base: bool,
  like: str | None,
  heads: tuple[int, int] | None,
  flow_heads: tuple[int, int] | None = None,
  as_json: bool,
) -> None:
  """Converts; see `cwm-jax convert --help`.

  Raises:
    InputError: an input of none of the known forms, or an output that cannot be written. Where keys
      do not match, both whole lists were printed before.
  """
  form = _form(source)
  of_release = over or like or heads or flow_heads or (keep_base and form != "name")
  if form != "release" and of_release:
    raise InputError(
      "--over, --keep-base, --like, --heads and --flow-heads go with a released checkpoint as IN"
    )
  if keep_base and form == "release" and over is None:
    raise InputError("--keep-base goes with --over")
  try:
    if form == "workdir":
      facts, notes = _from_workdir(source, out, dtype)
    elif form == "ours":
      facts, notes = _to_release(source, out, dtype)
    else:
      if form == "name":
        sources, like = releases.fetch(releases.get(source)), source
      else:
        sources = [Path(path) for path in (source, over) if path is not None]
      made = convert.assemble(
        sources, release=like, heads=heads, flow_heads=flow_heads, keep_base=keep_base
      )
      facts, notes = _from_release(made, out, dtype)
  except NamesError as error:
    print(json.dumps({"error": str(error), **error.sides}) if as_json else convert.listing(error))
    raise
  facts |= {"bytes": Path(out).stat().st_size, "files": [out]}
  first = f"{facts['parameters']:,} parameters as {dtype}"
  report(facts, "\n".join([first, *notes]) + written([Path(out)]), as_json=as_json)


def _form(source: str) -> str:
  """workdir, ours, release or name."""
  path = Path(source)
  if path.is_dir():
    return "workdir"
  if not path.exists() and source in releases.names():
    return "name"
  if not path.is_file():
    raise InputError(
      f"there is no {source!r}: give a training run's folder, a checkpoint, a weights file, or a "
      f"release's name; {releases.near(source)}"
    )
  if path.suffix in (".pt", ".pth") or torch_file.is_torch_file(path):
    return "release"
  return "ours" if weights_file.is_ours(path) else "release"


def _from_workdir(source: str, out: str, dtype: str) -> tuple[dict[str, Any], list[str]]:
  from cwm_jax import checkpoint

  with warnings.catch_warnings():
    # Orbax warns that the devices of the run are unknown here; nothing is put on devices.
    warnings.simplefilter("ignore")
    params, config = checkpoint.load_params(source)
  if config.get("task") == "joint":
    return _learned_mark(params, config, out, dtype)
  if model := sections.section(config, "model"):
    config["model"] = weights_file.elsewhere(model)
  weights_file.check_fit(params, config, where=f"workdir {source}")
  notes = [] if flow_networks.is_flow_network(config) else [_with_mark(params, config)]
  weights_file.save(out, params, config, dtype=dtype)
  return {"parameters": _count(weights_file.flatten(params))}, notes


def _with_mark(params: dict[str, Any], config: dict[str, Any]) -> str:
  """Adds the mark that a run's weights recommend to its parameters and config; a line about it."""
  from cwm_jax import inherited_marks

  try:
    found, reason = inherited_marks.of_run(config), ""
  except InputError as error:
    found, reason = None, f" ({error})"
  if found is None:
    return f"mark: none is recommended{reason}, so a red square of half a patch is used"
  config["mark"] = found.mark
  if found.params is not None:
    params[learned_marks.PERTURBER] = found.params
  return found.told


def _learned_mark(
  params: dict[str, Any], config: dict[str, Any], out: str, dtype: str
) -> tuple[dict[str, Any], list[str]]:
  """Of a joint training's parameters the mark that was learned; the predictor has its own file."""
  from cwm_jax.configs import base
  from cwm_jax.tasks import joint, joint_building

  # A run of an earlier version lacks later keys, whose defaults do what was done before.
  whole = base.get_config()
  whole.update(config)
  joint_building.save_mark(out, params, whole, dtype=dtype)
  count = _count(weights_file.flatten(params[joint.PERTURBER]))
  return {"parameters": count}, ["a learned mark, for Tracker.load(mark=...)"]


def _to_release(source: str, out: str, dtype: str) -> tuple[dict[str, Any], list[str]]:
  state = convert.to_state(source)
  convert.write_state(out, state, dtype=dtype)
  return {"parameters": _count(state)}, [f"in the release's layout, {len(state)} tensors"]


def _from_release(
  made: convert.Converted, out: str, dtype: str
) -> tuple[dict[str, Any], list[str]]:
  weights_file.save(out, made.params, made.config, extra=made.extra, dtype=dtype)
  is_flow_network = flow_networks.is_flow_network(made.config)
  model = made.config[flow_networks.SECTION if is_flow_network else "model"]
  facts = {
    "parameters": _count(weights_file.flatten(made.params)),
    "model": model,
    "overlaid": list(made.overlaid),
    "skipped": made.skipped,
  }
  if is_flow_network:
    assumed = (
      f"taken as {model['kind']} with {model['iterations']} iterations (--like says otherwise)"
    )
    return facts, [assumed, *made.notes]
  sides = f"{model['image_hw'][0]} x {model['image_hw'][1]}"
  heads = f"{model['encoder_heads']} and {model['decoder_heads']} heads"
  assumed = [f"taken as a model for {sides} pixels with {heads} (--like, --heads say otherwise)"]
  if FLOW_PREDICTOR in made.params:
    psi_flow = made.config[FLOW_PREDICTOR]["two_stream"]
    heads = f"{psi_flow['encoder_heads']} and {psi_flow['decoder_heads']} heads"
    assumed.append(f"its Psi-flow taken with {heads} (--flow-heads says otherwise)")
  return facts, [*assumed, *made.notes]


def _count(arrays: dict[str, Any]) -> int:
  return sum(int(np.size(array)) for array in arrays.values())
