"""Seconds from a click on the viewer's page to the point's whole track.

Run by `launch/bench view`. Asks over HTTP as the page does after a click: the explanation and the
track at the same time, of the rendered clip. The first click comes at once, while programs are
still compiled or read from disk; the others when all is ready.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time

_PAUSE_S = 0.09  # after which the page asks for the explanation


def main() -> int:
  """Prints the row."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--weights", default=None, help="default: the shipped predictor")
  parser.add_argument("--masks", type=int, default=8, help="default: 8, as cwm-jax view")
  parser.add_argument("--clicks", type=int, default=5)
  options = parser.parse_args()
  if options.clicks < 1:
    parser.error("--clicks is 1 or more")
  import bench_facts
  import numpy as np

  from cwm_jax import Tracker, compilation_cache, progress
  from cwm_jax.viewer import command, footage
  from cwm_jax.viewer.answers import Answers

  compilation_cache.keep_programs()
  compilations = progress.CompilationCounter()
  tracker = Tracker.load(options.weights, num_masks=options.masks, readout="window")
  clip = footage.rendered()
  server = command.make_server(Answers(clip, tracker), 0)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  threading.Thread(target=server.answers.warm_up, daemon=True).start()
  h, w = clip.size_hw
  points = np.random.default_rng(0).uniform(0.2, 0.8, (options.clicks, 2)) * (w, h)
  taken = [_click(server, x, y, len(clip.frames)) for x, y in points]
  later = taken[1:] or taken
  row = bench_facts.row(
    "view",
    masks=options.masks,
    frames=len(clip.frames),
    clicks=options.clicks,
    first_click_seconds=round(taken[0], 2),
    click_seconds=round(float(np.median(later)), 2),
    slowest_seconds=round(max(later), 2),
    compilations=compilations.count,
  )
  print(json.dumps(row), flush=True)
  server.shutdown()
  return 0


def _click(server, x: float, y: float, frames: int) -> float:
  """Seconds until the track of a point of the first frame is whole."""
  began = time.perf_counter()
  explained = []

  def explain() -> None:
    time.sleep(_PAUSE_S)
    explained.extend(_lines(server, f"/explain?t1=0&t2={frames // 3}&x={x}&y={y}"))

  other = threading.Thread(target=explain)
  other.start()
  told = {event["t"] for event in _lines(server, f"/track?t=0&x={x}&y={y}") if "t" in event}
  seconds = time.perf_counter() - began
  if told != set(range(frames)):
    raise SystemExit(f"the track has {len(told)} of {frames} frames")
  other.join()
  if not explained:
    raise SystemExit("the click was not explained")
  return seconds


def _lines(server, path: str):
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=600)
  connection.request("GET", path, headers={"X-Token": server.token})
  answer = connection.getresponse()
  if answer.status != 200:
    raise SystemExit(f"{path}: {answer.status} {answer.read().decode()}")
  for line in answer:
    yield json.loads(line)
  connection.close()


if __name__ == "__main__":
  sys.exit(main())
