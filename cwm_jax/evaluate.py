"""The evaluation job: the trackers a config names, on the data it names, as one table a data set.

What is done is kept in WORKDIR/results.json, and TAP-Vid's answers clip by clip beside it, so that
an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cwm_jax import writers
from cwm_jax.data import tapvid_pickles
from cwm_jax.evals import flow, tapvid, trackers
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError

RESULTS = "results.json"
_LOG = logging.getLogger(__name__)
# Columns of a table: (heading, name of the number, whether it is a fraction).
_POINTS = (
  ("AD px", "average_distance", False),
  ("MD px", "median_distance", False),
  ("delta %", "delta_avg", True),
)
_SCENES = (
  *_POINTS,
  ("MD/zero", "median_ratio", False),
  ("moving MD", "moving/median_distance", False),
  ("exchanged MD", "exchanged/median_distance", False),
  ("chance MD", "chance/median_distance", False),
)
_TAPVID = (
  *((head, f"pooled/{name}", fraction) for head, name, fraction in _POINTS),
  ("AJ %", "mean/average_jaccard", True),
  ("OA %", "mean/occlusion_accuracy", True),
  ("OF1 %", "mean/occlusion_f1", True),
)


def run(config: Any, workdir: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, float]]]:
  """Evaluates what `config.evaluate` asks for and prints a table for each data set.

  Args:
    config: see `configs/base.py`, section `evaluate`.
    workdir: for results.json, answers and metrics.

  Returns:
    {data set: {tracker: {number: value}}}; fractions as fractions.

  Raises:
    InputError: nothing to evaluate, data or trackers that cannot be had, or a workdir that holds
      results of other settings.
  """
  settings = config.evaluate
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  jobs = _jobs(settings, workdir)
  if not jobs or not settings.trackers:
    raise InputError("nothing to evaluate: set evaluate.trackers, and scenes, tapvid or flow_pairs")
  stored = _Stored(workdir / RESULTS, settings.to_dict())
  writer = writers.create(workdir)
  built: dict[str, Any] = {}
  for data_set, (columns, measure) in jobs.items():
    for step, name in enumerate(settings.trackers):
      if name in stored.numbers.get(data_set, {}):
        continue
      if name not in built:
        built[name] = _build_tracker(name, settings)
      _LOG.info("%s: %s", data_set, name)
      started = time.monotonic()
      numbers = dict(measure(name, built[name]))
      numbers["seconds"] = time.monotonic() - started
      stored.add(data_set, name, numbers)
      known = {k: v for k, v in numbers.items() if not math.isnan(v)}
      writer.write_scalars(step, {f"{data_set}/{name}/{k}": v for k, v in known.items()})
    print(
      f"\n{data_set}\n{table(stored.numbers[data_set], columns, settings.trackers)}", flush=True
    )
  writer.flush()
  writer.close()
  return stored.numbers


def table(
  rows: dict[str, dict[str, float]],
  columns: Iterable[tuple[str, str, bool]],
  order: Iterable[str],
) -> str:
  """Rows of numbers as aligned text; fractions in percent, "-" for what is not known."""
  columns = [*columns, ("seconds", "seconds", False)]
  width = max(len("tracker"), *(len(name) for name in rows))
  lines = ["  ".join(["tracker".ljust(width), *(f"{head:>12}" for head, _, _ in columns)])]
  for name in order:
    cells = []
    for _, key, fraction in columns:
      value = rows[name].get(key, math.nan) * (100 if fraction else 1)
      cells.append(f"{'-' if math.isnan(value) else f'{value:.2f}':>12}")
    lines.append("  ".join([name.ljust(width), *cells]))
  return "\n".join(lines)


class _Stored:
  """results.json: the settings it was made with and {data set: {tracker: numbers}}."""

  def __init__(self, path: Path, settings: dict[str, Any]):
    self._path = path
    # What is evaluated may grow from one run to the next; how may not change.
    how = {k: v for k, v in settings.items() if k not in ("trackers", "tapvid", "flow_pairs")}
    self._settings = json.loads(json.dumps(how))
    self.numbers: dict[str, dict[str, dict[str, float]]] = {}
    if path.is_file():
      try:
        found = json.loads(path.read_text())
        self.numbers, settings = found["numbers"], found["settings"]
      except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged; delete it or take another --workdir") from error
      changed = [k for k in self._settings if settings.get(k) != self._settings[k]]
      if changed:
        raise InputError(
          f"{path} holds results with other settings ({', '.join(changed)}); take another --workdir"
        )

  def add(self, data_set: str, tracker: str, numbers: dict[str, float]) -> None:
    self.numbers.setdefault(data_set, {})[tracker] = numbers
    partial = self._path.with_suffix(".partial")
    content = {"settings": self._settings, "numbers": self.numbers}
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, self._path)


def _jobs(settings: Any, workdir: Path) -> dict[str, tuple[Any, Callable[[str, Any], Iterable]]]:
  """{data set: (columns of its table, what measures a tracker on it)}."""
  jobs: dict[str, tuple[Any, Callable[[str, Any], Iterable]]] = {}
  if settings.scenes:
    # Drawn once for all trackers; 0.4 MB a scene.
    questions: list[flow.FlowQuestions] = []

    def on_scenes(name, tracker):
      if not questions:
        questions.extend(flow.scene_questions(limit=settings.scenes))
      return flow.FlowEvaluator(tracker, questions, honesty=settings.honesty).run()

    jobs[f"scenes-test-v1[{settings.scenes}]"] = (_SCENES, on_scenes)
  if settings.flow_pairs:

    def on_pairs(name, tracker):
      everything = [pair for _, pair in flow.flow_pair_questions(settings.flow_pairs)]
      return flow.FlowEvaluator(tracker, everything, honesty=False).run()

    jobs["flow_pairs"] = (_SCENES[:-2], on_pairs)
  for protocol in settings.protocols if settings.tapvid else ():
    title = protocol if protocol == "first" else f"{protocol}-{settings.frame_gap}"

    def on_clips(name, tracker, protocol=protocol, title=title):
      return tapvid.TapVidEvaluator(
        tracker,
        tapvid_pickles.open_clips(settings.tapvid),
        protocol=protocol,
        frame_gap=settings.frame_gap,
        kept=workdir / "answers" / title / name,
      ).run()

    jobs[f"tapvid/{title}"] = (_TAPVID, on_clips)
  return jobs


def _build_tracker(name: str, settings: Any) -> Any:
  """A tracker by name: mm<N> is the weights' with N masks, anything else a baseline."""
  masks = re.fullmatch(r"mm(\d+)", name)
  if not masks:
    return trackers.build(name)
  return Tracker.load(
    settings.weights or None,
    num_masks=int(masks[1]),
    mask_ratio=settings.mask_ratio or None,
    zoom=settings.zoom,
    mark=_mark(settings.mark),
    readout=settings.readout,
    masks_seed=settings.masks_seed,
    dtype=settings.dtype or None,
    memory_budget=settings.memory_budget or None,
    order=settings.order,
    average=settings.average,
  )


def _mark(settings: Any) -> dict[str, Any] | None:
  """The description that `perturb.build` takes: the kind's own settings out of the config's."""
  own = {"square": ("colour", "size"), "gaussian": ("amplitude", "sigma")}
  if not settings.kind:
    return None
  return {"kind": settings.kind, **{key: settings[key] for key in own.get(settings.kind, ())}}
