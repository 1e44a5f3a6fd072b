"""A distilled student against its teacher: time and memory for a pair of frames.

Run by `launch/bench student`. The student answers for every pixel, forward and back; the teacher
for some points of the same pair. Both sides take turns in one process, so that other work on the
machine falls on both; each one's memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("student", "teacher", "neither")


def make(side: str, options: argparse.Namespace) -> Callable[[np.ndarray], Any]:
  """What answers for a pair uint8 [2, H, W, 3]."""
  from cwm_jax.tracker import Tracker

  if side == "student":
    student = Tracker.load(options.student)
    return lambda pair: student.dense_flow(*pair, stride=1)
  if side == "teacher":
    teacher = Tracker.load(options.teacher, num_masks=options.masks, readout="window")
    where = np.random.default_rng(1).uniform(0, options.side, (options.points, 2))
    return lambda pair: teacher.flow(*pair, where.astype(np.float32))
  return lambda pair: None


def frames(options: argparse.Namespace) -> np.ndarray:
  """A pair of noise."""
  shape = (2, options.side, options.side, 3)
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def in_turns(options: argparse.Namespace) -> dict[str, Any]:
  """Median seconds of each side; the first turn compiles and is not timed."""
  answer = {side: make(side, options) for side in SIDES[:2]}
  seconds: dict[str, list[float]] = {side: [] for side in answer}
  pair = frames(options)
  for turn in range(options.repetitions + 1):
    for side in answer:
      began = time.perf_counter()
      answer[side](pair)
      if turn:
        seconds[side].append(time.perf_counter() - began)
  medians = {side: statistics.median(taken) for side, taken in seconds.items()}
  return {
    **{f"{side}_seconds": round(value, 4) for side, value in medians.items()},
    "student_pairs_per_second": round(1 / medians["student"], 2),
    "teacher_over_student": round(medians["teacher"] / medians["student"], 1),
  }


def peak_mib(side: str) -> float:
  """The peak memory of a process that answers once."""
  asked = [sys.executable, __file__, *sys.argv[1:], "--only", side]
  done = subprocess.run(asked, capture_output=True, text=True, check=True)
  return json.loads(done.stdout)["mib"]


def peak_of_this_process() -> float:
  """MiB. Not `ru_maxrss`, which a process takes over from the one that started it."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> int:
  """Prints one JSON line; the exit code is 2 where something given cannot be used."""
  parser = argparse.ArgumentParser(prog="launch/bench student", description=__doc__)
  parser.add_argument("--student", default="student-tiny", help="weights file or shipped name")
  parser.add_argument("--teacher", default=None, help="the same (default: the shipped predictor)")
  parser.add_argument("--side", type=int, default=256, help="of the frames, pixels")
  parser.add_argument("--points", type=int, default=16, help="that the teacher is asked about")
  parser.add_argument("--masks", type=int, default=10, help="of the teacher")
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
  options = parser.parse_args()
  from cwm_jax.types import InputError

  try:
    if options.only:
      make(options.only, options)(frames(options))
      print(json.dumps({"mib": peak_of_this_process()}))
      return 0
    row = in_turns(options)
    memory = {side: peak_mib(side) for side in SIDES}
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  for side in SIDES[:2]:
    row[f"{side}_mib"] = round(memory[side] - memory["neither"])
  settings = {key: value for key, value in vars(options).items() if key != "only"}
  print(json.dumps(row | settings))
  return 0


if __name__ == "__main__":
  sys.exit(main())
