"""Throughput of the data: the video source against bare PyAV, scenes rendered against trained.

Run by `launch/bench data`. Repetitions of the two sides are interleaved, so that other work on the
machine falls on both, and the median of their ratios is reported.
"""

from __future__ import annotations

import json
import os
import sys
import time

import av
import jax
import numpy as np
import optax

from cwm_jax import step, tasks
from cwm_jax.configs import base, pretrain_tiny
from cwm_jax.data import listing, procedural, rendering
from cwm_jax.data.loader import example_stream, make_loader
from cwm_jax.data.sources import VideoSource
from cwm_jax.types import InputError

IMAGE_HW = (256, 256)
GAP_MS = 150.0
BATCH = 4
BATCHES = 5  # timed in each repetition
REPETITIONS = 5
READ_AHEAD = 4  # batches that the worker's queues hold, and one in the making
SEED = 0


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


def bench_video(folder: str) -> dict:
  """The loader with one worker against bare PyAV in one process, on the same seeks.

  Wall-clock ratios need a quiet machine. The ratio of CPU seconds, with both sides in this process,
  does not.
  """
  paths = listing.list_videos(folder)
  data = base.get_config().data
  data.batch_size, data.num_workers, data.prefetch = BATCH, 1, 1
  data.sources.scenes.weight, data.sources.video.weight = 0.0, 1.0
  data.sources.video.update(dict(paths=folder, gap_ms=GAP_MS))
  source = VideoSource(
    folder, gap_ms=GAP_MS, image_hw=IMAGE_HW, seed=SEED, crop=data.crop, flip=data.flip
  )
  turns = example_stream(_Turns(len(paths)), seed=SEED)
  loader = make_loader(data, image_hw=IMAGE_HW, seed=SEED)

  def raw(position: int) -> None:
    share = np.random.default_rng([SEED, position]).random()
    raw_pair(paths[turns[position]], share, GAP_MS / 1000)

  loader_rates, raw_rates, cpu_ratios = [], [], []
  for repetition in range(REPETITIONS + 1):  # the first one starts the worker and fills caches
    # What was read ahead must not count: when it is used up, time what the worker makes.
    for _ in range(READ_AHEAD):
      next(loader)
    began = time.perf_counter()
    positions = np.concatenate([next(loader)["index"] for _ in range(BATCHES)]).tolist()
    loader_seconds = time.perf_counter() - began
    # The worker reads ahead again; it must be at rest while the other side is timed.
    time.sleep(1.5 * READ_AHEAD * loader_seconds / BATCHES)
    began, began_cpu = time.perf_counter(), time.process_time()
    for position in positions:
      raw(position)
    raw_seconds, raw_cpu = time.perf_counter() - began, time.process_time() - began_cpu
    began_cpu = time.process_time()
    for position in positions:
      source.example(position, turns[position])
    source_cpu = time.process_time() - began_cpu
    if repetition:
      loader_rates.append(len(positions) / loader_seconds)
      raw_rates.append(len(positions) / raw_seconds)
      cpu_ratios.append(raw_cpu / source_cpu)
  loader.close()
  ratios = np.array(loader_rates) / np.array(raw_rates)
  return dict(
    measure="video",
    pairs_per_second=round(float(np.median(loader_rates)), 2),
    raw_pairs_per_second=round(float(np.median(raw_rates)), 2),
    ratio=round(float(np.median(ratios)), 3),
    ratios=np.round(ratios, 3).tolist(),
    cpu_ratio=round(float(np.median(cpu_ratios)), 3),
    cpu_ratios=np.round(cpu_ratios, 3).tolist(),
    files=len(paths),
    skipped=loader.skipped(),
    image_hw=IMAGE_HW,
  )


def bench_scenes() -> dict:
  """Pairs/s rendered against pairs/s trained, on this machine's device, with the shipped network.

  Also the scenes/s that one thread draws in NumPy. Rendering and training take turns.
  """
  config = pretrain_tiny.get_config("large")
  task, count = tasks.build(config), config.data.batch_size
  began = time.perf_counter()
  drawn = [
    procedural.draw_scene(
      seed, procedural.PRESETS["worlds"], max_objects=config.data.sources.scenes.max_objects
    )
    for seed in range(count)
  ]
  draw_seconds = time.perf_counter() - began
  scenes = {name: np.stack([scene[name] for scene in drawn]) for name in drawn[0]}
  tx = optax.adamw(1e-3)
  update = jax.jit(step.make_update(task, tx, lambda _: 1e-3, seed=SEED))
  state = step.init_state(task, tx, jax.random.key(SEED), keep_ema=False)

  def render():
    return rendering.render(scenes, size_hw=task.image_hw, texture_size=min(task.image_hw))

  pair = render()
  jax.block_until_ready(update(state, pair))  # both are compiled now
  seconds = {"rendered": [], "trained": []}
  for _ in range(REPETITIONS):
    for name, work in (("rendered", render), ("trained", lambda: update(state, pair))):
      began = time.perf_counter()
      jax.block_until_ready(work())
      seconds[name].append(time.perf_counter() - began)
  rates = {name: round(count / float(np.median(values)), 1) for name, values in seconds.items()}
  return dict(
    measure="scenes",
    drawn_per_second=round(count / draw_seconds, 1),
    rendered_pairs_per_second=rates["rendered"],
    trained_pairs_per_second=rates["trained"],
    size_hw=task.image_hw,
    device=jax.devices()[0].device_kind,
  )


def main() -> int:
  folder = (
    sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.environ.get("CWM_DATA", ""), "clips")
  )
  try:
    print(json.dumps(bench_video(folder)), flush=True)
  except InputError as error:
    print(f"{error}; name a folder of videos or set CWM_DATA", file=sys.stderr)
    return 2
  print(json.dumps(bench_scenes()), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
