"""The commands flow and info, and what all commands share: loading a tracker, reporting."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cwm_jax import compilation_cache, inputs, tracking, viz, whole_files
from cwm_jax.data import images
from cwm_jax.pretrained import flow_networks, releases
from cwm_jax.pretrained import weights as weights_file
from cwm_jax.types import InputError

_MARKS = 16  # in one pass, where a grid has points for them
_SHOWN = 420  # longer side of a picture on a page, pixels
_FIELDS = {"flo": "flow.flo", "png": "flow-kitti.png"}


def flow(
  *,
  first: str,
  second: str,
  stride: int,
  marks: int | None,
  points: str | None,
  form: str,
  reading: inputs.Reading,
  out: str,
  as_json: bool,
) -> None:
  """Where the points of one image are in another; dense flow or given points.

  Args:
    first, second: image files of one size.
    stride: pixels between read-outs of dense flow.
    marks: in one pass, for dense flow; None: see `marks_for`.
    points: CSV of points, instead.
    form: of dense flow, "flo" (Middlebury) or "png" (KITTI's 16 bits, to 1/64 pixel).
    reading, out, as_json: what all commands have.

  Raises:
    InputError: anything given that cannot be used.
  """
  frame1, frame2 = images.read_image(first), images.read_image(second)
  if frame1.shape != frame2.shape:
    sizes = " and ".join(f"{f.shape[1]} x {f.shape[0]}" for f in (frame1, frame2))
    raise InputError(f"the images have different sizes, {sizes}; resize one of them first")
  size_hw = frame1.shape[:2]
  asked = None if points is None else inputs.read_points(points, size_hw, with_time=False)
  folder = inputs.output_folder(out)
  tracker = load_tracker(reading)
  start = time.perf_counter()
  if asked is None:
    marks = marks_for(size_hw, stride, reading) if marks is None else marks
    coarse_xy, at_xy = tracker.dense_flow(frame1, frame2, stride=stride, marks=marks)
    flow_xy = viz.spread(coarse_xy, at_xy, size_hw)
    length = np.hypot(*np.moveaxis(coarse_xy, -1, 0))
    files = [
      inputs.save_flow(folder / _FIELDS[form], flow_xy, form=form),
      viz.write_png(folder / "flow.png", _flow_page(frame1, frame2, flow_xy, Path(first).name)),
    ]
    facts = {"read_outs": length.size}
  else:
    from_xy = asked[:, :0:-1].copy()
    found = tracker.flow(frame1, frame2, from_xy)
    length = np.hypot(*(found.xy - from_xy).T)
    files = [
      inputs.save_arrays(
        folder / "points.npz",
        from_xy=from_xy,
        to_xy=found.xy,
        occluded=~found.visible,
        confidence=found.confidence,
        size_hw=np.array(size_hw),
      ),
      viz.write_png(folder / "points.png", _points_page(frame1, frame2, from_xy, found)),
    ]
    facts = {"points": len(asked), "to_xy": found.xy.tolist(), "visible": found.visible.tolist()}
  seconds = time.perf_counter() - start
  facts |= {
    "mean_length": round(float(length.mean()), 3),
    "median_length": round(float(np.median(length)), 3),
    "seconds": round(seconds, 2),
    "files": [str(path) for path in files],
  }
  text = (
    f"{length.size} points in {seconds:.1f} s; they move by {length.mean():.2f} pixels on average, "
    f"median {np.median(length):.2f}"
  )
  report(facts, text + written(files), as_json=as_json)


def marks_for(size_hw: tuple[int, int], stride: int, reading: inputs.Reading) -> int:
  """Marks in one pass for a grid of read-outs; see `Tracker.dense_flow`.

  16, but 1 where points are few, or choose their masks.

  Raises:
    InputError: a stride that does not fit.
  """
  few = tracking.grid(size_hw, stride)[..., 0].size < 4 * _MARKS
  return 1 if few or reading.masks == "adaptive" else _MARKS


def info(*, weights: str | None, listed: bool, as_json: bool) -> None:
  """Prints what a weights file holds, and whether it fits the model that it describes.

  Args:
    weights: file or name; None takes the shipped one.
    listed: print the names of all weights that have one, instead.
    as_json: print JSON.

  Raises:
    InputError: not a weights file of this project, or one that does not fit its own config.
  """
  if listed:
    return _list_names(as_json=as_json)
  path = weights_file.shipped() if weights is None else releases.locate(weights)
  header = weights_file.read_header(path)
  shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
  _, wanted = weights_file.expected_shapes(header.config, where=f"weights file {path}")
  weights_file.check_names(shapes, wanted, where=f"weights file {path}")
  count = sum(int(np.prod(shape)) for shape in shapes.values())
  stored = Counter(tensor.dtype for tensor in header.tensors.values())
  facts = {
    "path": str(path),
    "bytes": path.stat().st_size,
    "parameters": count,
    "dtypes": dict(stored),
    "config": header.config,
    "extra": header.extra,
    "tensors": {name: [t.dtype, list(t.shape)] for name, t in header.tensors.items()},
  }
  section = flow_networks.SECTION if flow_networks.is_flow_network(header.config) else "model"
  width = max(len(name) for name in shapes)
  lines = [
    f"{path}",
    f"{count:,} parameters, {path.stat().st_size / 1e6:.1f} MB, {', '.join(stored)}",
    "",
    section,
    *(f"  {key:<16} {value}" for key, value in header.config[section].items()),
  ]
  if header.extra:
    lines += ["", "card", *_indented(header.extra)]
  lines += ["", "parameters"]
  lines += [
    f"  {name:<{width}}  {' x '.join(map(str, t.shape)) or 'scalar'}"
    for name, t in header.tensors.items()
  ]
  report(facts, "\n".join(lines), as_json=as_json)


def _list_names(*, as_json: bool) -> None:
  titles = {name: "in the package" for name in weights_file.shipped_names()}
  titles |= {name: releases.get(name).title for name in releases.names()}
  width = max(map(len, titles))
  lines = [f"{name:<{width}}  {title}" for name, title in titles.items()]
  lines += ["", "Those of other projects are fetched when they are first named."]
  report({"names": titles}, "\n".join(lines), as_json=as_json)


def load_tracker(reading: inputs.Reading, *, mark: Any = None):
  """A Tracker by the command line's options, or with another mark than theirs."""
  from cwm_jax.tracker import Tracker

  compilation_cache.keep_programs()
  path = weights_file.shipped() if reading.weights is None else reading.weights
  return Tracker.load(
    path,
    num_masks=reading.masks,
    readout=reading.readout,
    masks_seed=reading.seed,
    mark=reading.mark if mark is None else mark,
  )


def written(files: list[Path]) -> str:
  """The last lines of a report: which files were written."""
  return "\nwritten  " + "\n         ".join(str(path) for path in files)


def report(facts: dict[str, Any], text: str, *, as_json: bool) -> None:
  """Prints the outcome for a program or for a person."""
  # A path in the text may hold what is no text.
  print(whole_files.to_json(facts) if as_json else images.shown(text), flush=True)


def shown(image: np.ndarray, longest: int = _SHOWN) -> np.ndarray:
  """An image at the size that pages use."""
  h, w = image.shape[:2]
  factor = longest / max(h, w)
  return viz.resized(image, (max(1, round(h * factor)), max(1, round(w * factor))))


def _flow_page(frame1, frame2, flow_xy, name: str) -> np.ndarray:
  longest = float(np.hypot(*np.moveaxis(flow_xy, -1, 0)).max())
  return viz.page(
    [
      [
        ("A", shown(frame1)),
        ("B", shown(frame2)),
        ("flow from A to B", shown(viz.flow_colours(flow_xy, longest=longest))),
        (f"direction; rim: {longest:.1f} px", viz.flow_wheel(140)),
      ]
    ],
    title=f"Flow, {name}",
  )


def _points_page(frame1, frame2, from_xy, found) -> np.ndarray:
  h, w = frame1.shape[:2]
  pictures = [shown(frame1), shown(frame2)]
  factor = np.array([pictures[0].shape[1] / w, pictures[0].shape[0] / h], np.float32)
  return viz.page(
    [
      [
        ("A, with the points", viz.draw_points(pictures[0], from_xy * factor)),
        (
          "B, where they went",
          viz.draw_points(
            pictures[1], found.xy * factor, visible=found.visible, from_xy=from_xy * factor
          ),
        ),
      ]
    ],
    title="Points",
    note="Hollow: not seen in B. Lines begin where the point was in A.",
  )


def _indented(facts: dict[str, Any], depth: int = 1) -> list[str]:
  lines = []
  for key, value in facts.items():
    if isinstance(value, dict):
      lines += [f"{'  ' * depth}{key}", *_indented(value, depth + 1)]
    else:
      lines.append(f"{'  ' * depth}{key}: {value}")
  return lines
