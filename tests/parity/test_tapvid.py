"""TAP-Vid's questions, resolutions and evaluation against those of the public Opt-CWM code."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import geometry
from cwm_jax.data import tapvid_queries
from cwm_jax.data.tapvid import ClipSource
from cwm_jax.data.tapvid_pickles import read_entry
from cwm_jax.evals import tapvid, tapvid_metrics
from cwm_jax.types import PointFlow, Tracks

CASES = ("eval_first", "eval_cfg", "eval_cfg0")
READ_OUTS = ("expec", "argmax", "multi_scale")
# The release's names of the numbers.
NAMES = (
  {f"jaccard_{k}": f"jaccard_{k}" for k in tapvid_metrics.THRESHOLDS}
  | {f"within_{k}": f"pts_within_{k}" for k in tapvid_metrics.THRESHOLDS}
  | {f"occlusion_{kind}": f"occ_{kind}" for kind in ("tp", "fp", "fn")}
  | {"average_distance": "avg_distance", "delta_avg": "average_pts_within_thresh"}
  | {n: n for n in ("median_distance", "average_jaccard", "occlusion_accuracy", "num_visible")}
)


def _clips(path):
  """The clips of a stored set, in its order, through the reader of pickled entries."""
  with np.load(path) as file:
    stored = {name: file[name] for name in file.files}
  clips = []
  for name in stored["video_names"].tolist():
    entry = {key: stored[f"{name}/{key}"] for key in ("video", "points", "occluded")}
    clips.append(read_entry(entry, name, where=name))
  return stored, clips


def _rows(video, clip, asked, *, released):
  """(video, point, start, frame) of every question, the point counted as the release does it."""
  point = asked.point
  if released == "first":
    # There, points are counted after those that are never visible have been dropped.
    point = (np.cumsum(~clip.occluded.all(axis=1)) - 1)[point]
  frames = asked.frames if released == "first" else asked.frames[:, 1:]
  q, k = np.indices(frames.shape)
  rows = [
    np.full(frames.size, video),
    point[q.ravel()],
    asked.start[q.ravel()],
    frames[q, k].ravel(),
  ]
  return np.stack(rows, axis=1).tolist()


@pytest.mark.parametrize("name", ["c8_tapvid_flatten", "c8_tapvid_flatten_nevervisible"])
def test_the_questions_are_the_stored_ones_in_their_order(cwm_goldens, name):
  stored, clips = _clips(cwm_goldens / f"{name}.npz")
  gap = int(np.diff(stored["queries_cfg"][0, 2:])[0])
  for mode in ("first", "cfg"):
    rows = []
    for video, clip in enumerate(clips):
      asked = (
        tapvid_queries.queries_first(clip)
        if mode == "first"
        else tapvid_queries.queries_cfg(clip, gap=gap)
      )
      rows += _rows(video, clip, asked, released=mode)
      points, frames, evaluations, *size_hw = stored[f"spec_{mode}"][video].tolist()
      assert asked.frames.shape == (points, frames)
      assert evaluations == points * (frames if mode == "first" else 1)
      assert tuple(size_hw) == clip.video.shape[1:3]
    assert rows == stored[f"queries_{mode}"].tolist()


def test_frames_and_points_at_each_resolution_are_the_stored_ones(cwm_goldens):
  stored, clips = _clips(cwm_goldens / "c8_tapvid_flatten.npz")
  for clip, want in zip(clips, stored["nearest16_res"].tolist()):
    assert tapvid_queries.resolution_hw("nearest_16", clip.video.shape[1:3]) == tuple(want)
  labels = [name[5:-4] for name in stored if name.startswith("item_") and name.endswith("_idx")]
  assert {"native", "nearest_16", "fixed"} <= set(labels)
  for label in labels:
    assert len(stored[f"item_{label}_idx"])
    for i in range(len(stored[f"item_{label}_idx"])):
      item = {k: stored[f"item_{label}_{i}_{k}"] for k in ("video", "points", "occ", "uid")}
      video, point, *times = item["uid"].tolist()
      h, w = item["video"].shape[-2:]
      seen = tapvid_queries.at_resolution(clips[video], label if label != "fixed" else f"{h}x{w}")
      resized = tapvid_queries.resize_video(clips[video].video[times], (h, w))
      got = np.asarray(geometry.normalise(jnp.asarray(resized) / 255.0))
      np.testing.assert_allclose(got.transpose(3, 0, 1, 2), item["video"], atol=1e-4)
      # What trackers see is that, in whole grey levels.
      np.testing.assert_allclose(seen.video[times], resized, atol=0.5 + 1e-4)
      # The release moves points beyond the last pixel's corner onto it.
      got_xy = np.minimum(seen.points_xy[point, times], [w - 1, h - 1])
      np.testing.assert_allclose(got_xy[:, ::-1], item["points"], rtol=1e-5, atol=1e-5)
      assert seen.occluded[point, times[1]] == item["occ"]


class _FirstAnswers:
  """A tracker that gives the stored answers, which lie in the order in which it is asked.

  The stored places are bare pixel indices; a tracker's answers lie at the pixels' centres.
  """

  def __init__(self, places, occluded):
    self._places, self._visible, self._given = places + 0.5, ~occluded, 0

  def track(self, video, queries, *, mode="query"):
    shape = len(queries), len(video)
    here = slice(self._given, self._given + shape[0] * shape[1])
    self._given = here.stop
    self._rows, self._start = {}, queries[:, 0].astype(int)
    # Frame by frame, as it is asked later; several points of a frame may lie in one pixel.
    for row in np.argsort(self._start, kind="stable"):
      key = video[self._start[row]].tobytes(), *queries[row, :0:-1].tolist()
      self._rows.setdefault(key, []).append(row)
    visible = self._visible[here].reshape(shape)
    self._tracks = Tracks(self._places[here].reshape(*shape, 2), visible, visible * 1.0)
    return self._tracks

  def flow(self, frame1, frame2, points):
    """From a query's own frame to itself."""
    rows = [self._rows[frame1.tobytes(), *point].pop(0) for point in points.tolist()]
    at = rows, self._start[rows]
    return PointFlow(*(values[at] for values in self._tracks))


class _PairAnswers:
  """The same for pairs of frames; `rows_of` says which stored answers are asked for."""

  def __init__(self, places, occluded, rows_of):
    self._places, self._visible, self._rows_of = places + 0.5, ~occluded, rows_of

  def flow(self, frame1, frame2, points):
    rows = self._rows_of(frame1, points)
    return PointFlow(self._places[rows], self._visible[rows], self._visible[rows] * 1.0)


class _Source(ClipSource):
  def __init__(self, clips):
    self.names, self._clips = [clip.name for clip in clips], clips

  def read(self, index):
    return self._clips[index]


@pytest.mark.parametrize("read_out", READ_OUTS)
@pytest.mark.parametrize("case", CASES)
def test_evaluations_equal_the_stored_ones(cwm_goldens, tmp_path, case, read_out):
  _, clips = _clips(cwm_goldens / "c8_tapvid_flatten.npz")
  settings = json.loads((cwm_goldens / "config.json").read_text())["tapvid"][case]
  gap = settings["frame_delta"]
  with np.load(cwm_goldens / f"c8_tapvid_{case}.npz") as file:
    stored = {name: file[name] for name in file.files}
  resolution = settings["resolution"]
  if not isinstance(resolution, str):
    resolution = "x".join(map(str, resolution))
  places, occluded = stored[f"pred_{read_out}"], stored["pred_occ"]
  if gap < 0:
    protocol, tracker = "release_first", _FirstAnswers(places, occluded)
  else:
    protocol = "release_cfg"
    tracker = _PairAnswers(places, occluded, _order_of_questions(clips, resolution, gap))
  evaluator = tapvid.TapVidEvaluator(
    tracker,
    _Source(clips),
    protocol=protocol,
    frame_gap=max(gap, 1),
    resolution=resolution,
    kept=tmp_path,
  )
  got = dict(evaluator.run())
  final = {
    key.removeprefix(f"final/{read_out}_"): value
    for key, value in stored.items()
    if key.startswith(f"final/{read_out}_")
  }
  for i, name in enumerate(final["video_name"].tolist()):
    for ours, theirs in NAMES.items():
      np.testing.assert_allclose(
        got[f"{name}/{ours}"], final[theirs][i], rtol=1e-5, atol=2e-5, err_msg=f"{name} {ours}"
      )
    for k in tapvid_metrics.THRESHOLDS:
      within = got[f"{name}/within_{k}"] * got[f"{name}/num_visible"]
      np.testing.assert_allclose(within, final[f"num_pts_within_{k}"][i], atol=1e-6)
  np.testing.assert_allclose(got["mean/occlusion_f1"], final["occlusion_f1"], rtol=1e-6)
  for ours in ("average_jaccard", "average_distance", "delta_avg", "occlusion_accuracy"):
    np.testing.assert_allclose(
      got[f"mean/{ours}"], np.mean(final[NAMES[ours]]), rtol=1e-5, atol=2e-5
    )
  if read_out == "expec":
    for clip in clips:
      _check_formatted(stored, clip.name, tmp_path / f"{clip.name}.npz", cfg=gap > 0)


def _order_of_questions(clips, resolution, gap):
  """What turns a question (its first frame, its points) into rows of the stored answers."""
  rows, count = {}, 0
  for clip in clips:
    seen = tapvid_queries.at_resolution(clip, resolution)
    asked = tapvid_queries.queries_cfg(seen, gap=gap)
    for query in tapvid_queries.queries_tyx(seen, asked, whole_pixels=True):
      # Two points of a frame may lie in one pixel; they are asked about in their order.
      key = seen.video[int(query[0])].tobytes(), *query[:0:-1].tolist()
      rows.setdefault(key, []).append(count)
      count += 1
  return lambda frame1, points: [rows[frame1.tobytes(), *point].pop(0) for point in points.tolist()]


def _check_formatted(stored, name, path, *, cfg):
  """The kept answers, on the raster of 256, are the stored arrays that the metrics were given."""
  want = {k: stored[f"fmt/{name}/{k}"][0] for k in ("gt_tracks", "pred_tracks")}
  with np.load(path) as kept:
    scale = 256 / kept["size_hw"][::-1]
    np.testing.assert_array_equal(kept["truth_occluded"], stored[f"fmt/{name}/gt_occluded"][0])
    np.testing.assert_allclose(kept["truth_xy"] * scale, want["gt_tracks"], atol=1e-4)
    found = (kept["tracks_xy"] - 0.5) * scale
    later = kept["frames"] > kept["queries_tyx"][:, :1]
    measured = later if cfg else kept["frames"] >= kept["queries_tyx"][:, :1]
    np.testing.assert_allclose(found[measured], want["pred_tracks"][measured], atol=1e-4)
    occluded = stored[f"fmt/{name}/pred_occluded"][0]
    np.testing.assert_array_equal(kept["occluded"][measured], occluded[measured])
