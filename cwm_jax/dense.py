"""`cwm-jax dense`: a flow field for every frame of a video, as files and as a video of colours."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cwm_jax import commands, inputs, terminal, viz, whole_files
from cwm_jax.data import flowfiles, images
from cwm_jax.types import InputError

_READERS = {"flo": flowfiles.read_flo, "png": flowfiles.read_kitti}
_Timed = tuple[float, np.ndarray]  # a frame and its time in seconds
_VIDEO, _NOTE = "flow.mp4", "dense.json"
_DRAWN = 98  # percentile of a frame's flow lengths that is drawn in full colour


def run(
  *,
  video: str,
  stride: int,
  gap: int,
  marks: int | None,
  form: str,
  overlay: bool,
  reading: inputs.Reading,
  out: str,
  as_json: bool,
) -> None:
  """Writes the flow from each frame to the one `gap` later, NNNNNN.flo or .png, and flow.mp4.

  Beside them dense.json says what they are of; fields of an earlier run go where it is.

  A field is read out every `stride` pixels and interpolated between. Every file is whole or absent,
  so that what an interrupted run leaves can be used; the same command begins anew. Fields that
  another run left in the folder go when the first one is written.

  Args:
    video: file or folder of frames.
    stride: pixels between read-outs.
    gap: frames between the two of a pair.
    marks: in one pass, see `Tracker.dense_flow`; None: see `commands.marks_for`. A flow network
      needs none.
    form: "flo" (Middlebury) or "png" (KITTI's 16 bits, to 1/64 pixel).
    overlay: draw flow.mp4.
    reading, out, as_json: what all commands have.

  Raises:
    InputError: anything given that cannot be used, or a video with too few frames.
  """
  clip = inputs.open_clip(video)
  folder = inputs.output_folder(out)
  if form == "png" and folder.samefile(video):
    raise InputError(f"{out} holds the frames, which fields may overwrite; take another --out")
  tracker = commands.load_tracker(reading)
  if marks is None:
    marks = commands.marks_for(clip.size_hw, stride, reading)
  start = time.perf_counter()
  written: list[Path] = []
  lengths: list[float] = []
  times_s: list[float] = []

  def kept() -> str:
    return f"the first {len(written)} fields are in {folder}" if written else ""

  with terminal.keeping(kept):
    total = None if clip.length is None else max(0, clip.length - gap)
    pairs = terminal.progress(_pairs(clip.timed(), gap), total=total, unit="fields")
    for (time_s, first), (_, second) in pairs:
      coarse_xy, at_xy = tracker.dense_flow(first, second, stride=stride, marks=marks)
      if not written:
        inputs.remove_old(_old_files(folder, video), given=video)
        whole_files.write_json(folder / _NOTE, dict(video=video, gap=gap, stride=stride))
      path = folder / f"{len(written):06d}.{form}"
      inputs.save_flow(path, viz.spread(coarse_xy, at_xy, clip.size_hw), form=form)
      written.append(path)
      times_s.append(time_s)
      lengths.append(float(np.percentile(np.hypot(*np.moveaxis(coarse_xy, -1, 0)), _DRAWN)))
  if not written:
    raise InputError(f"{video} has no two frames that are {gap} apart")
  seconds = time.perf_counter() - start
  files = [written[0], written[-1]]
  if overlay:
    longest = max(float(np.median(lengths)) * 1.5, 1e-6)
    colours = (viz.flow_colours(_READERS[form](p)[0], longest=longest) for p in written)
    path = folder / _VIDEO

    def kept_undrawn() -> str:
      viz.partial_path(path).unlink(missing_ok=True)
      return kept()

    with terminal.keeping(kept_undrawn):
      files.append(viz.write_mp4(path, colours, fps=clip.fps, times_s=times_s))
  facts = {
    "fields": len(written),
    "gap": gap,
    "seconds": round(seconds, 2),
    "files": [str(path) for path in (*written, *files[2:])],
  }
  text = f"{len(written)} fields, each to {gap} frames later, in {seconds:.1f} s"
  commands.report(facts, text + commands.written(files), as_json=as_json)


def _old_files(folder: Path, video: str) -> list[Path]:
  """What this command left in a folder before; other pictures there, such as frames, are not it.

  Raises:
    InputError: there are fields and no note, so that they are somebody else's.
  """
  found = [p for p in folder.iterdir() if re.fullmatch(r"\d{6}\.(flo|png)", p.name) and p.is_file()]
  frames = folder.samefile(video)
  fields = [p for p in found if p.suffix == ".flo" or not frames and flowfiles.is_kitti(p)]
  if fields and not (folder / _NOTE).is_file():
    raise InputError(
      f"{images.shown(folder)} holds fields that this command did not write, as "
      f"{fields[0].name}; take another --out"
    )
  return [folder / _VIDEO, *fields]


def _pairs(frames: Iterator[_Timed], gap: int) -> Iterator[tuple[_Timed, _Timed]]:
  """Each frame with the one `gap` later; held are those in between."""
  held: deque[_Timed] = deque(maxlen=gap + 1)
  for frame in frames:
    held.append(frame)
    if len(held) == gap + 1:
      yield held[0], held[-1]
