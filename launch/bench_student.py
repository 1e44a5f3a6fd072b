"""A distilled student against its teacher: accuracy, time and memory for a pair of frames.

Run by `launch/bench student`. Flow networks answer for every pixel, forward and back; the teacher
for some points of the same pair. The sides take turns in one process, so that other work on the
machine falls on all; each one's memory is that of a process of its own. Rows go to stdout, the same
as a table to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_facts
import numpy as np

SIDES = ("student", "supervised", "teacher")
_NEITHER = "neither"  # a process that asks nobody: what the others' memory is counted from
_COLUMNS = (
  ("AD px", "average_distance", False),
  ("MD px", "median_distance", False),
  ("delta %", "delta_avg", True),
  ("s / pair", "seconds_per_pair", False),
  ("pairs/s", "pairs_per_second", False),
  ("MiB", "mib", False),
  ("x teacher", "ratio", False),
)


def load(side: str, options: argparse.Namespace) -> Any:
  """A side's tracker."""
  from cwm_jax.tracker import Tracker

  if side == "teacher":
    return Tracker.load(options.teacher, num_masks=options.masks, readout="window")
  return Tracker.load(getattr(options, side))


def question(side: str, tracker: Any, options: argparse.Namespace) -> Callable[[np.ndarray], Any]:
  """What a side is asked about a pair uint8 [2, H, W, 3]."""
  if side != "teacher":
    return lambda pair: tracker.dense_flow(*pair, stride=1)
  points_xy = np.random.default_rng(1).uniform(0, options.side, (options.points, 2))
  return lambda pair: tracker.flow(*pair, points_xy.astype(np.float32))


def frames(options: argparse.Namespace) -> np.ndarray:
  """A pair of noise."""
  shape = (2, options.side, options.side, 3)
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def flops_of_answer(side: str, tracker: Any, options: argparse.Namespace) -> float:
  """Model FLOPs of an answer: both directions of a flow network, or the passes of the teacher."""
  import jax

  from cwm_jax import progress

  engine = tracker._engine  # the network itself is nobody else's affair
  if side != "teacher":
    both = jax.ShapeDtypeStruct((2, 2, options.side, options.side, 3), "float32")
    return progress.matmul_flops(engine._flow_fn, both)
  passes = (options.points + 1) * options.masks
  return passes * bench_facts.pass_flops(
    engine._predict_fn, engine.image_hw, engine.masks.shape[-2:]
  )


def in_turns(
  trackers: dict[str, Any], options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, int]]:
  """Median seconds of each side, and its compilations; the first turn is not timed."""
  from cwm_jax import progress

  asked = {side: question(side, tracker, options) for side, tracker in trackers.items()}
  seconds: dict[str, list[float]] = {side: [] for side in asked}
  compiled, counter = dict.fromkeys(asked, 0), progress.CompilationCounter()
  pair = frames(options)
  for turn in range(options.repetitions + 1):
    for side, answer in asked.items():
      before, began = counter.count, time.perf_counter()
      answer(pair)
      if turn:
        seconds[side].append(time.perf_counter() - began)
      compiled[side] += counter.count - before
  return {side: statistics.median(taken) for side, taken in seconds.items()}, compiled


def accuracy(trackers: dict[str, Any], scenes: int) -> dict[str, dict[str, float]]:
  """{side: number: value} on the first `scenes` of scenes-test-v1, pixels at 256 x 256."""
  from cwm_jax.evals import flow

  if not scenes:
    return {side: {} for side in trackers}
  questions = list(flow.scene_questions(limit=scenes))
  found = {}
  for side, tracker in trackers.items():
    numbers = dict(flow.FlowEvaluator(tracker, questions, honesty=False).run())
    found[side] = {name: numbers[name] for _, name, _ in _COLUMNS[:3]}
  return found


def peak_mib(side: str) -> float:
  """The peak memory of a process that answers once."""
  asked = [sys.executable, __file__, *sys.argv[1:], "--only", side]
  # A GPU's memory is this process's already, but for the rest.
  sharing = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  done = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True, env=sharing)
  return json.loads(done.stdout)["mib"]


def main() -> int:
  """Prints a JSON line for each side; exit code 2 where something given cannot be used."""
  parser = argparse.ArgumentParser(prog="launch/bench student", description=__doc__)
  parser.add_argument("--student", default="student-tiny", help="weights file or shipped name")
  parser.add_argument("--supervised", help="one more: the same network trained on the truth")
  parser.add_argument("--teacher", help="a predictor (default: the shipped one)")
  parser.add_argument("--scenes", type=int, default=0, help="of scenes-test-v1, for accuracy")
  parser.add_argument("--side", type=int, default=256, help="of the frames, pixels")
  parser.add_argument("--points", type=int, default=16, help="that the teacher is asked about")
  parser.add_argument("--masks", type=int, default=10, help="of the teacher")
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--only", choices=(*SIDES, _NEITHER), help=argparse.SUPPRESS)
  options = parser.parse_args()
  from cwm_jax.evals import tapvid_report
  from cwm_jax.types import InputError

  sides = [side for side in SIDES if side != "supervised" or options.supervised]
  try:
    if options.only:
      if options.only != _NEITHER:
        question(options.only, load(options.only, options), options)(frames(options))
      print(json.dumps({"mib": bench_facts.peak_mib()}))
      return 0
    trackers = {side: load(side, options) for side in sides}
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  (seconds, compiled), scores = in_turns(trackers, options), accuracy(trackers, options.scenes)
  memory = {side: peak_mib(side) for side in (*sides, _NEITHER)}
  rows = {}
  for side in sides:
    flops = flops_of_answer(side, trackers[side], options)
    told = {key: getattr(options, key) for key in ("scenes", "side", "repetitions")}
    told |= {key: getattr(options, key) for key in ("points", "masks") if side == "teacher"}
    rows[side] = bench_facts.row(
      side,
      weights=Path(getattr(options, side) or "shipped").name,
      **scores[side],
      seconds_per_pair=round(seconds[side], 4),
      pairs_per_second=round(1 / seconds[side], 2),
      mib=round(memory[side] - memory[_NEITHER]),
      peak=memory[side],
      gflop_per_pair=float(f"{flops / 1e9:.4g}"),
      baseline="teacher",
      ratio=seconds["teacher"] / seconds[side],
      flop_per_second=flops / seconds[side],
      compilations=compiled[side],
      **told,
    )
    print(json.dumps(rows[side]))
  print(tapvid_report.table(rows, _COLUMNS, corner="side"), file=sys.stderr)
  return 0


if __name__ == "__main__":
  sys.exit(main())
