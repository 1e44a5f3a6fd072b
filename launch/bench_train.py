"""Our training step against the same step in plain PyTorch: pairs a second, in one run.

Run by `launch/bench train`. Without `--torch-python` our side is measured alone. With it the other
side runs in a process of its own, with our parameters, masks and rates; that its losses are ours is
part of the row. Repetitions take turns, so that other work on the machine falls on both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_facts
import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import geometry, optim, programs, progress, sharding, tasks
from cwm_jax.configs import pretrain_tiny
from cwm_jax.counterfactual import masks
from cwm_jax.models import layers
from cwm_jax.pretrained import weights
from cwm_jax.types import FramePair

SEED, WARMUP = 0, 5
_TORCH = Path(__file__).with_name("torch_train.py")


class Ours:
  """Our side: the update as training makes it, on one batch."""

  def __init__(self, config: Any, total: int):
    config.seed = SEED
    self.config, self.task = config, tasks.build(config)
    self.rate = optim.learning_rate(
      peak=config.optim.peak_lr,
      warmup_steps=WARMUP,
      total_steps=total,
      final_ratio=config.optim.final_lr_ratio,
    )
    mesh = sharding.make_mesh()
    steps = dict(total=total).get
    built = programs.build(config, self.task, mesh, steps=lambda _, name: steps(name, WARMUP))
    frames = np.random.default_rng(SEED).random(
      (config.data.batch_size, 2, *self.task.image_hw, 3), np.float32
    )
    self.pair = jax.device_put(FramePair(frames), sharding.batch_sharding(mesh))
    self.compilations = progress.CompilationCounter()
    self.state, self.update = built.create(jax.random.key(SEED)), built.update
    self.first = jax.device_get(self.state.params)

  def run(self, count: int) -> dict[str, Any]:
    """So many steps: losses, seconds, CPU seconds."""
    began, began_cpu, losses = time.perf_counter(), time.process_time(), []
    for _ in range(count):
      self.state, metrics = self.update(self.state, self.pair)
      losses.append(metrics["loss"])
    losses = [float(loss) for loss in losses]
    took, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    return dict(losses=losses, seconds=took, cpu=cpu)

  def question(self, folder: Path, count: int) -> None:
    """Writes down all that the other side needs for `count` steps."""
    m, task = self.config.model, self.task
    grid_hw, of_hw = task.grid_hw, task.model.grid_hw
    drawn = []
    for number in range(count):
      key = jax.random.fold_in(jax.random.key(SEED), number)
      keys = jax.random.split(key, self.config.data.batch_size)
      drawn.append(jax.vmap(lambda k: masks.sample_masks(k, task.grid_hw, task.num_visible))(keys))
    arrays = dict(frames=geometry.normalise(self.pair.frames), masks=np.stack(drawn))
    for half in ("encoder", "decoder"):
      width, heads = m[f"{half}_width"], m[f"{half}_heads"]
      arrays[f"{half}_table"] = layers.sine_positions(grid_hw, width, of_hw=of_hw)[None]
      table = layers.rotary_table(grid_hw, width // heads, of_hw=of_hw)
      arrays[f"{half}_rotary"] = jnp.concatenate([table, table])
    flat = weights.flatten(self.first)
    arrays |= {f"param:{name}": value for name, value in flat.items()}
    np.savez(folder / "question.npz", **{k: np.asarray(v) for k, v in arrays.items()})
    names = "patch context encoder_depth encoder_heads decoder_depth decoder_heads"
    settings = {name: m[name] for name in names.split()}
    names = "b1 b2 eps weight_decay decay_exclude clip_norm"
    settings |= {name: self.config.optim[name] for name in names.split()}
    settings |= dict(num_visible=math.prod(grid_hw) + task.num_visible)
    settings |= dict(rates=[float(self.rate(number)) for number in range(count)])
    (folder / "settings.json").write_text(json.dumps(settings))


class Theirs:
  """The other side's process."""

  def __init__(self, python: str, folder: Path):
    command = [python, str(_TORCH), str(folder), str(len(os.sched_getaffinity(0)))]
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.versions = self._read()["versions"]

  def run(self, count: int) -> dict[str, Any]:
    self.process.stdin.write(json.dumps(dict(steps=count)) + "\n")
    self.process.stdin.flush()
    return self._read()

  def _read(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit("the PyTorch side ended; what it said stands above")
    return json.loads(line)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
  """The row."""
  config = pretrain_tiny.get_config(options.stage)
  config.data.batch_size = options.batch
  count = options.steps * (options.repetitions + 1)
  ours = Ours(config, total=count + 10)
  sides = {"ours": ours}
  if options.torch_python:
    ours.question(folder, count)
    sides["torch"] = Theirs(options.torch_python, folder)
  told = {name: [] for name in sides}
  for repetition in range(options.repetitions + 1):  # the first one compiles and is not timed
    for name, side in sides.items():
      told[name].append(side.run(options.steps))
      seconds = told[name][-1]["seconds"]
      print(f"{name}, repetition {repetition}: {seconds:.2f} s", file=sys.stderr, flush=True)
  pairs = options.steps * options.batch
  rates = {name: pairs / _median(runs, "seconds") for name, runs in told.items()}
  shapes = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  one = FramePair(jax.ShapeDtypeStruct((1, 2, *ours.task.image_hw, 3), jnp.float32))
  flops = 3 * progress.matmul_flops(ours.task.loss, ours.first, one, shapes)
  row = dict(
    stage=options.stage,
    batch=options.batch,
    pairs_per_second=round(rates["ours"], 2),
    cpu_seconds_per_pair=round(_median(told["ours"], "cpu") / pairs, 5),
    gflop_per_second=round(rates["ours"] * flops / 1e9, 1),
    compilations=ours.compilations.count,
    flop_per_second=rates["ours"] * flops,
    on_devices=jax.device_count(),
  )
  if "torch" in sides:
    ratios = [t["seconds"] / o["seconds"] for o, t in zip(told["ours"], told["torch"])][1:]
    cpu = [t["cpu"] / o["cpu"] for o, t in zip(told["ours"], told["torch"])][1:]
    losses = [sum((run["losses"] for run in runs), []) for runs in told.values()]
    row |= dict(
      baseline=sides["torch"].versions,
      baseline_pairs_per_second=round(rates["torch"], 2),
      ratio=float(np.median(ratios)),
      ratios=np.round(ratios, 3).tolist(),
      cpu_ratio=round(float(np.median(cpu)), 3),
      first_losses_apart=float(f"{abs(losses[0][0] / losses[1][0] - 1):.2g}"),
      last_losses_apart=float(f"{abs(losses[0][-1] / losses[1][-1] - 1):.2g}"),
    )
    sides["torch"].process.terminate()
  return bench_facts.row("train", **row)


def _median(runs: list[dict[str, Any]], name: str) -> float:
  return float(np.median([run[name] for run in runs[1:]]))


def main() -> int:
  """Prints the row."""
  parser = argparse.ArgumentParser(prog="launch/bench train", description=__doc__.split("\n\n")[0])
  add = parser.add_argument
  add("--stage", default="large", choices=list(pretrain_tiny.CURRICULA), help="of pretrain_tiny")
  add("--batch", type=int, default=16)
  cores = len(os.sched_getaffinity(0))
  add("--devices", type=int, default=cores, help="that a CPU plays; they must divide the batch")
  add("--steps", type=int, default=4, help="of a repetition")
  add("--repetitions", type=int, default=5)
  add("--torch-python", default="", metavar="PYTHON", help="that has torch and numpy")
  options = parser.parse_args()
  if min(options.batch, options.steps, options.repetitions, options.devices) < 1:
    parser.error("batch, steps, repetitions and devices are 1 or more")
  jax.config.update("jax_num_cpu_devices", options.devices)
  with tempfile.TemporaryDirectory(prefix="cwm-race-") as folder:
    print(json.dumps(measure(options, Path(folder))), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
