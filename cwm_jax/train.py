"""The one training loop, for every task: mesh, data, state, restore, loop, in execution order.

Inside the loop the order is fixed: evaluate, save, and only then fetch a batch and update, so that
the saved iterator never runs ahead of the saved weights. Metrics are read one step late, so that
the host prepares the next batch while the device works.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from cwm_jax import checkpoint, optim, progress, schedule, sharding, tasks, writers
from cwm_jax import loader_standin as loader
from cwm_jax.data import rendering
from cwm_jax.pretrained import merge, weights
from cwm_jax.types import FramePair, TrainState

log = logging.getLogger(__name__)

_PICTURED = 8  # pairs of a batch that are drawn
_AGREE_EVERY = 10  # steps between the processes' questions to each other whether to stop


class NonFiniteError(RuntimeError):
  """The loss or its gradient is not finite; the message says where and what is safe."""


def train(config: Any, workdir: str | Path) -> TrainState:
  """Trains until `config.total`, `config.stop_after`, or SIGTERM; goes on where `workdir` ends.

  Args:
    config: a locked ConfigDict with the keys of `configs/base.py`.
    workdir: checkpoints, metrics, pictures and config.json; made if absent.

  Returns:
    The last state, which is also saved.

  Raises:
    InputError: a config, workdir, source or initial weights that cannot be used.
    NonFiniteError: the loss stopped being a number; that state is not saved.
  """
  with contextlib.ExitStack() as stack:
    return _train(config, Path(workdir).absolute(), stack)


def _train(config: Any, workdir: Path, stack: contextlib.ExitStack) -> TrainState:
  began = time.monotonic()
  jax.config.update("jax_debug_nans", config.debug_nans)

  # Where: the devices, the folder.
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
  batch_size, accumulate = config.data.batch_size, config.optim.accumulate
  sharding.check_batch(batch_size, accumulate, mesh)
  checkpoints = checkpoint.Checkpoints(
    workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every
  )
  stack.callback(checkpoints.close)
  checkpoint.keep_config(workdir, config.to_dict())

  # What: the task, the data, the durations, the optimizer.
  task = tasks.build(config)
  data = loader.make_loader(
    config.data, image_hw=task.image_hw, seed=config.seed, batch_size=batch_size
  )
  iterator = iter(data)
  epoch = config.data.epoch_examples or loader.epoch_examples(config.data)
  sizes = dict(batch_size=batch_size, epoch_examples=epoch)
  total = schedule.to_steps(config.total, **sizes)
  every = {
    name: schedule.to_steps(value, **sizes)
    for name, value in dict(
      log=config.log.every,
      images=config.log.images_every,
      evals=config.log.eval_every,
      save=config.checkpoint.every,
    ).items()
  }
  names = "peak_lr scale_lr final_lr_ratio warmup b1 b2 eps weight_decay decay_exclude freeze"
  tx, rate = optim.make(
    total=config.total,
    **sizes,
    clip_norm=config.optim.clip_norm,
    **{name: config.optim[name] for name in names.split()},
  )

  # State: shapes first, then shardings, then arrays born in their places.
  keep_ema = config.optim.ema_decay > 0
  key = jax.random.key(config.seed)
  create = lambda key: init_state(task, tx, key, keep_ema=keep_ema)  # noqa: E731
  abstract = jax.eval_shape(create, key)
  places = sharding.state_shardings(abstract, config.sharding, mesh)
  whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  abstract = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    abstract,
    places,
  )

  # Restore, by priority: 1. this workdir, 2. init_from, 3. scratch.
  state = checkpoints.restore(abstract, iterator)
  if state is not None:
    log.info("going on from step %d in %s", int(state.step), workdir)
  else:
    state = jax.jit(create, out_shardings=places)(key)
    if config.init_from:
      state = start_from(config.init_from, state, places)
      log.info("parameters from %s", config.init_from)
  start = step = int(state.step)

  # Programs.
  update = jax.jit(
    make_update(
      task, tx, rate, seed=config.seed, accumulate=accumulate, ema_decay=config.optim.ema_decay
    ),
    in_shardings=(places, split),
    out_shardings=(places, whole),
    donate_argnums=0,
  )
  render = make_render(task.image_hw, config.data.sources.scenes.texture_size, split)
  first_pairs = jax.jit(
    lambda pair: jax.tree.map(lambda x: x[:_PICTURED], pair), out_shardings=whole
  )
  draw = jax.jit(task.pictures, out_shardings=whole)

  # Reports.
  lead = jax.process_index() == 0
  writer = writers.create(workdir, just_logging=not lead, resume_step=start)
  stack.callback(writer.close)
  leaving = stack.enter_context(_Leaving(config.stop_after, sizes, began, start))
  meter = progress.Progress(
    batch_size=batch_size,
    total_steps=total,
    flops_per_pair=_flops_per_pair(task, abstract.params, key),
    peak=progress.peak_flops(config.log.peak_tflops),
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
  log.info(
    "%.2f M parameters, %d devices, %d steps of %d", count / 1e6, mesh.size, total, batch_size
  )

  late = None  # (step, metrics on the device, example indices) of the last update
  sample = None  # the pairs that are drawn
  saved_at = time.monotonic()

  def read_late() -> None:
    """Waits for the last update's metrics, checks them, and writes a row where one is due."""
    nonlocal late
    if late is None:
      return
    at, metrics, indices = late
    late = None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    _check_finite(at, values, indices, checkpoints)
    meter.add(at, values)
    if schedule.is_due(at, every["log"], last=total) or at == 1:
      writer.write_scalars(at, meter.row(at))

  while True:
    leave = step >= total or leaving.now(step)
    fresh = step > start
    old = time.monotonic() - saved_at > 60 * config.checkpoint.minutes
    save = fresh and (leave or schedule.is_due(step, every["save"]) or _agreed(old, step))
    evaluate = fresh and schedule.is_due(step, every["evals"], last=total)
    picture = fresh and schedule.is_due(step, every["images"], last=total)

    if save or evaluate or picture or leave:
      read_late()
      paused = time.perf_counter()
      params = state.params if state.ema is None else state.ema
      if evaluate:
        scores = {f"eval/{name}": value for name, value in task.evals(params)}
        if scores:
          log.info("  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
          writer.write_scalars(step, scores)
      if picture and sample is not None:
        drawn = draw(params, sample, jax.random.split(key, len(sample.frames)))
        _write_pictures(writer, workdir, step, drawn, lead)
      if save:
        # The rows of this step must be on disk before the checkpoint that makes them final.
        writer.flush()
        checkpoints.save(step, state, iterator)
        saved_at = time.monotonic()
      meter.pause(time.perf_counter() - paused)
    if leave:
      break

    _profile(config.profile_steps, step - start, workdir, state)
    batch = next(iterator)
    pair = render(loader.shard_batch(batch, split))
    if sample is None:
      sample = first_pairs(pair)
      shown = {"batch": np.concatenate(np.moveaxis(np.asarray(sample.frames), 1, 0), axis=2)}
      _write_pictures(writer, workdir, step, shown, lead)
    state, metrics = update(state, pair)
    step += 1
    read_late()
    late = (step, metrics, batch["index"])

  checkpoints.wait()
  log.info("left at step %d of %d: %s", step, total, "done" if step >= total else leaving.why)
  return state


def init_state(task: Any, tx: Any, key: Any, *, keep_ema: bool) -> TrainState:
  """A state at step 0, from scratch."""
  params = task.init(key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    ema=jax.tree.map(jnp.copy, params) if keep_ema else None,
  )


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
  params = jax.device_put(weights.unflatten(flat), places.params)
  ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
  return state._replace(params=params, ema=ema)


def make_render(image_hw: tuple[int, int], texture_size: int, placement: Any) -> Any:
  """A jitted function from a loader's batch, on the device, to a `FramePair`.

  Args:
    image_hw: size to render scenes at; video frames already have it.
    texture_size: texels a side of a layer's texture; 0 takes the longer side of the image.
    placement: sharding of batches.
  """
  texels = texture_size or max(image_hw)

  def render(batch):
    if "frames" in batch:
      return FramePair(batch["frames"].astype(jnp.float32) / 255)
    scenes = {
      name.removeprefix("scene/"): value
      for name, value in batch.items()
      if name.startswith("scene/")
    }
    return rendering.render(scenes, size_hw=image_hw, texture_size=texels)

  return jax.jit(render, in_shardings=placement, out_shardings=placement)


def make_update(
  task: Any, tx: Any, rate: Any, *, seed: int, accumulate: int = 1, ema_decay: float = 0.0
) -> Any:
  """The training step: update(state, pair) -> (state, metrics), to be jitted.

  All randomness comes from `seed` and the step, one key a pair, so neither resuming nor the number
  of devices or micro-batches changes what is drawn.

  Args:
    task: see `tasks`.
    tx, rate: as `optim.make` gives them.
    accumulate: micro-batches that the batch is cut into, one after the other.
    ema_decay: of the running average; early on the decay is (1 + step) / (10 + step) where lower.
  """

  def gradient(params, pair, keys):
    return jax.grad(task.loss, has_aux=True)(params, pair, keys)

  def split(leaf):
    # Interleaved, so that every device keeps its own share of each micro-batch.
    return jnp.swapaxes(leaf.reshape(-1, accumulate, *leaf.shape[1:]), 0, 1)

  def update(state: TrainState, pair: FramePair):
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    work = (pair, jax.random.split(step_key, pair.frames.shape[0]))
    if accumulate == 1:
      grads, metrics = gradient(state.params, *work)
    else:
      micro = jax.tree.map(split, work)
      shapes = jax.eval_shape(gradient, state.params, *jax.tree.map(lambda x: x[0], micro))
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
      add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(state.params, *part)), None)  # noqa: E731
      sums, _ = jax.lax.scan(add, zeros, micro)
      grads, metrics = jax.tree.map(lambda leaf: leaf / accumulate, sums)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
      ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
    metrics = dict(
      metrics,
      grad_norm=optax.global_norm(grads),
      update_norm=optax.global_norm(updates),
      param_norm=optax.global_norm(params),
      learning_rate=rate(state.step),
    )
    return TrainState(state.step + 1, params, opt_state, ema), metrics

  return update


class _Leaving:
  """Says when to leave early: SIGTERM, or `stop_after` steps or wall-clock time of this run."""

  def __init__(self, stop_after: str, sizes: dict[str, Any], began: float, start: int):
    self.why = ""
    self._signalled = False
    self._deadline = self._last_step = None
    if stop_after:
      amount, unit = schedule.parse_duration(stop_after)
      if unit == "seconds":
        self._deadline = began + amount
      else:
        self._last_step = start + schedule.to_steps(stop_after, **sizes)

  def __enter__(self):
    self._previous = signal.signal(signal.SIGTERM, self._hear)
    return self

  def __exit__(self, *_):
    signal.signal(signal.SIGTERM, self._previous)

  def _hear(self, *_):
    self._signalled = True

  def now(self, step: int) -> bool:
    """Whether to leave at this step; the same answer in every process."""
    late = self._deadline is not None and time.monotonic() > self._deadline
    if self._last_step is not None and step >= self._last_step:
      self.why = "stop_after"
      return True
    if _agreed(self._signalled or late, step):
      self.why = "SIGTERM" if self._signalled else "stop_after"
      return True
    return False


def _agreed(flag: bool, step: int) -> bool:
  """Whether any process raised its flag; with several processes asked every few steps only."""
  if jax.process_count() == 1:
    return flag
  if step % _AGREE_EVERY:
    return False
  from jax.experimental import multihost_utils

  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


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


def _flops_per_pair(task: Any, params: Any, key: Any) -> float:
  """Model FLOPs of training on one pair: the forward pass and twice as much backward."""
  pair = FramePair(jax.ShapeDtypeStruct((1, 2, *task.image_hw, 3), jnp.float32))
  keys = jax.eval_shape(lambda key: jax.random.split(key, 1), key)
  return 3 * progress.matmul_flops(task.loss, params, pair, keys)


def _write_pictures(writer: Any, workdir: Path, step: int, pictures: Any, lead: bool) -> None:
  """Pictures [B, H, W, 3] in [0, 1] to TensorBoard and, one above the other, to a PNG file."""
  if not lead:
    return
  pictures = {name: np.asarray(images) for name, images in pictures.items()}
  writer.write_images(step, pictures)
  folder = workdir / "pictures"
  folder.mkdir(exist_ok=True)
  for name, images in pictures.items():
    sheet = np.concatenate(np.round(np.clip(images, 0, 1) * 255).astype(np.uint8))
    Image.fromarray(sheet).save(folder / f"{name}_{step:08d}.png")


def _profile(steps: int, done: int, workdir: Path, state: Any) -> None:
  """Traces `steps` steps from the third on: the first two compile."""
  if steps and done == 2:
    jax.block_until_ready(state)
    jax.profiler.start_trace(str(workdir / "profile"))
  if steps and done == 2 + steps:
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    log.info("trace of %d steps in %s", steps, workdir / "profile")
