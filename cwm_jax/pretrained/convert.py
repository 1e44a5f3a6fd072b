"""Released checkpoints to our weights files and back, every key accounted for.

What a file holds is told by the names in it, which model it is by the shapes. A release of two
files is laid together as its authors load them: the base checkpoint first, then every key of the
second file's flow predictor over it. What joint training made beside it, Psi-flow, comes along.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isqrt, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cwm_jax.pretrained import (
  flow_conversion,
  flow_keymaps,
  flow_networks,
  flow_predictors,
  keymaps,
  safetensors_file,
  torch_file,
  weights,
)
from cwm_jax.pretrained.flow_predictors import FLOW_PREDICTOR
from cwm_jax.pretrained.learned_marks import PERTURBER
from cwm_jax.pretrained.merge import NamesError, agreeing_release, axis_of
from cwm_jax.pretrained.naming import JOINT_FLOW_PREDICTOR, Naming, naming_of
from cwm_jax.types import InputError

_WRAPPER = "module."  # data-parallel training puts it before every name


class Converted(NamedTuple):
  """A release as `weights.save` takes it.

  params: nested dict of float32 arrays; a perturber's under "perturber", Psi-flow's under
          "flow_predictor".
  config: a job config whose "model" section builds the predictor; with a "mark" if it is learned.
  extra:  the release's naming, which the way back needs.
  skipped: what was left out -> how many tensors.
  overlaid: names that both files of a release had, and the second file's were taken.
  notes:  what a person should know of the two, a line each.
  """

  params: dict[str, Any]
  config: dict[str, Any]
  extra: dict[str, Any]
  skipped: dict[str, int]
  overlaid: tuple[str, ...] = ()

  @property
  def notes(self) -> list[str]:
    lines = []
    if self.overlaid:
      some = ", ".join(self.overlaid[:3]) + (", ..." if len(self.overlaid) > 3 else "")
      lines.append(f"laid {len(self.overlaid)} tensors over the base's ({some})")
    for what, count in self.skipped.items():
      lines.append(f"left out {count} {what} (of training; nothing reads them)")
    return lines


def read_state(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The tensors of a `.pt`, `.pth` or `.safetensors` file by name, as views of the mapped file.

  Of a training checkpoint, the part called "model" or "state_dict" is taken.

  Raises:
    InputError: a file that cannot be read, or that holds no tensors by name.
  """
  if torch_file.is_torch_file(path) or Path(path).suffix in (".pt", ".pth"):
    return _state_in(torch_file.read(path), f"torch file {path}")
  return safetensors_file.read(path)


def overlay(
  base: Mapping[str, np.ndarray],
  over: Mapping[str, np.ndarray],
  *,
  keep_base: bool = False,
  where: str = "the overlay",
) -> tuple[dict[str, np.ndarray], list[str]]:
  """A base predictor's tensors with a flow predictor's laid over them, as the release loads them.

  Args:
    base: a base predictor's state, without prefix.
    over: a joint training's state: its "flow_predictor.*" is laid over, its Psi-flow comes along.
    keep_base: let the base's predictor stand where `over` has one too.
    where: names `over` in messages.

  Returns:
    (state, overlaid): what both hold together, and the names in it that both files had.

  Raises:
    InputError: `over` holds no flow predictor, or one of another shape.
  """
  state = {f"cwm_model.{name}": array for name, array in base.items()}
  top = "flow_predictor."
  found = {name[len(top) :]: array for name, array in over.items() if name.startswith(top)}
  if not found:
    raise InputError(f"{where} holds no {top}* to lay over the base")
  overlaid = [name for name in found if name in state and not keep_base]
  for name, array in found.items():
    if name in state and array.shape != state[name].shape:
      raise InputError(f"{where}: {name!r} is {array.shape}, the base's is {state[name].shape}")
    if name not in state or not keep_base:
      state[name] = array
  state |= {n: array for n, array in over.items() if n.startswith(JOINT_FLOW_PREDICTOR)}
  return state, overlaid


def from_state(
  state: Mapping[str, np.ndarray],
  *,
  release: str | None = None,
  heads: tuple[int, int] | None = None,
  flow_heads: tuple[int, int] | None = None,
  where: str,
) -> Converted:
  """Our parameters and config from a release's tensors.

  Args:
    state: name -> array of any float type.
    release: a name of `configs/opt_cwm.py`, or for a flow network of `configs/flow_networks.py`,
      which says what shapes do not: the image's size and the attention heads, or the iterations.
      None takes the first whose shapes agree.
    heads: (encoder's, decoder's) number of attention heads; needed where no release agrees.
    flow_heads: the same of Psi-flow; None takes `heads` where no release agrees.
    where: names the state's origin in messages.

  Raises:
    InputError: keys that no rule names or rules without keys (both are listed), or tensors that do
      not fit the model.
  """
  if (kind := flow_keymaps.naming_of(state)) is not None:
    if heads or flow_heads:
      raise InputError(f"{where} is a flow network, which has no attention heads (--heads)")
    return _finite(
      Converted(*flow_conversion.from_state(state, kind, release=release, where=where)), where
    )
  naming = naming_of(state, where=where)
  shapes = keymaps.to_shapes({n: a.shape for n, a in state.items()}, naming.rules(), where=where)
  if flow_heads and naming.flow_predictor is None:
    raise InputError(f"{where} holds no Psi-flow, whose attention heads were given (--flow-heads)")
  config = _config(shapes, naming, release=release, heads=heads, flow_heads=flow_heads, where=where)
  _, expected = weights.expected_shapes(config, where=where)
  if naming.flow_predictor is not None:
    psi_flow = flow_predictors.expected_shapes(config, where=where)
    expected |= {n: x.shape for n, x in weights.flatten({FLOW_PREDICTOR: psi_flow}).items()}
  weights.check_names(shapes, expected, where=where)
  params = keymaps.to_params(state, naming.rules(), where=where)
  return _finite(Converted(params, config, {"naming": asdict(naming)}, {}), where)


def assemble(
  sources: Sequence[str | os.PathLike],
  *,
  release: str | None = None,
  heads: tuple[int, int] | None = None,
  flow_heads: tuple[int, int] | None = None,
  keep_base: bool = False,
) -> Converted:
  """Reads checkpoints in loading order and converts what they make together.

  Args:
    sources: a checkpoint, and possibly a second one that is laid over it.
    release, heads, flow_heads: see `from_state`.
    keep_base: see `overlay`.

  Raises:
    InputError: as `read_state`, `overlay` and `from_state`.
  """
  state, overlaid = read_state(sources[0]), []
  for source in sources[1:]:
    over = read_state(source)
    state, overlaid = overlay(state, over, keep_base=keep_base, where=str(source))
  where = " over ".join(str(source) for source in reversed(sources))
  made = from_state(state, release=release, heads=heads, flow_heads=flow_heads, where=where)
  return made._replace(overlaid=tuple(overlaid))


def to_state(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """A weights file of ours in the release's layout; `from_state` backwards.

  A file that came from no release is written as a bare predictor.

  Raises:
    InputError: not a weights file of ours, or one with parameters that the layout has no place for.
  """
  header = weights.read_header(path)
  params, _ = weights.load(path)
  if mark := weights.load_perturber(path):
    params[PERTURBER] = mark
  if psi_flow := weights.load_flow_predictor(path):
    params[FLOW_PREDICTOR] = psi_flow[1]
  if flow_networks.is_flow_network(header.config):
    # A network that came from no release is written as the releases of its kind are.
    kind = header.extra.get("naming", {}).get(flow_networks.SECTION)
    kind = kind or header.config[flow_networks.SECTION]["kind"]
    return flow_conversion.to_state(params, kind, where=f"weights file {path}")
  given = header.extra.get("naming", {"learned_positions": "encoder_positions" in params})
  try:
    naming = Naming(**given)
    rules = naming.rules()
  except (TypeError, ValueError):
    raise InputError(f"weights file {path}: its record of the release's naming is broken") from None
  return keymaps.to_state(params, rules, where=f"weights file {path}")


def write_state(
  path: str | os.PathLike, state: Mapping[str, np.ndarray], *, dtype: str = "float32"
) -> Path:
  """Writes tensors as a plain safetensors file, whole or not at all.

  Args:
    dtype: "float32" or "bfloat16", how the numbers are stored.

  Raises:
    InputError: an unknown dtype, or a path that cannot be written.
  """
  return weights.write(path, weights.as_stored(state, dtype), {"format": "pt"})


def listing(error: NamesError) -> str:
  """Both whole lists of a mismatch, one name a line."""
  return "\n".join(
    line
    for label, names in error.sides.items()
    for line in (f"{label}:", *(f"  {n}" for n in names))
  )


def _finite(made: Converted, where: str) -> Converted:
  """The same, or an InputError where a parameter is not a number."""
  for name, array in weights.flatten(made.params).items():
    if not np.isfinite(array).all():
      raise InputError(f"{where}: what becomes {name!r} holds values that are not finite")
  return made


def _state_in(content: dict, where: str) -> dict[str, np.ndarray]:
  for section in ("model", "state_dict"):
    if isinstance(content.get(section), dict):
      content = content[section]
  state = {n: a for n, a in content.items() if isinstance(a, np.ndarray) and isinstance(n, str)}
  if not state:
    raise InputError(f"{where} holds no tensors by name")
  if all(name.startswith(_WRAPPER) for name in state):
    state = {name[len(_WRAPPER) :]: array for name, array in state.items()}
  return state


def _config(
  shapes: Mapping[str, tuple[int, ...]],
  naming: Naming,
  *,
  release: str | None,
  heads: tuple[int, int] | None,
  flow_heads: tuple[int, int] | None,
  where: str,
) -> dict[str, Any]:
  """A job config whose model has these shapes; what shapes do not tell comes from the release."""
  from cwm_jax.configs import base, opt_cwm

  told = _told_by_shapes(shapes, naming, where)
  if release is not None and release not in opt_cwm.MODELS:
    raise InputError(f"unknown release {release!r}; choose one of {', '.join(opt_cwm.MODELS)}")
  model = agreeing_release(told, opt_cwm.MODELS, release, where=where)
  if model is None:
    side = told["positions_hw"][0] if naming.learned_positions else 28
    model = told | {"image_hw": (side * told["patch"],) * 2, "mask_ratio": 0.9}
  if heads is not None:
    model["encoder_heads"], model["decoder_heads"] = heads
  if "encoder_heads" not in model:
    raise InputError(f"{where} does not tell how many attention heads it has: give them (--heads)")
  for half in ("encoder", "decoder"):
    width, count = model[f"{half}_width"], model[f"{half}_heads"]
    if count < 1 or width % count:
      raise InputError(f"{where}: a width of {width} does not divide into {count} attention heads")
  job = base.get_config()
  job.model.update(model)
  if naming.flow_predictor is not None:
    top = f"{FLOW_PREDICTOR}/"
    psi_flow = {n.removeprefix(top): s for n, s in shapes.items() if n.startswith(top)}
    told = flow_predictors.told_by_shapes(
      psi_flow, naming.links, heads=flow_heads, predictor_heads=heads, where=where
    )
    job.flow_predictor.update(told)
  config = job.to_dict()
  if naming.perturber is not None:
    trained_grid = model["positions_hw"]
    trained_at = trained_grid[0] * model["patch"] if trained_grid else model["image_hw"][0]
    config["mark"] = {
      "kind": "learned",
      "hidden_width": axis_of(shapes, f"{PERTURBER}/fc1/bias", 0, where=where),
      "size": opt_cwm.PERTURBER["size"],
      "scale": max(1, model["image_hw"][0] // trained_at),
    }
  return config


def _told_by_shapes(
  shapes: Mapping[str, tuple[int, ...]], naming: Naming, where: str
) -> dict[str, Any]:
  """The keys of a `model` section that a predictor's shapes fix."""
  pixels, width = shapes["patch_embed/kernel"]
  patch = isqrt(pixels // 3)
  learned = naming.learned_positions
  positions = axis_of(shapes, "encoder_positions", 0, where=where) if learned else 0
  side = isqrt(positions // 2)
  if prod((3, patch, patch)) != pixels or 2 * side * side != positions:
    raise InputError(f"{where}: its patches or its position tables are not square")
  if not patch or (learned and not side):
    raise InputError(f"{where}: its patches or its position tables are empty")
  depth = {half: shapes[f"{half}/blocks/norm1/scale"][0] for half in ("encoder", "decoder")}
  return {
    "patch": patch,
    "masking": "token" if learned else "drop",
    "positions": "learned" if learned else "sine",
    "positions_hw": (side, side) if learned else (),
    "encoder_width": width,
    "encoder_depth": depth["encoder"],
    "decoder_width": axis_of(shapes, "encoder_to_decoder/bias", 0, where=where),
    "decoder_depth": depth["decoder"],
    "mlp_ratio": axis_of(shapes, "encoder/blocks/fc1/bias", 1, where=where) / width,
    "context": 0,
  }
