"""What a training step takes on a slice that need not be there: a device's memory, a step's time.

Run by `launch/plan`. The step is compiled for as many virtual devices of this CPU, split as it
would be there, and nothing is computed. Memory is the compiler's own account. Time has two bounds:
computing, memory traffic and communication hidden behind the longest of them, or one after the
other. Real steps lie between; kernels that reach a part of a peak only are not known here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Chip(NamedTuple):
  """From the makers' data sheets.

  memory_gib, memory_gb_s: of its own memory. link_gb_s: to those of the same slice or node,
  all links together, one way.
  """

  memory_gib: float
  memory_gb_s: float
  link_gb_s: float


# By the names of `progress.PEAK_TFLOPS`.
CHIPS = {
  "b200": Chip(180, 8000, 900),
  "h200": Chip(141, 4800, 450),
  "h100": Chip(80, 3350, 450),
  "a100": Chip(80, 2039, 300),
  "l4": Chip(24, 300, 32),
  "t4": Chip(16, 320, 16),
  "tpu v6e": Chip(32, 1640, 448),
  "tpu v5e": Chip(16, 819, 200),
  "tpu v5p": Chip(95, 2765, 600),
  "tpu v4": Chip(32, 1228, 300),
}
_BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, f32=4, s32=4, u32=4, s64=8, u64=8)
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


class Collective(NamedTuple):
  """A communication of the compiled step: what, how many bytes it gives a device, how often."""

  kind: str
  bytes: int
  times: int


def collectives(text: str) -> list[Collective]:
  """Those of a compiled program, each with how often its loops come by it; largest first.

  Args:
    text: HLO, as `compiled.as_text()` gives it.
  """
  times = {name: count for name, count in _repetitions(text)}
  found = []
  for name, lines in _computations(text).items():
    for line in lines:
      match = re.search(rf"= (\(?[a-z].*?) ({_KINDS})(-start)?\(", line)
      if match:
        sizes = [
          _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
          for kind, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match[1])
        ]
        # What starts a gathering gives back what it was given too, first.
        given = len(sizes) // 2 if match[3] and match[2] == "all-gather" else 0
        found.append(Collective(match[2], sum(sizes[given:]), times.get(name, 1)))
  return sorted(found, key=lambda one: -one.bytes * one.times)


def _computations(text: str) -> dict[str, list[str]]:
  """{name of a computation: its lines}."""
  parts, name = {}, ""
  for line in text.splitlines():
    head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
    if head and not line.startswith(" "):
      name = head[1]
      parts[name] = []
    elif name:
      parts[name].append(line)
  return parts


def _repetitions(text: str) -> Iterator[tuple[str, int]]:
  """(computation, how often one step calls it), as far as the trip counts of loops are known."""
  parts = _computations(text)
  entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]
  waiting = [(entry, 1)]
  while waiting:
    name, count = waiting.pop()
    yield name, count
    for line in parts.get(name, ()):
      trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
      for called in re.findall(r"(?:body|calls|to_apply|condition)=%?([\w.\-]+)", line):
        waiting.append((called, count * (int(trips[1]) if trips else 1)))
      for several in re.findall(r"(?:calls|branch_computations)=\{([^}]*)\}", line):
        waiting += [(called.strip(" %"), count) for called in several.split(",")]


def compile_update(config: Any, mesh: Any) -> tuple[Any, Any, float]:
  """(the compiled update, the shapes of the state, model FLOPs of a step) of a training job."""
  import jax

  from cwm_jax import programs, progress, schedule, sharding, tasks

  task = tasks.build(config)
  count = config.data.batch_size
  sharding.check_batch(count, config.optim.accumulate, mesh)

  def steps(value, name):
    # Only the schedules' lengths depend on it, not the program's size.
    epoch = config.data.epoch_examples or 1_000_000
    return schedule.to_steps(value, batch_size=count, epoch_examples=epoch)

  built = programs.build(config, task, mesh, steps=steps)
  pair = programs.pair_shapes(task, count, place=sharding.batch_sharding(mesh))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  flops = (
    3
    * count
    * progress.matmul_flops(task.loss, built.wanted.params, programs.pair_shapes(task, 1), keys)
  )
  # It is never run: the machine code may be as slow as it likes, and is had sooner.
  quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
  compiled = built.update.lower(built.wanted, pair).compile(compiler_options=quick)
  return compiled, built.wanted, flops


def predict(config: Any, mesh: Any, kind: str) -> dict[str, Any]:
  """One row: bytes of a device, seconds of a step, what is communicated."""
  import jax

  from cwm_jax import progress

  compiled, wanted, flops = compile_update(config, mesh)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  devices = mesh.size
  shard_bytes = sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(wanted)
  )
  # The state is donated: what goes out lies where it came in.
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  peak += max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
  found = collectives(compiled.as_text())
  sent = sum(one.bytes * one.times for one in found)
  row = dict(
    measure="plan",
    devices=devices,
    mesh=dict(mesh.shape),
    batch=config.data.batch_size,
    state_gib=shard_bytes / 2**30,
    temporary_gib=memory.temp_size_in_bytes / 2**30,
    peak_gib=peak / 2**30,
    step_tflop=flops / 1e12,
    communicated_gib=sent / 2**30,
    collectives=_counted(found),
  )
  chip = CHIPS.get(kind)
  if chip:
    # The compiler counts the body of a loop once; scale its traffic as its operations fall short.
    share = max(1.0, flops / devices / max(1.0, cost.get("flops", 0.0)))
    full = 4 / 3 if config.model.remat == "full" else 1.0
    parts = dict(
      compute_s=full * flops / devices / (progress.known_tflops(kind) * 1e12),
      memory_s=share * cost.get("bytes accessed", 0.0) / (chip.memory_gb_s * 1e9),
      communication_s=sent / (chip.link_gb_s * 1e9),
    )
    row |= dict(
      chip=kind,
      fits=peak <= chip.memory_gib * 2**30,
      **parts,
      step_s=[max(parts.values()), sum(parts.values())],
      pairs_per_second=[config.data.batch_size / sum(parts.values())],
    )
    row["pairs_per_second"].append(config.data.batch_size / max(parts.values()))
  return row


def _counted(found: list[Collective]) -> dict[str, dict[str, float]]:
  """{kind: how many in a step, GiB together}."""
  kinds = {}
  for one in found:
    entry = kinds.setdefault(one.kind, dict(count=0, gib=0.0))
    entry["count"] += one.times
    entry["gib"] += one.bytes * one.times / 2**30
  return kinds


def _load(named: str) -> Any:
  """The config of FILE.py or FILE.py:ARGUMENT."""
  path, _, argument = named.partition(":")
  spec = importlib.util.spec_from_file_location("planned", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument) if argument else module.get_config()


def _options(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="launch/plan", description=__doc__.split("\n\n")[0])
  add = parser.add_argument
  add("config", help="FILE.py or FILE.py:ARGUMENT")
  add("--devices", type=int, default=8, help="of the slice")
  add(
    "--chip", default="tpu v5e", choices=list(CHIPS), help="for time, and whether memory is enough"
  )
  add("--fsdp", type=int, default=1)
  add("--tensor", type=int, default=1)
  add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="such as data.batch_size=256")
  return parser.parse_args(arguments)


def main() -> int:
  options = _options(sys.argv[1:])
  # Before JAX starts: devices that are only names.
  flags = f"--xla_force_host_platform_device_count={options.devices}"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
  os.environ["JAX_PLATFORMS"] = "cpu"
  from cwm_jax import jobs, sharding
  from cwm_jax.types import InputError

  try:
    if not Path(options.config.partition(":")[0]).is_file():
      raise InputError(f"there is no file {options.config.partition(':')[0]}")
    config = _load(options.config)
    jobs.set_keys(config, options.set)
    if "model" in config and config.model.attention_impl in ("", "cudnn"):
      # As accelerators do it without a kernel; a fused one needs less memory.
      config.model.attention_impl = "xla"
    mesh = sharding.make_mesh(data=-1, fsdp=options.fsdp, tensor=options.tensor)
    row = predict(config, mesh, options.chip)
  except (InputError, KeyError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  rounded = json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.4g}"))
  print(json.dumps(rounded), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
