"""One safetensors file per model: '/'-joined Flax paths, the config in the metadata."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cwm_jax import whole_files
from cwm_jax.pretrained import flow_networks, flow_predictors, learned_marks, sections
from cwm_jax.pretrained.merge import check_names
from cwm_jax.pretrained.safetensors_file import FLOATS, TensorInfo, read_arrays, read_table
from cwm_jax.types import InputError, first_line

_SHIPPED = "predictor-tiny"
# What lies beside a predictor in its file.
_BESIDE = (f"{learned_marks.PERTURBER}/", f"{flow_predictors.FLOW_PREDICTOR}/")
_STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class Header(NamedTuple):
  """What a weights file says about itself.

  config:  the whole job config; `config["model"]` is what `models.build` takes.
  extra:   further facts that were stored beside it (the model card's numbers); may be empty.
  tensors: name -> TensorInfo, in the file's order.
  """

  config: dict[str, Any]
  extra: dict[str, Any]
  tensors: dict[str, TensorInfo]


def shipped(name: str = _SHIPPED) -> Path:
  """A weights file that comes with the package, by its name; the predictor unless another is meant.

  Raises:
    InputError: this copy of the package carries none of that name.
  """
  path = _shipped_folder() / f"{name}.safetensors"
  if not path.is_file():
    raise InputError(f"this copy of the package carries no {path.name}; name a weights file")
  return path


def shipped_names() -> list[str]:
  """The names of the weights files that come with the package."""
  return sorted(path.stem for path in _shipped_folder().glob("*.safetensors"))


def _shipped_folder() -> Path:
  return Path(str(resources.files("cwm_jax.weights")))


def save(
  path: str | os.PathLike,
  params: dict[str, Any],
  config: dict[str, Any],
  *,
  extra: dict[str, Any] | None = None,
  dtype: str = "float32",
) -> Path:
  """Writes parameters and config to one safetensors file, whole or not at all.

  Args:
    path: where to; its folder must exist.
    params: nested dict of arrays, as Flax makes it; a leading {"params": ...} is not taken off.
    config: JSON-ready dict with a "model" section.
    extra: JSON-ready facts for the model card.
    dtype: "float32" or "bfloat16", how the numbers are stored.

  Returns:
    The path written.

  Raises:
    InputError: an unknown dtype, a config that JSON cannot hold, or a path that cannot be written.
  """
  flat = as_stored(flatten(params), dtype)
  try:
    metadata = {"config": json.dumps(config), "extra": json.dumps(extra or {})}
  except TypeError as error:
    raise InputError(f"the config cannot be written as JSON: {error}") from None
  return write(path, flat, metadata)


def as_stored(arrays: Mapping[str, Any], dtype: str) -> dict[str, np.ndarray]:
  """The arrays as they go into a file.

  Raises:
    InputError: a dtype other than "float32" and "bfloat16".
  """
  if dtype not in _STORED:
    raise InputError(f"weights can be stored as {' or '.join(_STORED)}, not {dtype!r}")
  return {name: np.asarray(value, _STORED[dtype], order="C") for name, value in arrays.items()}


def write(path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Path:
  """Writes a safetensors file, whole or not at all.

  Raises:
    InputError: a path that cannot be written; its cause is the system's error.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import save_file

  path = Path(path)
  try:
    with whole_files.writing(path) as partial:
      partial.touch()  # tells in the system's words why it cannot be written
      mode = partial.stat().st_mode
      save_file(arrays, partial, metadata)
      partial.chmod(mode)  # the library makes files that nobody else may read
  except (OSError, SafetensorError) as error:
    # The library tells the system's errors by their number in a text of its own.
    told = re.search(r"os error (\d+)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    reason = os.strerror(number) if number else " ".join(str(error).split())
    cause = OSError(number, reason, os.fspath(path)) if number else error
    raise InputError(f"cannot write weights to {path}: {reason}") from cause
  return path


def load(path: str | os.PathLike | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a weights file; None takes the one that comes with the package.

  Returns:
    (params, config): the predictor's parameters, a nested dict of float32 NumPy arrays, and the
    config stored with them. A learned mark's are `load_perturber`'s, Psi-flow's
    `load_flow_predictor`'s.

  Raises:
    InputError: not a safetensors file, cut short, inconsistent, without a config, or with numbers
      that are not finite.
  """
  path = shipped() if path is None else path
  header = read_header(path)
  tensors = {n: t for n, t in header.tensors.items() if not n.startswith(_BESIDE)}
  return _load(path, tensors), header.config


def load_perturber(path: str | os.PathLike) -> dict[str, Any] | None:
  """Reads the parameters of the learned mark that a weights file holds beside its predictor.

  Returns:
    A nested dict of float32 NumPy arrays, or None where the file's mark is not a learned one.

  Raises:
    InputError: as `load`, or parameters that are not those of the mark that the config describes.
  """
  header = read_header(path)
  if not learned_marks.is_learned(header.config):
    return None
  where = f"weights file {path}"
  _, expected = expected_shapes(header.config, where=where)
  found = {n: t for n, t in header.tensors.items() if _is_mark(n)}
  wanted = {n: shape for n, shape in expected.items() if _is_mark(n)}
  check_names({n: t.shape for n, t in found.items()}, wanted, where=where)
  return _load(path, found)[learned_marks.PERTURBER]


def load_flow_predictor(path: str | os.PathLike) -> tuple[Any, dict[str, Any]] | None:
  """Reads the Psi-flow that a weights file holds beside its predictor.

  Returns:
    (module, params): the Linen module, and a nested dict of float32 NumPy arrays; or None where the
    file holds none.

  Raises:
    InputError: as `load`, or parameters that are not those of the Psi-flow the config describes.
  """
  header, name = read_header(path), flow_predictors.FLOW_PREDICTOR
  found = {n: t for n, t in header.tensors.items() if n.startswith(f"{name}/")}
  if not found:
    return None
  where = f"weights file {path}"
  wanted = flatten({name: flow_predictors.expected_shapes(header.config, where=where)})
  shapes = {n: leaf.shape for n, leaf in wanted.items()}
  check_names({n: t.shape for n, t in found.items()}, shapes, where=where)
  return flow_predictors.build(header.config, where=where), _load(path, found)[name]


def _load(path: str | os.PathLike, tensors: dict[str, TensorInfo]) -> dict[str, Any]:
  flat = {}
  for name, values in read_arrays(path, tensors).items():
    flat[name] = np.array(values, np.float32)
    if not np.isfinite(flat[name]).all():
      raise InputError(f"weights file {path}: {name!r} holds values that are not finite")
  return unflatten(flat)


def _is_mark(name: str) -> bool:
  return name.startswith(f"{learned_marks.PERTURBER}/")


def load_model(path: str | os.PathLike) -> tuple[Any, dict[str, Any], dict[str, Any]]:
  """Reads a weights file and builds the model that its config describes.

  Returns:
    (module, params, config): the Linen module, its parameters, and the config.

  Raises:
    InputError: as `load` and `check_fit`.
  """
  params, config = load(path)
  return check_fit(params, config, where=f"weights file {path}"), params, config


def check_fit(params: dict[str, Any], config: dict[str, Any], *, where: str) -> Any:
  """Builds the config's model and checks that the parameters are exactly its own.

  Args:
    params: nested dict of arrays.
    config: a job config with a "model" section.
    where: names the parameters' origin in error messages.

  Returns:
    The Linen module.

  Raises:
    InputError: the config describes no model, or parameters are missing, unexpected, or of another
      shape.
  """
  module, shapes = expected_shapes(config, where=where)
  shapes = {name: shape for name, shape in shapes.items() if not _is_mark(name)}
  check_names({n: np.shape(v) for n, v in flatten(params).items()}, shapes, where=where)
  return module


def expected_shapes(config: dict[str, Any], *, where: str) -> tuple[Any, dict[str, tuple]]:
  """Builds the config's model and works out, without computing, which parameters it has.

  Args:
    config: a job config with a "model" section, or a "flow_network" one with a kind.
    where: names its origin in error messages.

  Returns:
    (module, shapes): the Linen module, and name -> shape of each parameter, its own and those of
    a learned mark under "perturber/".

  Raises:
    InputError: the section lacks a key or holds a value that cannot be built.
  """
  import jax

  from cwm_jax import models

  try:
    if flow_networks.is_flow_network(config):
      module, wanted = flow_networks.expected(config)
      return module, {name: leaf.shape for name, leaf in flatten(wanted).items()}
    model = config["model"]
    module = models.build(model)
    h, w = model["image_hw"]
    grid = (h // model["patch"], w // model["patch"])
    variables = jax.eval_shape(
      lambda: module.init(
        jax.random.key(0),
        jax.numpy.zeros((1, 2, h, w, 3)),
        jax.numpy.zeros((1, 2, *grid), bool),
        num_visible=2 * grid[0] * grid[1],
      )
    )
  except KeyError as error:
    raise InputError(f"{where}: its config lacks {error}") from None
  except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
    raise InputError(f"{where}: its config describes no model ({first_line(error)})") from None
  wanted = dict(variables["params"])
  if learned_marks.is_learned(config):
    wanted[learned_marks.PERTURBER] = learned_marks.expected_shapes(
      config, token_width=model["encoder_width"]
    )
  return module, {name: leaf.shape for name, leaf in flatten(wanted).items()}


def is_ours(path: str | os.PathLike) -> bool:
  """Whether a safetensors file carries a config, as this project's do.

  Raises:
    InputError: not a safetensors file, cut short, or inconsistent.
  """
  metadata = read_table(path, where=f"weights file {path}").metadata
  return isinstance(metadata, dict) and "config" in metadata


def read_header(path: str | os.PathLike) -> Header:
  """Reads and checks everything but the numbers; touches no more of the file than its header.

  Raises:
    InputError: as `load`, except for numbers that are not finite.
  """
  where = f"weights file {path}"
  metadata, tensors = read_table(path, where=where, dtypes=FLOATS)
  config = _section(metadata, "config", where)
  model = sections.section(config, "model")
  if model is None:
    raise InputError(f"{where} was not written by this project: its config has no 'model' section")
  config["model"] = elsewhere(model)
  extra = _section(metadata, "extra", where) if "extra" in metadata else {}
  return Header(config, extra, tensors)


def elsewhere(model: Mapping[str, Any]) -> dict[str, Any]:
  """A stored `model` section as it goes with another machine, and with files from before a key.

  How attention was computed where the parameters were written says nothing about this machine.
  """
  return {"attention_dtype": "", **model, "attention_impl": ""}


def flatten(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dict to {'/'-joined path: array}.

  Raises:
    InputError: a key that is not text or holds a '/'.
  """
  flat = {}
  for key, value in params.items():
    if not isinstance(key, str) or "/" in key or not key:
      raise InputError(f"a parameter cannot be named {key!r}")
    name = f"{prefix}{key}"
    flat.update(flatten(value, f"{name}/") if isinstance(value, dict) else {name: value})
  return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  """{'/'-joined path: array} to a nested dict; the inverse of `flatten`.

  Raises:
    InputError: one name is both an array and the folder of another.
  """
  nested: dict[str, Any] = {}
  for name, value in flat.items():
    *folders, leaf = name.split("/")
    node = nested
    for folder in folders:
      node = node.setdefault(folder, {})
      if not isinstance(node, dict):
        raise InputError(f"parameter name {name!r} runs through another parameter")
    if leaf in node:
      raise InputError(f"parameter name {name!r} is used twice")
    node[leaf] = value
  return nested


def _section(metadata: Any, key: str, where: str) -> dict[str, Any]:
  text = metadata.get(key) if isinstance(metadata, dict) else None
  if not isinstance(text, str):
    raise InputError(f"{where} was not written by this project: it carries no {key}")
  try:
    section = json.loads(text)
  except (ValueError, RecursionError):
    section = None
  if not isinstance(section, dict):
    raise InputError(f"{where}: its {key} is not a JSON object")
  return section
