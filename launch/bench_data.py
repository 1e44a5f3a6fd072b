"""Pairs a second of every kind of data source, what a pair's time goes into, and what bounds it.

Run by `launch/bench data`. A loader with one worker hands pairs out; the same pairs are then read
in this process, where reading and decoding, cropping and resizing are timed by themselves. What the
loader took beyond these is the handover from the worker. Copying to the device and rendering are
timed after it. Repetitions of all sides are interleaved, so that other work on the machine falls on
each, and medians are reported.

The baselines: for videos the same seeks and frames by bare PyAV in this process; for scenes the
training step that they are drawn for; for the others reading and decoding alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import av
import bench_facts
import data_sources
import jax
import numpy as np
import optax

from cwm_jax import progress, sharding, step, tasks
from cwm_jax.configs import pretrain_tiny
from cwm_jax.data import labels, listing, procedural, rendering, sources, tfds_source, transforms
from cwm_jax.data.loader import Loader, example_stream, make_loader, shard_batch
from cwm_jax.types import FramePair, InputError

GAP_MS = 150.0
READ_AHEAD = 4  # batches that the worker's queues hold, and one in the making
SEED = 0
PARTS = ("read_decode", "crop_resize", "handover", "copy", "render")
# What reads and decodes a pair; of scenes, what draws their parameters.
_READS = dict(
  scenes=(procedural, "draw_scene"),
  video=(sources.VideoSource, "read"),
  frames=(sources.FrameFolderSource, "read"),
  tfds=(tfds_source.TfdsSource, "read"),
  labels=(labels.LabelsSource, "_read"),
)

Baseline = Callable[[list[int], Any], float]


def raw_pair(path: str, share: float, gap_s: float) -> list[np.ndarray]:
  """The same two frames by PyAV alone: one seek, decode forward, RGB of the two."""
  with av.open(path) as container:
    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    start, base = stream.start_time or 0, stream.time_base
    duration = float(stream.duration * base) if stream.duration else container.duration / 1e6
    latest = max(0.0, duration - gap_s - 1 / float(stream.average_rate))
    wanted = [share * latest, share * latest + gap_s]
    if wanted[0] > 0:
      container.seek(round(wanted[0] / base) + start, stream=stream)
    pictures, previous = [], None
    for frame in container.decode(stream):
      # As the source does, look one frame further to know which one is on display.
      if previous is not None and float((frame.pts - start) * base) > wanted[len(pictures)]:
        pictures.append(previous.to_ndarray(format="rgb24"))
        if len(pictures) == 2:
          break
      previous = frame
    return pictures


class _Turns:
  """A source that only says which item's turn it is."""

  def __init__(self, items: int):
    self.items = items

  def example(self, position: int, item: int) -> int:
    return item


def bare_pyav(videos: str) -> Baseline:
  """Reads the pairs of these places without the source; seconds."""
  paths = listing.list_videos(videos)
  turns = example_stream(_Turns(len(paths)), seed=SEED)

  def read(positions: list[int], _: Any) -> float:
    began = time.perf_counter()
    for position in positions:
      share = np.random.default_rng([SEED, position]).random()
      raw_pair(paths[turns[position]], share, GAP_MS / 1000)
    return time.perf_counter() - began

  return read


def training(config: Any) -> Baseline:
  """Trains on as many pairs; seconds."""
  task, tx = tasks.build(config), optax.adamw(1e-3)
  update = jax.jit(step.make_update(task, tx, lambda _: 1e-3, seed=SEED))
  state = step.init_state(task, tx, jax.random.key(SEED), keep_ema=False)

  def train(positions: list[int], pairs: list[FramePair]) -> float:
    began = time.perf_counter()
    for pair in pairs:
      jax.block_until_ready(update(state, pair))
    return time.perf_counter() - began

  return train


@contextlib.contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
  """Has `owner.name` note the seconds of each of its calls in the list that is given."""
  plain, seconds = getattr(owner, name), []

  def call(*args: Any, **kwargs: Any) -> Any:
    began = time.perf_counter()
    try:
      return plain(*args, **kwargs)
    finally:
      seconds.append(time.perf_counter() - began)

  with mock.patch.object(owner, name, call):
    yield seconds


class Measured:
  """Seconds of one repetition, of `count` pairs: those of PARTS, and of the sides."""

  def __init__(self, count: int):
    self.count, self.seconds = count, {}

  def __setitem__(self, name: str, seconds: float) -> None:
    self.seconds[name] = seconds / self.count


def repeat(
  name: str, loader: Loader, alone: Loader, device: Any, baseline: Baseline | None, batches: int
) -> Measured:
  """One repetition of all sides.

  Args:
    name: of the source.
    loader: with one worker.
    alone: the same without.
    device: (batch -> the same on the device, that -> pairs).
    baseline: seconds of what the source is compared with, or None.
    batches: that are timed.
  """
  copy, render = device
  # What was read ahead must not count: when it is used up, time what the worker makes.
  for _ in range(READ_AHEAD):
    next(loader)
  place = loader.get_state()
  began = time.perf_counter()
  handed = [next(loader) for _ in range(batches)]
  loader_seconds = time.perf_counter() - began
  # The worker reads ahead again; it must be at rest while the other sides are timed.
  time.sleep(1.5 * READ_AHEAD * loader_seconds / batches)
  positions = np.concatenate([batch["index"] for batch in handed]).tolist()
  found = Measured(len(positions))
  alone.set_state(place)
  with timed(*_READS[name]) as reading, timed(transforms, "apply_view") as resizing:
    began_cpu = time.process_time()
    again = [next(alone) for _ in range(batches)]
    found["own_cpu"] = time.process_time() - began_cpu
  assert reading and [b["index"].tolist() for b in handed] == [b["index"].tolist() for b in again]
  found["loader"] = loader_seconds
  found["read_decode"], found["crop_resize"] = sum(reading), sum(resizing)
  # The worker is ahead by a little sometimes: nothing is handed over in less than no time.
  found["handover"] = max(0.0, loader_seconds - sum(reading) - sum(resizing))
  began = time.perf_counter()
  there = [jax.block_until_ready(copy(batch)) for batch in handed]
  found["copy"] = time.perf_counter() - began
  began = time.perf_counter()
  pairs = [jax.block_until_ready(render(batch)) for batch in there]
  found["render"] = time.perf_counter() - began
  began_cpu = time.process_time()
  found["baseline"] = baseline(positions, pairs) if baseline else sum(reading)
  found["baseline_cpu"] = time.process_time() - began_cpu
  return found


def bench(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
  """The row of a source, whose files are made in `folder`."""
  compilations = progress.CompilationCounter()
  config = pretrain_tiny.get_config(options.stage)
  data, image_hw = config.data, (options.image, options.image)
  named, baseline = "reading and decoding alone", None
  if name == "scenes":
    named, baseline = f"training of pretrain_tiny:{options.stage}", training(config)
    image_hw = tuple(config.model.image_hw)
  elif name == "video":
    named, baseline = f"bare PyAV {av.__version__}", bare_pyav(options.videos)
  made = data_sources.make(name, options.videos, folder, image_hw=image_hw)
  for other, settings in data.sources.items():
    settings.weight = float(other == name)
  data.sources[name].update(made)
  data.sources.video.gap_ms = GAP_MS
  data.update(dict(batch_size=options.batch, num_workers=1, prefetch=1))
  loader = make_loader(data, image_hw=image_hw, seed=SEED)
  data.update(dict(num_workers=0, prefetch=0))
  alone = make_loader(data, image_hw=image_hw, seed=SEED)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
  texels = data.sources.scenes.texture_size
  render = jax.jit(partial(rendering.render_batch, size_hw=image_hw, texture_size=texels))
  device = (partial(shard_batch, mesh=mesh), render)
  # The first repetition starts the worker, fills caches, compiles.
  rows = [
    repeat(name, loader, alone, device, baseline, options.batches).seconds
    for _ in range(options.repetitions + 1)
  ][1:]
  loader.close()
  alone.close()
  took = {side: float(np.median([row[side] for row in rows])) for side in rows[0]}
  parts = {part: took[part] for part in PARTS}
  # Scenes are made on the device, others on the host.
  ours = [row["copy"] + row["render"] if name == "scenes" else row["loader"] for row in rows]
  return bench_facts.row(
    "data",
    source=name,
    pairs_per_second=round(1 / float(np.median(ours)), 2),
    loader_pairs_per_second=round(1 / took["loader"], 2),
    **{f"{part}_ms": round(1000 * seconds, 4) for part, seconds in parts.items()},
    bound_by=max(parts, key=parts.get),
    baseline=named,
    baseline_pairs_per_second=round(1 / took["baseline"], 2),
    ratio=float(np.median([row["baseline"] / own for row, own in zip(rows, ours)])),
    # Wall-clock ratios need a quiet machine; that of CPU seconds, both in this process, does not.
    cpu_ratio=round(took["baseline_cpu"] / took["own_cpu"], 3) if name == "video" else None,
    skipped=loader.skipped(),
    image_hw=list(image_hw),
    batch=options.batch,
    batches=options.batches,
    repetitions=options.repetitions,
    compilations=compilations.count,
  )


def main() -> int:
  """Prints a row for each source; exit code 2 where something given cannot be used."""
  parser = argparse.ArgumentParser(prog="launch/bench data", description=__doc__.split("\n\n")[0])
  add = parser.add_argument
  default = os.path.join(os.environ.get("CWM_DATA", ""), "clips")
  add("videos", nargs="?", default=default, help="a folder of videos (default: $CWM_DATA/clips)")
  add("--sources", nargs="+", default=data_sources.NAMES, choices=data_sources.NAMES)
  add("--image", type=int, default=256, help="side of the pairs, but for scenes, pixels")
  add(
    "--stage", default="large", choices=list(pretrain_tiny.CURRICULA), help="scenes are drawn for"
  )
  add("--batch", type=int, default=4)
  add("--batches", type=int, default=5, help="of a repetition")
  add("--repetitions", type=int, default=5)
  options = parser.parse_args()
  if min(options.image, options.batch, options.batches, options.repetitions) < 1:
    parser.error("image, batch, batches and repetitions are 1 or more")
  for name in options.sources:
    with tempfile.TemporaryDirectory(prefix="cwm-data-") as folder:
      try:
        print(json.dumps(bench(name, options, Path(folder))), flush=True)
      except InputError as error:
        print(f"error: {error}; name a folder of videos or set CWM_DATA", file=sys.stderr)
        return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
