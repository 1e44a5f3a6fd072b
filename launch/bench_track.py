"""Points tracked per second: our schedule of passes against the public release's.

Run by `launch/bench track`. Both sides ask the same questions of the same network with random
weights and a learned mark, under the protocol "release". The release's schedule is one point at a
time and one pass at a time, with a clean pass of its own for every point and mask; ours shares
clean passes and batches. Repetitions are interleaved, so that other work on the machine falls on
both.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from cwm_jax import models
from cwm_jax.configs import base, opt_cwm
from cwm_jax.counterfactual import gaussian, masks, multimask
from cwm_jax.models.perturber import Perturber
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError

MASK_RATIO = 0.9
SAME_PX = 1.0  # random weights have many equal answers; more than this is another one


class Side(NamedTuple):
  """One way of answering: `answer(frames, points_xy) -> xy`, and how many passes were run so far.

  frames are uint8 [2, H, W, 3], points and answers float32 [N, 2], bare (x, y) indices.
  """

  answer: Callable[[np.ndarray, np.ndarray], np.ndarray]
  passes: Callable[[], int]


class Counted:
  """Applies a model and counts the passes that are run, padding of batches included."""

  def __init__(self, model: Any, num_visible: int):
    self.model, self.num_visible, self.passes = model, num_visible, 0

  def __call__(self, params: Any, frames: Any, mask: Any) -> Any:
    jax.debug.callback(self._add, mask)
    return self.model.apply({"params": params}, frames, mask, num_visible=self.num_visible)

  def _add(self, mask: Any) -> None:
    self.passes += len(mask)

  def total(self) -> int:
    jax.effects_barrier()
    return self.passes


class Peak(threading.Thread):
  """Samples the memory in use while its block runs; `bytes` is by how much it grew at most."""

  def __init__(self):
    super().__init__(daemon=True)
    self._done, self._before, self.bytes = threading.Event(), _bytes_in_use(), 0

  def run(self):
    while not self._done.wait(0.002):
      self.bytes = max(self.bytes, _bytes_in_use() - self._before)

  def __enter__(self):
    self.start()
    return self

  def __exit__(self, *_):
    self._done.set()
    self.join()


def _bytes_in_use() -> int:
  """Of the device where it tells, else of this process."""
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats["bytes_in_use"]
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * 4096


def our_sides(options: argparse.Namespace) -> dict[str, Side]:
  """Our tracker with its own schedule and with the release's, on one network."""
  model = dict(base.get_config().model) | opt_cwm.model(options.model or "opt-cwm-256")
  if not options.model:
    model |= dict(image_hw=(options.image, options.image), positions_hw=())
    for part in ("encoder", "decoder"):
      model |= {
        f"{part}_width": options.width,
        f"{part}_depth": options.depth,
        f"{part}_heads": options.heads,
      }
  model["dtype"] = options.dtype
  (h, w), patch = model["image_hw"], model["patch"]
  grid_hw = (h // patch, w // patch)
  visible = masks.num_visible_patches(grid_hw, MASK_RATIO)
  # The released masking replaces tokens and needs no number of visible ones.
  counted = Counted(models.build(model), grid_hw[0] * grid_hw[1] + visible)
  keys = jax.random.split(jax.random.key(0), 3)
  mask = masks.sample_masks(keys[0], grid_hw, visible, (1,))
  init = jax.jit(counted.model.init, static_argnames="num_visible")
  params = init(
    keys[1], np.zeros((1, 2, h, w, 3), np.float32), mask, num_visible=counted.num_visible
  )["params"]
  perturber = Perturber(hidden_width=opt_cwm.PERTURBER["hidden_width"])
  mark = gaussian.GaussianMark(
    perturber,
    size=opt_cwm.PERTURBER["size"],
    scale=opt_cwm.MARK_SCALES.get(options.model, 1),
  )
  token = np.zeros(model["encoder_width"], np.float32)
  marks = perturber.init(keys[2], token)["params"]
  predict = Partial(counted, params)

  def tracker(memory_budget):
    return Tracker(
      predict,
      image_hw=(h, w),
      patch=patch,
      mask_ratio=MASK_RATIO,
      num_masks=options.masks,
      zoom=options.zoom,
      mark=Partial(mark, marks),
      protocol="release",
      memory_budget=memory_budget,
    )

  shared = tracker(None)
  # A budget of one pass leaves room for no more than one at a time.
  single = tracker(multimask.measure_pass_bytes(predict, (h, w), grid_hw))

  def one_by_one(frames, points_xy):
    return np.concatenate([single.flow(*frames, point[None]).xy for point in points_xy])

  return {
    "ours": Side(lambda frames, points_xy: shared.flow(*frames, points_xy).xy, counted.total),
    "release schedule": Side(one_by_one, counted.total),
  }


def measure(sides: dict[str, Side], options: argparse.Namespace) -> list[dict[str, Any]]:
  """One row for each side, the first of which the others are compared with.

  The first repetition compiles and is not timed.
  """
  rng = np.random.default_rng(0)
  h, w = options.video
  frames = rng.integers(0, 256, (2, h, w, 3), dtype=np.uint8)
  points_xy = (rng.uniform(0.1, 0.9, (options.points, 2)) * (w, h)).astype(np.float32)
  seconds, answers, compilations = {name: [] for name in sides}, {}, []
  compiled, passes, peaks = ({name: 0 for name in sides} for _ in range(3))

  def count(event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      compilations.append(duration)

  jax.monitoring.register_event_duration_secs_listener(count)
  for repetition in range(options.repetitions + 1):
    for name, side in sides.items():
      compiled_before, passes_before = len(compilations), side.passes()
      with Peak() as peak:
        began = time.perf_counter()
        answers[name] = side.answer(frames, points_xy)
        took = time.perf_counter() - began
      compiled[name] += len(compilations) - compiled_before
      passes[name] = side.passes() - passes_before
      if repetition:
        seconds[name].append(took)
        peaks[name] = max(peaks[name], peak.bytes)
  jax.monitoring.unregister_event_duration_listener(count)
  first = next(iter(sides))
  rows = []
  for name in sides:
    took = np.array(seconds[name])
    apart = np.linalg.norm(answers[name] - answers[first], axis=-1)
    row = dict(
      measure="track",
      side=name,
      points_per_second=round(options.points / float(np.median(took)), 3),
      first_is_faster_by=round(float(np.median(took / np.array(seconds[first]))), 3),
      passes_per_point=round(passes[name] / options.points, 3),
      peak_mib=round(peaks[name] / 2**20, 1),
      compilations=compiled[name],
      same_destinations=round(float(np.mean(apart <= SAME_PX)), 3),
    )
    rows.append(row | vars(options) | dict(device=jax.local_devices()[0].device_kind))
  return rows


def _options(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="launch/bench track", description=__doc__.split("\n\n")[0], allow_abbrev=False
  )
  add = parser.add_argument
  released = list(opt_cwm.MARK_SCALES)
  add("--model", default="", choices=["", *released], help="a released size; or else:")
  add("--image", type=int, default=128, help="side of the network's image in pixels")
  add("--width", type=int, default=192, help="of encoder and decoder")
  add("--depth", type=int, default=3, help="of encoder and decoder each")
  add("--heads", type=int, default=3)
  add("--dtype", default="float32", choices=["float32", "bfloat16"])
  add("--points", type=int, default=16, help="of one pair of frames")
  add("--masks", type=int, default=2)
  add("--zoom", type=int, default=0, help="rounds of refinement")
  add("--video", type=int, nargs=2, default=[256, 256], metavar=("HEIGHT", "WIDTH"))
  add("--repetitions", type=int, default=3)
  options = parser.parse_args(arguments)
  if min(options.points, options.repetitions) < 1:
    parser.error("points and repetitions are 1 or more")
  return options


def main() -> int:
  options = _options(sys.argv[1:])
  try:
    for row in measure(our_sides(options), options):
      print(json.dumps(row), flush=True)
  except (InputError, ValueError) as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
