"""Checkpoints of {training state, data iterator}, and the config they belong to.

Layout of a workdir: `config.json`; `checkpoints/<step>/{state,data}` (Orbax); a checkpoint that
could not be read is moved to `unreadable/`, never deleted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from cwm_jax import fingerprint, processes, whole_files, workdirs
from cwm_jax.types import InputError, SaveError

log = logging.getLogger(__name__)

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
_FINGERPRINTS = "fingerprints"
# Keys, as a regular expression, that say where and how quickly something runs.
HOW_IT_RUNS = (
  r"cpu_devices|data\.(prefetch|num_workers)|optim\.accumulate|joint\.points_at_once"
  r"|(model|flow_predictor)\.(remat|attention_impl)"
)
# A resumed run may change these: where it runs, how long, how often it reports; not what it learns.
_FREE = re.compile(
  r"job|stop_after|init_from|profile_steps|debug_nans|(log|checkpoint|mesh|evaluate|study)\..*"
  rf"|sharding|{HOW_IT_RUNS}"
)


class Checkpoints:
  """The checkpoints of one workdir.

  Args:
    workdir: see the module's docstring for what lies in it.
    keep: how many of the newest are kept.
    keep_every: multiples of this step are kept for good; 0 keeps none.

  Raises:
    InputError: the folder cannot be written.
  """

  def __init__(self, workdir: str | os.PathLike, *, keep: int = 2, keep_every: int = 0):
    self._workdir, self._failed = workdirs.check_writable(workdir), False
    policies = [ocp.training.preservation_policies.LatestN(max(1, keep))]
    if keep_every:
      policies.append(ocp.training.preservation_policies.EveryNSteps(keep_every))
    # The loop says when to save; the library's own decision would drop some of those.
    self._manager = ocp.training.Checkpointer(
      self._workdir / CHECKPOINTS,
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(policies),
      # A save that was cut short left a temporary folder: it was never a checkpoint.
      cleanup_tmp_directories=True,
    )

  @property
  def steps(self) -> list[int]:
    """Steps that have a finished checkpoint, ascending."""
    return [checkpoint.step for checkpoint in self._manager.checkpoints]

  def save(self, step: int, state: Any, iterator: Any) -> None:
    """Starts saving; returns as soon as the device arrays are copied and the iterator is noted.

    Raises:
      SaveError: this save, or the one before, could not be written.
    """
    self.wait()
    if step in self._agreed_steps():
      return
    with self._telling_of_failure():
      self._manager.save_checkpointables_async(
        step,
        dict(state=state, data=iterator),
        force=True,
        custom_metadata={_FINGERPRINTS: fingerprint.of_tree(state)},
      )

  def restore(self, abstract_state: Any, iterator: Any) -> Any | None:
    """The newest state that can be read, with `iterator` set to where it was; None without any.

    Args:
      abstract_state: tree of `ShapeDtypeStruct` with shardings.
      iterator: a fresh iterator of the same pipeline; restored in place.

    Raises:
      InputError: there are checkpoints and none can be read.
    """
    reasons = []
    for step in reversed(self._agreed_steps()):
      folder = self._workdir / CHECKPOINTS / f"{step}"
      try:
        # What each process does alone, and only then what all do together.
        with _all_or_none():
          described = ocp.metadata(folder, checkpointable_name="state").custom_metadata
        with _all_or_none(), _alone():
          wanted = dict(state=abstract_state, data=iterator)
          state = ocp.load_checkpointables(folder, wanted)["state"]
        with _all_or_none():
          _compare(described, state)
      except _UnreadableError as error:
        reasons.append((step, str(error)))
        log.warning("checkpoint of step %d cannot be read (%s); trying the one before", step, error)
        continue
      self._set_aside([step for step, _ in reasons])
      return state
    if reasons:
      told = "; ".join(f"step {step}: {reason}" for step, reason in reasons)
      raise InputError(
        f"none of the checkpoints in {self._workdir / CHECKPOINTS} can be read ({told}); "
        "restore a copy, or give a new workdir"
      )
    return None

  def wait(self) -> None:
    """Returns when the last save is on disk.

    Raises:
      SaveError: it could not be written.
    """
    with self._telling_of_failure():
      self._manager.wait()

  def close(self) -> None:
    """Waits and releases threads; a failure that was told is not told again."""
    with contextlib.suppress(*[Exception] if self._failed else []):
      self._manager.close()

  @contextlib.contextmanager
  def _telling_of_failure(self) -> Iterator[None]:
    try:
      yield
    # Orbax passes on what its threads met: its own errors, the file system's, TensorStore's.
    except Exception as error:
      self._failed = True
      good = f"of step {self.steps[-1]}" if self.steps else "none"
      raise SaveError(
        f"a checkpoint could not be written to {self._workdir / CHECKPOINTS} "
        f"({_first_line(error)}); the last good one is {good}: make room or mend the disk, and "
        "start again with the same command"
      ) from error

  def _agreed_steps(self) -> list[int]:
    """`steps` as process 0 has them, for whom all others save and read; all must ask together."""
    return json.loads(processes.of_first_process(json.dumps(self.steps).encode()))

  def _set_aside(self, steps: list[int]) -> None:
    """Moves unreadable checkpoints away, so that the run can save at the same steps again."""
    if not steps:
      return
    if jax.process_index() == 0:
      folder = self._workdir / "unreadable"
      folder.mkdir(exist_ok=True)
      for step in steps:
        target = folder / f"{step}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(self._workdir / CHECKPOINTS / f"{step}", target)
    # Nobody lists what is there before it is as it stays.
    processes.meet()
    self._manager.reload()


class _UnreadableError(Exception):
  """A checkpoint that some process cannot read; raised in all of them."""


@contextlib.contextmanager
def _all_or_none() -> Iterator[None]:
  """A block that fails in all processes where it fails in one, so that they stay in step."""
  reason = ""
  try:
    yield
  # Orbax raises many types, some its own, for a file that is damaged.
  except Exception as error:
    reason = _first_line(error)
  if processes.any_process(bool(reason)):
    raise _UnreadableError(reason or "another process cannot read its part")


def _alone() -> ocp.Context:
  """A block in which this process reads without waiting for others, which may have failed to."""
  context = ocp.Context()
  own = jax.process_index()
  context.multiprocessing.active_processes, context.multiprocessing.primary_host = {own}, own
  return context


def keep_config(
  workdir: str | os.PathLike, config: dict[str, Any], *, defaults: dict[str, Any] | None = None
) -> None:
  """Compares `config` with the one the workdir's checkpoints were made with, then writes it down.

  What the older config lacks came with a later version of the project, whose default does what was
  done before: such a key keeps its default, with a line in the log. `total` may change, with a line
  too.

  Args:
    workdir: holds `config.json` if it was used before.
    config: JSON-ready nested dict.
    defaults: the same, of all keys there are.

  Raises:
    InputError: a key that shapes the model, its optimizer or its data has changed.
  """
  path = Path(workdir) / CONFIG
  text = json.dumps(config, indent=1)
  begun = begun_with(workdir)
  if begun is not None:
    stored, after = flat(begun), flat(json.loads(text))
    before = flat(json.loads(json.dumps(defaults or {}))) | stored
    changed = [
      key
      for key in sorted(stored | after)
      if before.get(key) != after.get(key) and not _FREE.fullmatch(key)
    ]
    lacking = sorted(after.keys() - stored.keys() - {*changed})
    if lacking:
      log.info("%s was begun without these keys, which keep defaults: %s", workdir, lacking)
    if "total" in changed:
      changed.remove("total")
      log.info("total was %s and is now %s: schedules follow", before["total"], after["total"])
    if changed:
      told = ", ".join(f"{key} ({before.get(key)!r} -> {after.get(key)!r})" for key in changed)
      raise InputError(
        f"workdir {workdir} was begun with another config: {told}; "
        "change it back, or start a new workdir with init_from set to this one"
      )
  if jax.process_index() == 0:
    with whole_files.writing(path) as partial:
      partial.write_text(text + "\n")


def begun_with(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """The config of a workdir that has checkpoints, which a run there goes on with; else None.

  Raises:
    InputError: as `read_config`.
  """
  folder = Path(workdir)
  if (folder / CONFIG).exists() and any((folder / CHECKPOINTS).glob("[0-9]*")):
    return read_config(folder)
  return None


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """The config a workdir was last run with.

  Raises:
    InputError: there is none, or it is not JSON.
  """
  path = Path(workdir) / CONFIG
  try:
    return json.loads(path.read_text())
  except OSError as error:
    raise InputError(f"{path} cannot be read ({error.strerror}): is it a workdir?") from None
  except ValueError:
    raise InputError(f"{path} is not JSON") from None


def load_params(workdir: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """The newest readable parameters of a training run; the running average where one is kept.

  Returns:
    (params, config): a nested dict of float32 NumPy arrays and the run's config.

  Raises:
    InputError: not a workdir, or no checkpoint that can be read.
  """
  workdir = Path(workdir).absolute()
  config = read_config(workdir)
  found = (workdir / CHECKPOINTS).glob("*")
  steps = sorted((int(p.name) for p in found if p.name.isdigit()), reverse=True)
  for step in steps:
    try:
      return _read_params(workdir / CHECKPOINTS / f"{step}"), config
    # As in `restore`: any damage reads as "try the one before".
    except Exception as error:
      log.warning("checkpoint of step %d cannot be read (%s)", step, _first_line(error))
  raise InputError(f"no checkpoint in {workdir / CHECKPOINTS} can be read")


def _read_params(folder: Path) -> dict[str, Any]:
  """The average, or else the parameters, of one checkpoint; reads nothing else of it."""
  described = ocp.metadata(folder, checkpointable_name="state")
  stored = described.metadata
  chosen = "ema" if stored["ema"] else "params"
  # Onto one device, whatever mesh they were saved from.
  place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  wanted = {name: jax.tree.map(lambda _: ocp.PLACEHOLDER, tree) for name, tree in stored.items()}
  wanted[chosen] = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), stored[chosen]
  )
  with _alone():
    state = ocp.load_checkpointables(folder, dict(state=wanted))["state"]
  _compare(described.custom_metadata, state[chosen], prefix=f"{chosen}/")
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), state[chosen])


def _compare(metadata: dict[str, Any] | None, state: Any, prefix: str = "") -> None:
  """Raises ValueError unless what was read has the fingerprints that it was saved with.

  Checkpoints of before there were fingerprints pass.

  Args:
    prefix: path of `state` in the tree that was saved.
  """
  saved = (metadata or {}).get(_FINGERPRINTS)
  if saved is None:
    return
  for name, value in fingerprint.of_tree(state).items():
    if saved[prefix + name] != value:
      raise ValueError(f"{prefix}{name} is not what was saved")


def _first_line(error: Exception) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dict to {'a.b.c': value}."""
  found = {}
  for key, value in config.items():
    if isinstance(value, dict):
      found.update(flat(value, f"{prefix}{key}."))
    else:
      found[prefix + key] = value
  return found
