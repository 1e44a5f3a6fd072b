"""Pairs a second on one device, two, four and so on, at the same batch for each device.

Run by `launch/bench scaling`. Devices are this machine's; with --virtual N so many of its CPU,
which share its cores: that shows the cost of splitting and no gain.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from typing import Any

CONFIGS = ("pretrain_tiny:runlocal", "pretrain_tiny:large", "pretrain_sizes:small")


def measure(options: argparse.Namespace) -> None:
  """Prints a row for each number of devices."""
  import bench_facts
  import jax
  import numpy as np
  from jax.sharding import Mesh

  from cwm_jax import programs, progress, schedule, sharding, tasks
  from cwm_jax.types import FramePair

  named, _, argument = options.config.partition(":")
  module = importlib.import_module(f"cwm_jax.configs.{named}")
  alone = None
  compilations = progress.CompilationCounter()
  count = 1
  while count <= len(jax.devices()):
    config = module.get_config(argument)
    config.data.batch_size = options.batch * count
    fsdp = count if options.fsdp else 1
    grid = np.array(jax.devices()[:count]).reshape(count // fsdp, fsdp, 1)
    mesh = Mesh(grid, sharding.AXES)
    task = tasks.build(config)
    compiled_before = compilations.count

    def steps(value: Any, name: str, batch: int = config.data.batch_size) -> int:
      return schedule.to_steps(value, batch_size=batch, epoch_examples=1_000_000)

    built = programs.build(config, task, mesh, steps=steps)
    shape = (config.data.batch_size, 2, *task.image_hw, 3)
    frames = np.random.default_rng(0).random(shape, np.float32)
    pair = jax.device_put(FramePair(frames), sharding.batch_sharding(mesh))
    state = built.create(jax.random.key(0))
    seconds = []
    for _ in range(options.repetitions + 1):  # the first one compiles
      began = time.perf_counter()
      for _ in range(options.steps):
        state, metrics = built.update(state, pair)
      jax.block_until_ready(metrics)
      seconds.append(time.perf_counter() - began)
    rate = options.steps * config.data.batch_size / float(np.median(seconds[1:]))
    alone = alone or rate
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    flops = 3 * progress.matmul_flops(
      task.loss, built.wanted.params, programs.pair_shapes(task, 1), keys
    )
    row = bench_facts.row(
      "scaling",
      config=options.config,
      used=count,
      fsdp=fsdp,
      batch=config.data.batch_size,
      pairs_per_second=round(rate, 2),
      efficiency=round(rate / (alone * count), 3),
      baseline="one device",
      ratio=rate / alone,
      flop_per_second=rate * flops,
      on_devices=count,
      compilations=compilations.count - compiled_before,
    )
    print(json.dumps(row), flush=True)
    count *= 2


def main() -> int:
  """Prints a row for each number of devices."""
  parser = argparse.ArgumentParser(
    prog="launch/bench scaling", description=__doc__.split("\n\n")[0]
  )
  add = parser.add_argument
  add("--config", default=CONFIGS[0], choices=CONFIGS)
  add("--batch", type=int, default=8, help="of each device")
  add("--fsdp", action="store_true", help="split parameters too")
  add("--steps", type=int, default=4, help="of a repetition")
  add("--repetitions", type=int, default=3)
  add("--virtual", type=int, default=0, metavar="N", help="devices that the CPU plays")
  options = parser.parse_args()
  if options.virtual:
    flags = f"--xla_force_host_platform_device_count={options.virtual}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["JAX_PLATFORMS"] = "cpu"
  measure(options)
  return 0


if __name__ == "__main__":
  sys.exit(main())
