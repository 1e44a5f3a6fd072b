"""Points tracked per second: our schedule of passes against the public release's.

Run by `launch/bench track`. All sides ask the same questions of the same network with random
weights and a learned mark, under the protocol "release". The release's schedule is one point at a
time and one pass at a time, with a clean pass of its own for every point and mask; ours shares
clean passes and batches. With `--torch` the public PyTorch code itself takes part, in a process of
its own. Repetitions are interleaved, so that other work on the machine falls on all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

import bench_facts
import numpy as np
import track_sides

from cwm_jax import progress
from cwm_jax.configs import opt_cwm
from cwm_jax.types import InputError

PUBLIC = "public code"
SAME_PX = 1.0  # random weights have many equal answers; more than this is another one


def ask(options: argparse.Namespace) -> track_sides.Question:
  """Noise, and points that are not at its border."""
  rng = np.random.default_rng(0)
  h, w = options.video
  frames = rng.integers(0, 256, (2, h, w, 3), dtype=np.uint8)
  points_xy = (rng.uniform(0.1, 0.9, (options.points, 2)) * (w, h)).astype(np.float32)
  return track_sides.Question(frames, points_xy)


def measure(
  sides: dict[str, track_sides.Side],
  question: track_sides.Question,
  repetitions: int,
  *,
  baseline: str,
  pass_flops: float,
) -> list[dict[str, Any]]:
  """One row for each side, compared with the last one, which `baseline` names in full.

  The first repetition compiles and is not timed. What compiles nothing is warmed up by one point.
  """
  seconds, cpu = ({name: [] for name in sides} for _ in range(2))
  answers, compilations = {}, progress.CompilationCounter()
  compiled, grown, peaks = ({name: 0 for name in sides} for _ in range(3))
  for repetition in range(repetitions + 1):
    for name, side in sides.items():
      compiled_before = compilations.count
      began = time.perf_counter()
      asked = question if repetition or name != PUBLIC else question.first()
      answer = answers[name] = side(asked)
      took = time.perf_counter() - began
      print(f"{name}, repetition {repetition}: {took:.1f} s", file=sys.stderr, flush=True)
      compiled[name] += compilations.count - compiled_before
      if repetition:
        seconds[name].append(took)
        cpu[name].append(answer.cpu_seconds)
        grown[name] = max(grown[name], answer.grown)
        peaks[name] = max(peaks[name], answer.peak)
  (first, *_, last), points, rows = sides, len(question.points_xy), []
  for name, answer in answers.items():
    took = np.array(seconds[name])
    apart = np.linalg.norm(answer.xy - answers[first].xy, axis=-1)
    row = bench_facts.row(
      "track",
      side=name,
      points_per_second=round(points / float(np.median(took)), 4),
      baseline=baseline,
      ratio=float(np.median(np.array(seconds[last]) / took)),
      flop_per_second=answer.passes * pass_flops / float(np.median(took)),
      cpu_seconds_per_point=round(float(np.median(cpu[name])) / points, 4),
      passes_per_point=round(answer.passes / points, 3),
      grown_mib=round(grown[name] / 2**20, 1),
      peak=peaks[name] / 2**20,
      compilations=compiled[name],
      same_destinations=round(float(np.mean(apart <= SAME_PX)), 3),
    )
    rows.append(row)
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
  add("--torch", default="", metavar="CODE", help="the public code; it then takes part itself")
  add(
    "--torch-python",
    default="python3",
    metavar="PYTHON",
    help="that has torch, timm, einops, requests, tqdm and dacite",
  )
  add("--torch-batch", type=int, default=0, help="points at a time in the public code; 0: all")
  options = parser.parse_args(arguments)
  if min(options.points, options.repetitions) < 1:
    parser.error("points and repetitions are 1 or more")
  if options.torch and (options.zoom or options.dtype != "float32"):
    parser.error("beside the public code zoom is 0 and the dtype float32")
  return options


def main() -> int:
  """Prints the rows; exit code 2 where something given cannot be used."""
  options = _options(sys.argv[1:])
  # A released size is told by its name; the options beside it say nothing then.
  unused = {"image", "width", "depth", "heads"} if options.model else {"model"}
  settings = {name: value for name, value in vars(options).items() if name not in unused}
  try:
    with contextlib.ExitStack() as stack:
      question, network = ask(options), track_sides.build(options)
      sides, baseline = {"ours": track_sides.ours(network, options)}, "release schedule"
      if options.torch:
        opened = track_sides.public(network, options, question)
        sides[PUBLIC], versions = stack.enter_context(opened)
        baseline = f"{PUBLIC}, {versions}"
      else:
        sides[baseline] = track_sides.ours(network, options, one_by_one=True)
      (h, w), patch = network.model["image_hw"], network.model["patch"]
      flops = bench_facts.pass_flops(network.predict, (h, w), (h // patch, w // patch))
      compared = dict(baseline=baseline, pass_flops=flops)
      for row in measure(sides, question, options.repetitions, **compared):
        print(json.dumps(row | settings), flush=True)
  except (InputError, ValueError) as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
