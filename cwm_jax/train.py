"""The one training loop, for every task: mesh, data, state, restore, loop, in execution order.

Inside the loop the order is fixed: evaluate, save, and only then fetch a batch and update, so that
the saved iterator never runs ahead of the saved weights. Metrics are read one step late, so that
the host prepares the next batch while the device works.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import (
  checkpoint,
  processes,
  programs,
  progress,
  schedule,
  sharding,
  tasks,
  workdirs,
  writers,
)
from cwm_jax import leaving as leaving_lib
from cwm_jax.configs import base
from cwm_jax.data import loader, rendering
from cwm_jax.pretrained import merge, weights
from cwm_jax.types import InputError, TrainState

log = logging.getLogger(__name__)

_PICTURED = 8  # pairs of a batch that are drawn


class NonFiniteError(RuntimeError):
  """The loss or its gradient is not finite; the message says where and what is safe."""


class Outcome(NamedTuple):
  """A run's last state, and where and why it ended.

  total_steps: the step at which `config.total` is reached, whatever its unit.
  told: whether SIGTERM, to whichever process of the job, ended it before.
  """

  state: TrainState
  total_steps: int
  told: bool

  @property
  def finished(self) -> bool:
    """False where it left earlier, told to or by `stop_after`."""
    return int(self.state.step) >= self.total_steps


def train(config: Any, workdir: str | Path) -> TrainState:
  """`run`, of which only the state is wanted."""
  return run(config, workdir).state


def run(config: Any, workdir: str | Path) -> Outcome:
  """Trains until `config.total`, `config.stop_after`, or SIGTERM; goes on where `workdir` ends.

  Args:
    config: a locked ConfigDict with the keys of `configs/base.py`.
    workdir: checkpoints, metrics, pictures and config.json; made if absent.

  Returns:
    The last state, which is also saved, and where the run ends.

  Raises:
    InputError: a config, source or initial weights that cannot be used, or a workdir, such as one
      that another job is using.
    NonFiniteError: the loss stopped being a number; that state is not saved.
    SaveError: a checkpoint, or what goes with it, could not be written.
  """
  with workdirs.working(workdir) as folder, contextlib.ExitStack() as stack:
    return _train(config, folder, stack)


def _train(config: Any, workdir: Path, stack: contextlib.ExitStack) -> Outcome:
  leaving = stack.enter_context(leaving_lib.Leaving())
  jax.config.update("jax_debug_nans", config.debug_nans)
  first_process = jax.process_index() == 0

  # Where: the devices, the folder.
  mesh = sharding.make_mesh(**config.mesh)
  batch_size = config.data.batch_size
  sharding.check_batch(batch_size, config.optim.accumulate, mesh)
  checkpoints = checkpoint.Checkpoints(
    workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every
  )
  stack.callback(checkpoints.close)
  checkpoint.keep_config(workdir, config.to_dict(), defaults=base.get_config().to_dict())

  # What: the task, the data, the durations.
  task = tasks.build(config)
  data = loader.make_loader(
    config.data,
    image_hw=task.image_hw,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  stack.callback(data.close)
  steps = partial(_steps, config, data.epoch_examples)
  total = steps(config.total, "total")
  log_every = steps(config.log.every, "log.every")
  images_every = steps(config.log.images_every, "log.images_every")
  eval_every = steps(config.log.eval_every, "log.eval_every")
  save_every = steps(config.checkpoint.every, "checkpoint.every")

  # State: shapes first, then shardings, then arrays born in their places.
  key = jax.random.key(config.seed)
  create, update, wanted, places = programs.build(config, task, mesh, steps=steps)
  whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)

  # Restore, by priority: 1. this workdir, 2. init_from, 3. what the task is given, 4. scratch.
  state = checkpoints.restore(wanted, data)
  if state is not None:
    log.info("going on from step %d in %s", int(state.step), workdir)
  else:
    state = with_params(create(key), task.given, places)
    if config.init_from:
      state = start_from(config.init_from, state, places)
      log.info("parameters from %s", config.init_from)
  start = step = int(state.step)
  if _is_time(config.stop_after):
    leaving.limit(seconds=schedule.parse_duration(config.stop_after)[0])
  elif config.stop_after:
    leaving.limit(step=start + steps(config.stop_after, "stop_after"))

  # Programs.
  scenes = config.data.sources.scenes
  draw_batch = partial(
    rendering.render_batch,
    size_hw=task.image_hw,
    texture_size=scenes.texture_size,
    supersample=scenes.supersample,
    truth=task.wants == "truth",
  )
  render = jax.jit(draw_batch, in_shardings=split, out_shardings=split)
  first_pairs = jax.jit(
    lambda pair: jax.tree.map(lambda leaf: leaf[:_PICTURED], pair), out_shardings=whole
  )
  draw = jax.jit(task.pictures, out_shardings=whole)

  # Reports.
  writer = writers.create(workdir, just_logging=not first_process, resume_step=start)
  stack.callback(writer.close)
  meter = progress.Progress(
    batch_size=batch_size,
    total_steps=total,
    # What is frozen goes backward in part or not at all; how much of it, a loss does not tell.
    flops_per_pair=None if config.optim.freeze else _flops_per_pair(task, wanted.params, key),
    peak=progress.peak_flops(config.log.peak_tflops),
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(wanted.params))
  log.info(
    "%.2f M parameters, %d devices, %d steps of %d pairs", count / 1e6, mesh.size, total, batch_size
  )

  late = None  # (step, metrics on the device, example indices) of the last update
  sample = None  # the pairs that are drawn: the run's first ones, whenever it was started again
  saved_at = time.monotonic()

  def on_devices(batch: loader.Batch) -> tuple[Any, np.ndarray]:
    indices = batch.pop("index")
    return render(loader.shard_batch(batch, mesh)), indices

  def read_late() -> None:
    """Waits for the last update's metrics, checks them, and writes a row where one is due."""
    nonlocal late
    if late is None:
      return
    (at, metrics, indices), late = late, None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    _check_finite(at, values, indices, checkpoints)
    meter.add(at, values)
    if schedule.is_due(at, log_every, last=total) or at == 1:
      skipped = processes.total(data.skipped())
      writer.write_scalars(at, {**meter.row(at), "skipped_items": skipped})

  while True:
    leave = step >= total or leaving.now(step)
    fresh = step > start
    old = time.monotonic() - saved_at > 60 * config.checkpoint.minutes
    save = fresh and (leave or schedule.is_due(step, save_every) or leaving.agreed(old, step))
    evaluate = fresh and schedule.is_due(step, eval_every, last=total)
    picture = fresh and schedule.is_due(step, images_every, last=total)

    if save or evaluate or picture or leave:
      read_late()
      paused = time.perf_counter()
      params = state.params if state.ema is None else state.ema
      if evaluate:
        scores = {
          f"eval/{name}": value for name, value in task.evals(sharding.on_one_device(params))
        }
        if scores:
          log.info("  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
          writer.write_scalars(step, scores)
      if picture:
        drawn = draw(params, sample, jax.random.split(key, len(sample.frames)))
        if first_process:
          writers.write_pictures(writer, workdir, step, drawn)
          for name, images in drawn.items():
            writers.write_history(writer, workdir, step, name, images.shape[1])
      if save:
        # The rows up to this step must be on disk before the checkpoint that makes them final.
        writer.flush()
        checkpoints.save(step, state, data)
        saved_at = time.monotonic()
      meter.pause(time.perf_counter() - paused)
    _profile(config.profile_steps, step - start, workdir, state, last=leave)
    if leave:
      break

    pair, indices = on_devices(next(data))
    if sample is None:
      seen = first_pairs(pair)
      sample = seen if start == 0 else first_pairs(on_devices(data.first())[0])
      if first_process:
        side_by_side = np.concatenate(np.moveaxis(np.asarray(seen.frames), 1, 0), axis=2)
        writers.write_pictures(writer, workdir, step, {"batch": side_by_side})
    state, metrics = update(state, pair)
    step += 1
    read_late()
    late = (step, metrics, indices)

  checkpoints.wait()
  log.info("left at step %d of %d: %s", step, total, "done" if step >= total else leaving.why)
  return Outcome(state, total, leaving.told)


def _steps(config: Any, epoch_examples: int, value: int | str, name: str) -> int:
  """A duration of the config in steps.

  Raises:
    InputError: it is not understood, or has no number of steps.
  """
  try:
    return schedule.to_steps(
      value,
      batch_size=config.data.batch_size,
      epoch_examples=config.data.epoch_examples or epoch_examples or None,
    )
  except ValueError as error:
    raise InputError(f"config.{name}: {error}") from None


def start_from(source: str | Path, state: TrainState, places: TrainState) -> TrainState:
  """Puts the parameters of a workdir (its average where it keeps one) or weights file into `state`.

  Raises:
    InputError: it cannot be read, or its names or shapes are not the model's.
  """
  read = checkpoint.load_params if Path(source).is_dir() else weights.load
  loaded, _ = read(source)
  flat = merge.merge(
    weights.flatten(state.params), weights.flatten(loaded), where=f"init_from {source}"
  )
  return with_params(state, weights.unflatten(flat), places)


def with_params(state: TrainState, given: Mapping[str, Any], places: TrainState) -> TrainState:
  """`state` with parameters replaced, by their first names, in the running average too."""
  new = jax.device_put(dict(given), {name: places.params[name] for name in given})
  ema = None if state.ema is None else {**state.ema, **jax.tree.map(jnp.copy, new)}
  return state._replace(params={**state.params, **new}, ema=ema)


def _check_finite(step: int, values: dict[str, float], indices: Any, checkpoints: Any) -> None:
  if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
    return
  good = checkpoints.steps
  listed = ", ".join(str(index) for index in indices[:16]) + (" ..." if len(indices) > 16 else "")
  raise NonFiniteError(
    f"the loss of step {step} is not finite (loss {values['loss']}, gradient norm "
    f"{values['grad_norm']}); the batch held examples {listed}; nothing was saved since, the last "
    f"good checkpoint is {f'of step {good[-1]}' if good else 'none'}"
  )


def _is_time(duration: int | str) -> bool:
  """Whether a duration is by the clock; one that is not understood is left to `_steps`."""
  try:
    return bool(duration) and schedule.parse_duration(duration)[1] == "seconds"
  except ValueError:
    return False


def _flops_per_pair(task: Any, params: Any, key: Any) -> float:
  """Model FLOPs of training on one pair: the forward pass and twice as much backward."""
  pair = programs.pair_shapes(task, 1)
  keys = jax.eval_shape(lambda key: jax.random.split(key, 1), key)
  return 3 * progress.matmul_flops(task.loss, params, pair, keys)


def _profile(steps: int, done: int, workdir: Path, state: Any, *, last: bool) -> None:
  """Traces `steps` steps from the third on, as far as the run goes: the first two compile."""
  running = 2 < done <= 2 + steps
  if steps and done == 2 and not last:
    jax.block_until_ready(state)
    jax.profiler.start_trace(str(workdir / "profile"))
  elif running and (last or done == 2 + steps):
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    log.info("trace of %d steps in %s", done - 2, workdir / "profile")
