"""Tables, the figure and the overlays of an evaluation, read back."""

from __future__ import annotations

import csv
import json

import av
import numpy as np
import pytest
from PIL import Image
from tapvid_clips import write_clip

from cwm_jax.data.tapvid import ClipFolders
from cwm_jax.evals import charts, tapvid_job, tapvid_report, trackers
from cwm_jax.types import PointFlow


class _Off(trackers.PairTracker):
  """Knows the motion of the clips, 4 px a frame, and is off by `error` px in y."""

  def __init__(self, error):
    super().__init__(chain=True)
    self._error = error

  def flow(self, frame1, frame2, points):
    ones = np.ones(len(points))
    return PointFlow(points + [4.0, self._error], ones.astype(bool), ones)


@pytest.fixture
def job(tmp_path):
  for name in ("a", "b"):
    write_clip(tmp_path / "clips" / name, frames=5, hw=(64, 64), points=2)
  (tmp_path / "clips" / "c" / "video").mkdir(parents=True)
  np.savez(tmp_path / "clips" / "c" / "points.npz", points_xy=0)
  return tapvid_job.TapVidJob(
    ClipFolders(tmp_path / "clips"),
    tmp_path,
    protocol="first",
    frame_gap=5,
    query_stride=5,
    resolution="native",
    overlays=1,
  )


def test_numbers_are_written_clip_by_clip(job, tmp_path):
  over = job.measure("off", [_Off(0.25)])
  folder = tmp_path / "tapvid" / "first" / "off"
  rows = list(csv.DictReader((folder / "clips.csv").open()))
  assert [row["clip"] for row in rows] == ["a", "b"]
  stored = json.loads((folder / "clips.json").read_text())
  assert float(rows[0]["delta_avg"]) == stored["clips"]["a"]["delta_avg"]
  assert stored["mean"]["average_distance"] == over["mean/average_distance"]
  # One hidden frame that is called visible: no true positive, so nothing divides by zero.
  assert stored["clips"]["a"]["occlusion_f1"] is None
  text = (folder / "clips.txt").read_text()
  assert f"{over['mean/average_distance']:.2f}" in text.split("(mean)")[1]
  assert "left out: c: " in text
  assert not any(key.startswith(("a/", "b/")) for key in over)


def test_errors_against_the_frame_gap_are_drawn_for_all_trackers(job, tmp_path):
  assert job.figures(("off", "zero")) == {}
  job.measure("off", [_Off(0.25)])
  job.measure("zero", [trackers.ZeroMotion()])
  ((name, picture),) = job.figures(("off", "zero", "never run")).items()
  assert name == "tapvid/first/error-by-gap"
  with Image.open(tmp_path / "tapvid" / "first" / "error-by-gap.png") as image:
    np.testing.assert_array_equal(np.asarray(image), picture)
  rows = list(csv.DictReader((tmp_path / "tapvid" / "first" / "error-by-gap.csv").open()))
  found = [
    (row["tracker"], float(row["gap"]), round(float(row["average_distance"]), 3)) for row in rows
  ]
  # 4 px of 64 a frame are 16 of 256; an error of a quarter px a frame in y adds up to 1 a frame.
  assert found == [(t, gap, gap * step) for t, step in (("off", 1.0), ("zero", 16.0))
                   for gap in (1.0, 2.0, 3.0, 4.0)]  # fmt: skip


def test_the_best_and_the_worst_tracks_are_drawn_on_their_clips(job, tmp_path):
  job.measure("off", [_Off(0.25)])
  found = sorted((tmp_path / "tapvid" / "first" / "off").glob("*.mp4"))
  assert [path.name.split("-")[0] for path in found] == ["best", "worst"]
  with av.open(str(found[0])) as container:
    shapes = {frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)}
    assert shapes == {(64, 64, 3)} and container.streams.video[0].frames == 5


def test_a_pair_of_frames_is_no_track_to_be_drawn(tmp_path):
  write_clip(tmp_path / "clips" / "a", frames=3, hw=(64, 64), points=2)
  job = tapvid_job.TapVidJob(
    ClipFolders(tmp_path / "clips"),
    tmp_path,
    protocol="cfg",
    frame_gap=1,
    query_stride=5,
    resolution="native",
    overlays=1,
  )
  assert job.title == "cfg-1"
  job.measure("off", [_Off(0.25)])
  assert not list(tmp_path.glob("tapvid/**/*.mp4"))
  assert job.figures(("off",)) == {}


def test_a_chart_shows_its_curves_and_not_what_is_not_finite():
  line = charts.Line([1, 2, 3], [10.0, float("nan"), 30.0])
  one = charts.line_chart({"a": line}, x_label="x", y_label="y", size_hw=(200, 300))
  assert one.shape == (200, 300, 3) and one.dtype == np.uint8
  without = charts.Line([1, 3], [10.0, 30.0])
  same = charts.line_chart({"b": without}, x_label="x", y_label="y", size_hw=(200, 300))
  np.testing.assert_array_equal(one, same)
  none = charts.line_chart({}, x_label="x", y_label="y", size_hw=(200, 300))
  coloured = np.ptp(one.astype(int), axis=-1) > 60
  assert coloured.any() and not (np.ptp(none.astype(int), axis=-1) > 60).any()
  # A curve that grows goes up.
  rows, columns = np.nonzero(coloured)
  assert np.corrcoef(rows, columns)[0, 1] < -0.9
  assert charts.legend(["a", "b"]).shape[0] > charts.legend(["a"]).shape[0]


@pytest.mark.parametrize(
  "top, want", [(0.0, 1.0), (1.0, 1.0), (31, 40), (100, 100), (0.07, 0.08), (1234, 1500)]
)
def test_axes_end_at_a_round_number(top, want):
  assert charts._ticks(top)[-1] == pytest.approx(want)


def test_a_table_has_percent_and_dashes():
  columns = (("AD", "ad", False), ("delta %", "delta", True), ("x", "x", True))
  text = tapvid_report.table({"zero": {"ad": 2.0, "delta": 0.5}}, columns)
  assert text.splitlines()[1].split() == ["zero", "2.00", "50.00", "-"]
