"""The demo: 16 points through a rendered clip with known truth, or through the user's own video.

Prints a table of ways to track and draws what happened: the tracks, dense flow, the heat maps of
some points, and one point's whole story from mark to answer. A flow network, which is not asked by
marks, has tracks and flow only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cwm_jax import commands, inputs, track, viz
from cwm_jax.evals import tapvid_metrics
from cwm_jax.types import Explanation, InputError, Tracks

_GRID = 4  # points a side
_DENSE, _DENSE_MASKS = 10, 2  # read-outs a side of the flow picture, and masks for each
_PICTURE = 300  # side of a picture on a page, pixels
_FRAMES = 24
_SIZE_HW = (256, 256)
# Seed of the rendered clip: the first in which no layer has stripes, checkers or rows of text. What
# repeats itself looks the same one period further, and a match there tells nothing of a tracker.
_SCENE = 28
FPS = 12.0
_RED_SQUARE = {"kind": "square", "colour": [255, 0, 0]}


class _Clip(NamedTuple):
  """What is tracked: frames uint8 [T, H, W, 3]; the true tracks and flow where they are known."""

  name: str
  fps: float
  frames: np.ndarray
  indices: np.ndarray  # int [T]: which frames of the whole clip they are
  times_s: np.ndarray  # float [T]: when they come on display there
  truth: Tracks | None
  flow_xy: np.ndarray | None  # [H, W, 2] from frame 0 to frame `later`
  later: int  # the frame that the still pictures compare with frame 0


class _Row(NamedTuple):
  """One line of the table: a way to track, its tracks, how long it took."""

  name: str
  tracks: Tracks
  seconds: float


def run(
  *,
  video: str | None,
  reading: inputs.Reading,
  out: str,
  as_json: bool,
) -> None:
  """Runs the demo.

  Args:
    video: file or folder of frames; None renders a clip.
    reading: weights, masks and read-out.
    out: folder for tracks.npz (which tells by frame_indices and times_s what frames of the video
      were tracked), overlay.mp4, flow.png and, of a predictor, heatmaps.png and
      explanation.png.
    as_json: print JSON instead of the table.

  Raises:
    InputError: anything given that cannot be used.
  """
  from cwm_jax.flow_tracker import FlowNetworkTracker

  folder = inputs.output_folder(out)
  tracker = commands.load_tracker(reading)
  marked = not isinstance(tracker, FlowNetworkTracker)
  clip = _rendered() if video is None else _from_video(video)
  size_hw = clip.frames.shape[1:3]
  points_xy = inputs.grid_points_xy(_GRID, size_hw)
  queries = np.concatenate([np.zeros((len(points_xy), 1)), points_xy[:, ::-1]], axis=1)
  queries = queries.astype(np.float32)

  if not as_json:
    print(_heading(clip), flush=True)
  name = f"best mark, MM-{reading.masks}" if marked else "flow network"
  ways = [(name, lambda: tracker.track(clip.frames, queries))]
  if marked:
    square = commands.load_tracker(reading._replace(masks=1), mark=_RED_SQUARE)
    ways.append(("red square, MM-1", lambda: square.track(clip.frames, queries)))
  ways.append(("zero motion", lambda: _still(points_xy, len(clip.frames))))
  rows, table = [], []
  told = dict(size_hw=size_hw, times_s=clip.times_s, frame_indices=clip.indices)
  files = []
  for name, ask in ways:
    rows.append(_timed(name, ask))
    # At once: what follows may be interrupted.
    if not files:
      files.append(track.save(folder / "tracks.npz", rows[0].tracks, queries, **told))
    table.append(_measured(rows[-1], clip.truth, size_hw))
    # Each line as soon as it is known: the whole takes a minute on a small machine.
    if not as_json:
      print(_line(table[-1]), flush=True)
  tracks = rows[0].tracks
  dense = commands.load_tracker(reading._replace(masks=min(reading.masks, _DENSE_MASKS)))
  files += _draw(folder, dense, clip, tracks)
  if marked:
    files += _draw_stories(folder, tracker, clip, tracks, points_xy)
  facts = {"clip": clip.name, "table": table, "files": [str(path) for path in files]}
  commands.report(facts, commands.written(files), as_json=as_json)


def rendered_scene() -> tuple[dict, np.ndarray]:
  """The parameters of the demo's scene, and its frames, uint8 [T, H, W, 3]."""
  from cwm_jax.data import procedural, rendering

  scene = procedural.draw_scene(_SCENE, procedural.PRESETS["demo"], num_frames=_FRAMES)
  frames = rendering.render_video(scene, size_hw=_SIZE_HW, texture_size=max(_SIZE_HW))
  return scene, np.round(np.asarray(frames) * 255).astype(np.uint8)


def _rendered() -> _Clip:
  from cwm_jax.data import rendering

  scene, frames = rendered_scene()
  points_xy = inputs.grid_points_xy(_GRID, _SIZE_HW)
  truth = rendering.trace(scene, 0, points_xy, size_hw=_SIZE_HW)
  later = _FRAMES // 3
  # Every pixel of frame 0 is a point too; its track to `later` is the true flow.
  ends = {"pose", "pose_inv", "deform", "light"}
  pair = {name: value[[0, later]] if name in ends else value for name, value in scene.items()}
  pixels = inputs.grid_points_xy(_SIZE_HW[0], _SIZE_HW)
  flow = np.asarray(rendering.trace(pair, 0, pixels, size_hw=_SIZE_HW).xy)[:, 1] - pixels
  return _Clip(
    name=f"rendered clip, seed {_SCENE}",
    fps=FPS,
    frames=frames,
    indices=np.arange(_FRAMES),
    times_s=np.arange(_FRAMES) / FPS,
    truth=Tracks(*(np.asarray(values) for values in truth)),
    flow_xy=flow.reshape(*_SIZE_HW, 2),
    later=later,
  )


def _from_video(path: str) -> _Clip:
  """At most 24 frames, spread evenly over the clip."""
  clip = inputs.open_clip(path)
  total = sum(1 for _ in clip.frames())
  if total < 2:
    raise InputError(f"{path} has {total} frame; motion needs two or more")
  indices = np.unique(np.linspace(0, total - 1, min(total, _FRAMES)).round().astype(int))
  chosen = set(indices.tolist())
  timed = [timed for t, timed in enumerate(clip.timed()) if t in chosen]
  times_s, frames = (np.stack(values) for values in zip(*timed))
  note = "" if len(chosen) == total else f" ({len(chosen)} of its {total} frames, evenly spread)"
  fps = max(2.0, clip.fps * len(chosen) / total)
  later = max(1, len(chosen) // 3)
  return _Clip(clip.name + note, fps, frames, indices, times_s, None, None, later)


def _timed(name: str, ask) -> _Row:
  start = time.perf_counter()
  tracks = ask()
  return _Row(name, tracks, time.perf_counter() - start)


def _still(points_xy: np.ndarray, num_frames: int) -> Tracks:
  """Every point stays where it is, always seen."""
  shape = (len(points_xy), num_frames)
  xy = np.broadcast_to(points_xy[:, None], (*shape, 2)).astype(np.float32)
  return Tracks(xy, np.ones(shape, bool), np.ones(shape, np.float32))


def _measured(row: _Row, truth: Tracks | None, size_hw: tuple[int, int]) -> dict:
  """One line of the table; errors over points that can be seen, in pixels at 256 x 256."""
  line = {"name": row.name, "seconds": round(row.seconds, 2)}
  if truth is None:
    return line
  answers = tapvid_metrics.compare(
    np.zeros(len(truth.xy), int),
    tapvid_metrics.to_raster(truth.xy, size_hw),
    ~truth.visible,
    tapvid_metrics.to_raster(row.tracks.xy, size_hw),
    ~row.tracks.visible,
  )
  numbers = tapvid_metrics.summarise(answers)
  names = ("average_distance", "median_distance", "delta_avg")
  return line | {name: round(numbers[name], 4) for name in names}


def _heading(clip: _Clip) -> str:
  """What is tracked, and the heads of the table's columns."""
  h, w = clip.frames.shape[1:3]
  heads = ["average", "median", "delta_avg"] if clip.truth is not None else []
  return (
    f"{clip.name}: {len(clip.frames)} frames of {w} x {h}, {_GRID**2} points\n\n"
    + " " * 18
    + "".join(f"{head:>12}" for head in [*heads, "seconds"])
  )


def _line(row: dict) -> str:
  """One line of the table; without errors where the truth is not known."""
  cells = [f"{row['seconds']:.1f}"]
  if "delta_avg" in row:
    pixels = [f"{row[name]:.2f} px" for name in ("average_distance", "median_distance")]
    cells = [*pixels, f"{row['delta_avg']:.1%}", *cells]
  return f"{row['name']:<18}" + "".join(f"{cell:>12}" for cell in cells)


def _draw(folder: Path, dense, clip: _Clip, tracks: Tracks) -> list[Path]:
  """Writes the tracks' video and the picture of dense flow, and returns their paths."""
  overlay = viz.draw_tracks(
    clip.frames,
    tracks.xy,
    tracks.visible,
    truth_xy=_seen_truth(clip),
    scale=max(1, round(512 / min(clip.frames.shape[1:3]))),
  )
  first, second = clip.frames[0], clip.frames[clip.later]
  stride = max(1, max(first.shape[:2]) // _DENSE)
  coarse_xy, at_xy = dense.dense_flow(first, second, stride=stride)
  flow_xy = viz.spread(coarse_xy, at_xy, first.shape[:2])
  return [
    viz.write_mp4(folder / "overlay.mp4", overlay, fps=clip.fps),
    viz.write_png(folder / "flow.png", _flow_page(clip, flow_xy, stride)),
  ]


def _draw_stories(folder: Path, tracker, clip: _Clip, tracks: Tracks, points_xy) -> list[Path]:
  """Writes the pictures of how a predictor answers, and returns their paths."""
  first, second = clip.frames[0], clip.frames[clip.later]
  chosen = _telling_points(clip, tracks)
  stories = [tracker.explain(first, second, points_xy[point]) for point in chosen]
  surest = int(np.argmax([story.mean.max() for story in stories]))
  truth_xy = [None if clip.truth is None else clip.truth.xy[i, clip.later] for i in chosen]
  return [
    viz.write_png(folder / "heatmaps.png", _heat_page(clip, stories, truth_xy)),
    viz.write_png(folder / "explanation.png", _story_page(clip, stories[surest], truth_xy[surest])),
  ]


def _seen_truth(clip: _Clip) -> np.ndarray | None:
  """True tracks with nothing where the point is hidden."""
  if clip.truth is None:
    return None
  return np.where(clip.truth.visible[..., None], clip.truth.xy, np.nan).astype(np.float32)


def _telling_points(clip: _Clip, tracks: Tracks, count: int = 8) -> list[int]:
  """Points worth a picture: those that can be seen in both frames, the fastest first."""
  known = tracks if clip.truth is None else clip.truth
  seen = known.visible[:, clip.later]
  length = np.linalg.norm(known.xy[:, clip.later] - known.xy[:, 0], axis=-1)
  return np.lexsort([-length, ~seen])[:count].tolist()


def _flow_page(clip: _Clip, flow_xy: np.ndarray, stride: int) -> np.ndarray:
  known = flow_xy if clip.flow_xy is None else clip.flow_xy
  # One scale for both fields, the truth's where there is one; a stray read-out must not set it.
  longest = float(np.percentile(np.hypot(*np.moveaxis(known, -1, 0)), 98))
  fields = [(f"flow, read out every {stride} px", flow_xy)]
  if clip.flow_xy is not None:
    fields.append(("true flow", clip.flow_xy))
  return viz.page(
    [
      [
        ("frame 1", commands.shown(clip.frames[0], _PICTURE)),
        (f"frame {clip.later + 1}", commands.shown(clip.frames[clip.later], _PICTURE)),
        *(
          (label, commands.shown(viz.flow_colours(field, longest=longest), _PICTURE))
          for label, field in fields
        ),
        (f"rim: {longest:.0f} px", viz.flow_wheel(110)),
      ]
    ],
    title=f"Flow from frame 1 to frame {clip.later + 1}",
  )


def _heat_page(clip: _Clip, stories: list[Explanation], truth_xy: list) -> np.ndarray:
  pictures = [_answer(clip, story, truth) for story, truth in zip(stories, truth_xy)]
  labels = [_told(story, truth) for story, truth in zip(stories, truth_xy)]
  half = (len(pictures) + 1) // 2
  cells = list(zip(labels, pictures))
  rows = [row for row in (cells[:half], cells[half:]) if row]
  return viz.page(
    rows,
    title=f"Where did the prediction of frame {clip.later + 1} change?",
    note=f"Each point is marked in frame 1. Bright is where the prediction answers, averaged over "
    f"{len(stories[0].masks)} masks.\n{_legend(clip)}",
  )


def _legend(clip: _Clip) -> str:
  line = "Line: from the point's place in frame 1 to the answer, hollow if it counts as hidden."
  return line if clip.truth is None else f"{line} Cross: truth."


def _told(story: Explanation, truth_xy) -> str:
  moved = np.linalg.norm(story.to_xy - story.from_xy)
  if truth_xy is None:
    return f"moved {moved:.1f} px"
  return f"moved {moved:.1f} px, error {np.linalg.norm(story.to_xy - truth_xy):.1f} px"


def _answer(clip: _Clip, story: Explanation, truth_xy, longest: int = _PICTURE) -> np.ndarray:
  """Frame 2 in grey under the heat, with the point's path and answer."""
  base = commands.shown(clip.frames[clip.later], longest)
  factor = base.shape[1] / clip.frames.shape[2]
  return viz.draw_points(
    viz.heat_over(base, story.mean),
    story.to_xy[None] * factor,
    visible=np.asarray(story.visible).reshape(1),
    from_xy=story.from_xy[None] * factor,
    truth_xy=None if truth_xy is None else truth_xy[None] * factor,
    colours=[(64, 220, 255)],
    radius=4,
  )


def _story_page(clip: _Clip, story: Explanation, truth_xy) -> np.ndarray:
  """One point's story: what the predictor is shown, what it says, where its two answers differ."""
  size, later = 180, clip.later + 1
  wide = (5 * size + 3 * viz.GAP) // 2
  top = float(story.responses.max())
  responses = [
    (f"5  4 minus 3, mask {i + 1}" if i == 0 else f"mask {i + 1}", heat)
    for i, heat in enumerate(story.responses[:10])
  ]
  strip = [
    (label, commands.shown(viz.heat_colours(heat, top=top), size)) for label, heat in responses
  ]
  return viz.page(
    [
      [
        ("1  frame 1, the point in the ring", _ringed(clip, story, size)),
        ("   the mark, stretched", _near_mark(clip, story, size)),
        (f"2  shown of frame {later}, mask 1", _seen_through(clip, story.masks[0], size)),
        (f"3  frame {later} predicted, no mark", commands.shown(_bytes(story.clean[0]), size)),
        (f"4  frame {later} predicted, marked", commands.shown(_bytes(story.counterfact[0]), size)),
      ],
      *(strip[i : i + 5] for i in range(0, len(strip), 5)),
      [
        ("6  mean over masks", commands.shown(viz.heat_colours(story.mean), wide)),
        (f"7  the answer: {_told(story, truth_xy)}", _answer(clip, story, truth_xy, wide)),
      ],
    ],
    title="One point, from question to answer",
    note=_legend(clip),
  )


def _ringed(clip: _Clip, story: Explanation, size: int) -> np.ndarray:
  """The marked frame 1 with a ring round the point, for the mark itself is small."""
  picture = commands.shown(_bytes(story.marked), size)
  at_xy = story.from_xy[None] * (picture.shape[1] / clip.frames.shape[2])
  return viz.draw_points(
    picture, at_xy, visible=np.zeros(1, bool), colours=[(64, 220, 255)], radius=9
  )


def _near_mark(clip: _Clip, story: Explanation, size: int) -> np.ndarray:
  """The mark alone over a quarter of frame 1 round the point: grey is nothing, contrast is full."""
  h, w = story.mark.shape[:2]
  x, y = story.from_xy / np.array(clip.frames.shape[2:0:-1]) * (w, h)
  top, left = (int(np.clip(at - side / 8, 0, side - side // 4)) for at, side in ((y, h), (x, w)))
  stretched = _bytes(0.5 + 0.5 * story.mark / max(float(np.abs(story.mark).max()), 1e-6))
  window = stretched[top : top + h // 4, left : left + w // 4]
  return viz.resized(window, (size * window.shape[0] // window.shape[1], size), smooth=False)


def _seen_through(clip: _Clip, mask: np.ndarray, size: int) -> np.ndarray:
  """Frame 2 with its hidden patches in grey."""
  picture = commands.shown(clip.frames[clip.later], size)
  hidden = viz.resized((mask * 255).astype(np.uint8), picture.shape[:2], smooth=False) > 0
  return np.where(hidden[..., None], np.uint8(200), picture)


def _bytes(image: np.ndarray) -> np.ndarray:
  return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
