"""`cwm-jax eval`, `train` and `label`: the jobs of `cwm_jax.main` without a config file to write.

All are resumable: the same command goes on where the last one ended.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cwm_jax import commands, compilation_cache, terminal
from cwm_jax.types import InputError

_SCENES = 100  # when nothing else is asked for
# What runs configs that are no trainings, by their key `job`.
_RUNS = {
  "evaluate": "cwm-jax eval",
  "label": "cwm-jax label",
  "prepare": "cwm-jax prepare",
  "study": "bash launch/study",
}


def evaluate(
  *,
  tapvid: str | None,
  flow_pairs: str | None,
  scenes: int | None,
  segments: int | None,
  trackers: Sequence[str] | None,
  protocols: Sequence[str] | None,
  weights: str | None,
  readout: str | None,
  zoom: int | None,
  settings: Sequence[str],
  out: str,
  as_json: bool,
) -> None:
  """Evaluates trackers on TAP-Vid clips, frame pairs with true flow, or procedural scenes.

  Args:
    tapvid, flow_pairs, scenes: the data; without any, 100 procedural scenes.
    segments: on how many scenes mm<N> are asked what moves along with a point of an object.
    trackers: such as mm10, zero, phase, a weights file; None takes the config's.
    weights: what mm<N> asks; None takes the shipped ones.
    readout, zoom: of these; None takes the config's.
    settings: KEY=VALUE, of section `evaluate` or of any.
    out: folder for results.json, reports and figures.
    as_json: print the numbers instead of tables.

  Raises:
    InputError: anything given that cannot be used.
  """
  from cwm_jax import evaluate as job
  from cwm_jax.configs import base
  from cwm_jax.pretrained import releases

  config = base.get_config()
  config.job = "evaluate"
  if not (tapvid or flow_pairs or scenes or segments):
    scenes = _SCENES
  given = {
    "tapvid": tapvid,
    "flow_pairs": flow_pairs,
    "scenes": scenes,
    "segments": segments,
    "trackers": trackers and tuple(trackers),
    "protocols": protocols and tuple(protocols),
    "weights": weights and str(releases.locate(weights)),
    "readout": readout,
    "zoom": zoom,
  }
  config.evaluate.update({name: value for name, value in given.items() if value is not None})
  set_keys(config, settings)
  config.lock()
  printed = io.StringIO()
  compilation_cache.keep_programs()
  with terminal.log_shown(), contextlib.redirect_stdout(printed if as_json else sys.stdout):
    numbers = job.run(config, out)
  files = [Path(out) / job.RESULTS]
  facts = {"results": numbers, "files": [str(path) for path in files]}
  commands.report(facts, commands.written(files).strip("\n"), as_json=as_json)


def train(
  *,
  workdir: str,
  config_name: str | None,
  videos: str | None,
  weights: str | None,
  steps: int | None,
  minutes: float | None,
  batch: int | None,
  settings: Sequence[str],
  as_json: bool,
) -> int:
  """Carries weights on with on a folder of videos, or trains by a named config.

  Leaves WORKDIR/model.safetensors, which `--weights` of every command takes, also where it is
  interrupted; of a joint training WORKDIR/mark.safetensors, the mark that it learned.

  Args:
    workdir: for checkpoints, metrics, pictures.
    config_name: NAME or NAME:ARGUMENT of configs/; None takes `finetune`.
    videos: folder of videos, list file or one video.
    weights: what to start from: a weights file, a release's name, another run's folder; None takes
      what WORKDIR was begun with or the shipped ones for `finetune`, and what the config says for
      others. The file that a joint training is given is the predictor it asks, and a folder one of
      its own kind.
    steps: how long to train in all; None takes the config's.
    minutes: leave after so long; the same command goes on.
    batch: pairs a step.
    settings: KEY=VALUE of any config key.

  Returns:
    The exit code: 0 done, 3 where the loss stopped being a number, 130 when it was interrupted.

  Raises:
    InputError: anything given that cannot be used.
  """
  from cwm_jax import checkpoint, sharding
  from cwm_jax import train as job

  config = load_config(config_name or "finetune")
  if config.job != "train":
    raise InputError(f"config {config_name} is no training; run it by {_RUNS[config.job]}")
  if config_name is None:
    if videos is None and not settings:
      raise InputError("name your videos by --videos FOLDER, or a config by --config NAME")
    begun = checkpoint.begun_with(workdir)
    source = begun and begun.get("init_from")
    if source and weights is None and Path(source).exists():
      weights = source
    _start_from(config, weights)
    # A run may become longer; what it learned with stays.
    if begun is not None:
      config.optim.warmup = begun["optim"]["warmup"]
      config.pretrain.target = begun["pretrain"]["target"]
    elif steps is not None:
      config.optim.warmup = f"{min(50, steps // 10)} steps"
  elif weights is not None and Path(weights).is_dir():
    if config.task == "joint" and checkpoint.read_config(weights).get("task") != "joint":
      raise InputError(
        f"{weights} is of no joint training: convert it first, by cwm-jax convert {weights} FILE, "
        "and give --from that FILE, the predictor to be asked"
      )
    config.init_from = weights
  elif weights is not None:
    # A joint training takes no step on a predictor; a file holds nothing that it could go on from.
    section, key = (config.joint, "weights") if config.task == "joint" else (config, "init_from")
    section[key] = _located(weights)
  if videos is not None:
    config.data.sources.video.paths = videos
    if not config.data.sources.video.weight:
      config.data.sources.video.weight = 1.0
  if steps is not None:
    config.total = f"{steps} steps"
  if minutes is not None:
    config.stop_after = f"{minutes:g} minutes"
  if batch is not None:
    config.data.batch_size = batch
  set_keys(config, settings)
  config.lock()
  sharding.play_devices(config.cpu_devices)
  compilation_cache.keep_programs()
  with terminal.log_shown(), _ctrl_c_saves() as interrupted:
    try:
      state = job.train(config, workdir)
    except job.NonFiniteError as error:
      print(f"error: {error}", file=sys.stderr)
      return 3
  step = int(state.step)
  if step:  # else there is no checkpoint yet
    _convert(workdir, "mark" if config.task == "joint" else "model", as_json=as_json)
  if interrupted:
    print(f"interrupted at step {step}; the same command goes on", file=sys.stderr)
    return 130
  return 0


def _convert(workdir: str, name: str, *, as_json: bool) -> None:
  """Writes WORKDIR/NAME.safetensors from the newest checkpoint, and says so."""
  from cwm_jax import conversion

  conversion.run(
    source=workdir,
    out=str(Path(workdir) / f"{name}.safetensors"),
    dtype="float32",
    over=None,
    keep_base=False,
    like=None,
    heads=None,
    as_json=as_json,
  )


def label(
  *,
  videos: str | None,
  tracker: str | None,
  pairs: int | None,
  points: int | None,
  settings: Sequence[str],
  out: str,
  as_json: bool,
) -> None:
  """Asks a tracker about points of many pairs and keeps its answers for training.

  Args:
    videos: folder of videos, list file or one video; None takes rendered scenes.
    tracker, pairs, points: see section `label` of configs/base.py; None takes the config's.
    settings: KEY=VALUE of any config key.
    out: folder for shards, manifest and pictures.
    as_json: print the manifest instead of a line.

  Raises:
    InputError: anything given that cannot be used.
  """
  from cwm_jax import label as job

  config = load_config("label")
  given = {"tracker": tracker, "pairs": pairs, "points": points}
  config.label.update({name: value for name, value in given.items() if value is not None})
  if videos is not None:
    config.data.sources.scenes.weight = 0.0
    config.data.sources.video.update(weight=1.0, paths=videos)
  set_keys(config, settings)
  config.lock()
  compilation_cache.keep_programs()
  with terminal.log_shown():
    manifest = job.run(config, out)
  text = f"{manifest['points']} points of {manifest['pairs']} pairs"
  if not manifest["complete"]:
    text += "; the same command goes on"
  files = [Path(out) / name for name in (*manifest["shards"], job.MANIFEST)]
  facts = {**manifest, "files": [str(path) for path in files]}
  commands.report(facts, text + commands.written([files[-1]]), as_json=as_json)


def load_config(name: str) -> Any:
  """The config NAME or NAME:ARGUMENT that comes with the package, unlocked.

  Raises:
    InputError: there is none of that name, or it refuses the argument.
  """
  module, _, argument = name.partition(":")
  known = sorted(p.stem for p in Path(_configs().__path__[0]).glob("*.py") if p.stem[0] != "_")
  if module not in known:
    trainings = [name for name in known if load_config(name).job == "train"]
    raise InputError(f"there is no config {module!r}; choose one of {', '.join(trainings)}")
  make = importlib.import_module(f"cwm_jax.configs.{module}").get_config
  try:
    return make(argument) if argument else make()
  except (TypeError, ValueError) as error:
    raise InputError(f"config {name}: {error}") from None


def set_keys(config: Any, settings: Sequence[str]) -> None:
  """Sets config keys from KEY=VALUE; a value is a Python literal or, for a text key, text.

  Raises:
    InputError: no such key, naming its nearest neighbour, or a value of another kind.
  """
  for setting in settings:
    path, equals, text = setting.partition("=")
    if not equals:
      raise InputError(f"{setting!r} is not KEY=VALUE")
    section, names = config, path.split(".")
    for depth, name in enumerate(names):
      if not hasattr(section, "keys") or name not in section:
        near = difflib.get_close_matches(name, list(getattr(section, "keys", list)()), n=1)
        wanted = ".".join([*names[:depth], *near])
        hint = f": did you mean {wanted!r}?" if near else ""
        raise InputError(f"the config has no key {path!r}{hint}")
      if depth < len(names) - 1:
        section = section[name]
    try:
      value = text if isinstance(section[names[-1]], str) else ast.literal_eval(text)
      section[names[-1]] = value
    except (ValueError, SyntaxError, TypeError):
      kind = type(section[names[-1]]).__name__
      raise InputError(f"{path} is of type {kind}, and {text!r} is not") from None


def _start_from(config: Any, weights: str | None) -> None:
  """Makes the config's network that of the weights, which become its first parameters.

  What they learned to predict, `pretrain.target`, they go on with.

  Args:
    weights: a weights file, a release's name or another run's folder; None takes the shipped ones.

  Raises:
    InputError: none of these, or no predictor's.
  """
  from cwm_jax import checkpoint
  from cwm_jax.pretrained import flow_networks, sections
  from cwm_jax.pretrained import weights as weights_file

  if weights is not None and Path(weights).is_dir():
    path, theirs = weights, checkpoint.read_config(weights)
    # Every run's config describes a predictor; of other tasks it is not what was trained.
    trained = theirs.get("task") == "pretrain"
  else:
    path = str(weights_file.shipped()) if weights is None else _located(weights)
    theirs = weights_file.read_header(path).config
    trained = not flow_networks.is_flow_network(theirs)
  model = sections.section(theirs, "model")
  if not trained or model is None:
    raise InputError(f"{path} holds no predictor; only a predictor can be trained on videos alone")
  for name, value in weights_file.elsewhere(model).items():
    config.model[name] = tuple(value) if isinstance(value, list) else value
  if not sections.predicts_colours(theirs):
    config.pretrain.target = "normalised"
  config.init_from = path


def _located(weights: str) -> str:
  from cwm_jax.pretrained import releases

  return str(releases.locate(weights))


def _configs() -> Any:
  return importlib.import_module("cwm_jax.configs")


@contextlib.contextmanager
def _ctrl_c_saves() -> Iterator[list[bool]]:
  """A block in which Ctrl-C, the first time, ends training as SIGTERM does: saved, at a step's end.

  Yields:
    A list that is empty until then.
  """
  seen: list[bool] = []

  def hear(*_):
    if seen:
      os._exit(130)
    seen.append(True)
    print(
      "\nsaving, also as a weights file; Ctrl-C again leaves at once (`cwm-jax convert` makes a "
      "weights file from the last checkpoint)",
      file=sys.stderr,
      flush=True,
    )
    os.kill(os.getpid(), signal.SIGTERM)

  # The command line's own way of leaving at once is put aside meanwhile.
  wake = signal.set_wakeup_fd(-1)
  before = signal.signal(signal.SIGINT, hear)
  try:
    yield seen
  finally:
    signal.signal(signal.SIGINT, before)
    signal.set_wakeup_fd(wake)
