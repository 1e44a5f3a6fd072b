"""Where metrics and pictures go: TensorBoard, `metrics.jsonl`, the log; all through CLU's writers.

CLU imports TensorFlow for its summary writer. Where TensorFlow is absent, a module of that name
with a writer over tensorboardX takes its place before CLU is imported; the files are the same kind.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import types as python_types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cwm_jax import whole_files

JSONL = "metrics.jsonl"
_HISTORY = 12  # rows of a picture of the whole training


def create(
  workdir: str | os.PathLike,
  *,
  just_logging: bool = False,
  resume_step: int = 0,
  done: Collection[int] = (),
) -> Any:
  """A CLU `MetricWriter` for this run.

  Args:
    workdir: metrics.jsonl and the TensorBoard event files go here.
    just_logging: write to the log only (for every process but the first).
    resume_step: rows beyond this step, left by a run that went further before it was killed, are
      taken out, so that no step appears twice.
    done: steps beyond it whose rows stay, of a job that does not do its steps in their order.
  """
  _stand_in_for_tensorflow()
  from clu import metric_writers

  logger = metric_writers.LoggingWriter()
  if just_logging:
    return metric_writers.AsyncMultiWriter([logger])
  workdir = Path(workdir)
  drop_rows_after(workdir / JSONL, resume_step, done=done)
  # TensorBoard hides all later steps or none.
  board = TensorboardWriter(os.fspath(workdir), purge_step=None if done else resume_step + 1)
  return metric_writers.AsyncMultiWriter([logger, board, JsonlWriter(workdir / JSONL)])


def drop_rows_after(path: Path, step: int, *, done: Collection[int] = ()) -> None:
  """Rewrites a JSONL file without rows beyond `step`, but of `done`, and without one cut short."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue
    if row["step"] <= step or row["step"] in done:
      kept.append(line + "\n")
  with whole_files.writing(path) as partial:
    partial.write_text("".join(kept))


def write_pictures(
  writer: Any, workdir: str | os.PathLike, step: int, pictures: Mapping[str, Any]
) -> None:
  """Pictures to TensorBoard and, one above the other, to `pictures/<name>_<step>.png`.

  Args:
    writer: as `create` makes it.
    pictures: name -> float images [N, H, W, 3], RGB in [0, 1].
  """
  pictures = {name: np.asarray(images) for name, images in pictures.items()}
  writer.write_images(step, pictures)
  folder = Path(workdir) / "pictures"
  folder.mkdir(exist_ok=True)
  for name, images in pictures.items():
    sheet = np.concatenate(np.round(np.clip(images, 0, 1) * 255).astype(np.uint8))
    Image.fromarray(sheet).save(folder / f"{name}_{step:08d}.png")


def write_history(
  writer: Any, workdir: str | os.PathLike, step: int, name: str, height: int
) -> None:
  """How a picture changed over training: its first example at up to 12 of the steps, from the top.

  Made of what `write_pictures` kept up to `step`, as `pictures/<name>-over-training.png` and in
  TensorBoard; not with fewer than two steps.

  Args:
    name: of the pictures.
    height: of one example, pixels.
  """
  folder = Path(workdir) / "pictures"
  kept = {int(p.stem.rpartition("_")[2]): p for p in folder.glob(f"{name}_{'[0-9]' * 8}.png")}
  steps = sorted(at for at in kept if at <= step)
  if len(steps) < 2:
    return
  chosen = np.unique(np.linspace(0, len(steps) - 1, _HISTORY).round().astype(int))
  rows = []
  for at in chosen:
    with Image.open(kept[steps[at]]) as sheet:
      rows.append(np.asarray(sheet)[:height])
  strip = np.concatenate(rows)
  Image.fromarray(strip).save(folder / f"{name}-over-training.png")
  writer.write_images(step, {f"{name}-over-training": strip[None]})


class _Silent:
  """The parts of CLU's writer interface that a scalar-only writer leaves out."""

  def write_summaries(self, step, values, metadata=None):
    """Raw summaries are TensorFlow's own; nothing here makes them."""

  def write_images(self, step: int, images: Mapping[str, Any]):
    """Pictures are not rows."""

  def write_videos(self, step: int, videos: Mapping[str, Any]):
    """Videos are not rows."""

  def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int):
    """There is no sound."""

  def write_texts(self, step: int, texts: Mapping[str, str]):
    """Texts are not rows."""

  def write_histograms(self, step, arrays, num_buckets=None):
    """Histograms are not rows."""

  def write_hparams(self, hparams: Mapping[str, Any]):
    """The config is in config.json."""


class JsonlWriter(_Silent):
  """One JSON object a step and line: {"step": 100, "loss": 0.25, ...}."""

  def __init__(self, path: str | os.PathLike):
    self._path = Path(path)
    self._step = -1
    self._row: dict[str, float | None] = {}

  def write_scalars(self, step: int, scalars: Mapping[str, Any]):
    """Collects scalars; a step's row is written when the next step begins, or at `flush`."""
    if step != self._step:
      self.flush()
    self._step = step
    for name, value in scalars.items():
      number = float(value)
      # JSON has no NaN.
      self._row[name] = number if math.isfinite(number) else None

  def flush(self):
    """Appends the row that is being collected."""
    if self._row:
      with open(self._path, "a") as file:
        file.write(json.dumps({"step": self._step, **self._row}) + "\n")
    self._row = {}

  def close(self):
    """Writes what is left."""
    self.flush()


class TensorboardWriter(_Silent):
  """CLU's summary writer over tensorboardX; parameter names are CLU's, which passes keywords."""

  def __init__(self, log_dir: str, *, purge_step: int | None = None):
    from tensorboardX import SummaryWriter

    # What was written beyond the step that a run goes on from is hidden by the reader.
    self._board = SummaryWriter(log_dir, purge_step=purge_step)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]):
    """Scalars, by name."""
    for name, value in scalars.items():
      self._board.add_scalar(name, float(value), step)

  def write_images(self, step: int, images: Mapping[str, Any]):
    """Images [N, H, W, C], floats in [0, 1] or uint8, by name."""
    for name, value in images.items():
      self._board.add_images(name, np.asarray(value), step, dataformats="NHWC")

  def write_texts(self, step: int, texts: Mapping[str, str]):
    """Texts, by name."""
    for name, text in texts.items():
      self._board.add_text(name, text, step)

  def write_histograms(self, step: int, arrays: Mapping[str, Any], num_buckets=None):
    """Histograms of arrays, by name."""
    for name, array in arrays.items():
      bins = (num_buckets or {}).get(name) or 30
      self._board.add_histogram(name, np.asarray(array).ravel(), step, bins=bins)

  def write_hparams(self, hparams: Mapping[str, Any]):
    """The flat config, as text."""
    rows = "\n".join(f"    {name} = {value}" for name, value in hparams.items())
    self._board.add_text("hparams", rows, 0)

  def flush(self):
    """Pushes events to the file."""
    self._board.flush()

  def close(self):
    """Flushes and closes the file."""
    self._board.close()


def _stand_in_for_tensorflow() -> None:
  """Makes `import clu.metric_writers` work where TensorFlow is not installed."""
  name = "clu.metric_writers.summary_writer"
  if name not in sys.modules and importlib.util.find_spec("tensorflow") is None:
    module = python_types.ModuleType(name)
    module.SummaryWriter = TensorboardWriter
    sys.modules[name] = module
