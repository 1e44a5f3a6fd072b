import numpy as np
import pytest
from PIL import Image

from cwm_jax.data.tapvid import ClipFolders
from cwm_jax.evals import tapvid, trackers
from cwm_jax.types import InputError, PointFlow, Tracks


def _write_clip(folder, *, frames=7, hw=(64, 128), points=3, seed=0):
  """Points that all move 4 px right (of 128) a frame, one of them hidden in two frames."""
  rng = np.random.default_rng(seed)
  (folder / "video").mkdir(parents=True)
  for t in range(frames):
    pixels = rng.integers(0, 256, (*hw, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "video" / f"{t:03}.png")
  start = rng.uniform([5, 5], [60, 60], (points, 2))
  points_xy = (start[:, None] + np.arange(frames)[:, None] * [4.0, 0.0]).astype(np.float32)
  occluded = np.zeros((points, frames), bool)
  occluded[0, :2] = True
  np.savez(folder / "points.npz", points_xy=points_xy, occluded=occluded, hw=np.array(hw))
  return points_xy


class _Oracle:
  """Knows that everything moves 4 px right a frame; wrong by `error` px; counts its calls."""

  def __init__(self, gap=1, error=0.0):
    self.gap, self.error, self.calls = gap, error, 0

  def track(self, video, queries, *, mode="query"):
    self.calls += 1
    queries, t = np.asarray(queries), np.arange(len(video))
    later = t[None] - queries[:, :1]
    xy = queries[:, None, :0:-1] + later[..., None] * [4.0, 0.0] + [0.0, self.error]
    return Tracks(xy, later >= 0, (later >= 0) * 1.0)

  def flow(self, frame1, frame2, points):
    self.calls += 1
    points = np.asarray(points)
    ones = np.ones(len(points))
    return PointFlow(points + [4.0 * self.gap, self.error], ones.astype(bool), ones)


@pytest.mark.parametrize("protocol, gap", [("first", 1), ("cfg", 3)])
def test_a_perfect_tracker_has_perfect_numbers(tmp_path, protocol, gap):
  _write_clip(tmp_path / "a")
  _write_clip(tmp_path / "b", seed=1)
  clips = ClipFolders(tmp_path)
  got = dict(tapvid.TapVidEvaluator(_Oracle(gap), clips, protocol=protocol, frame_gap=gap).run())
  for group in ("a", "b", "mean", "pooled"):
    assert got[f"{group}/average_distance"] == pytest.approx(0, abs=1e-5)
    assert got[f"{group}/delta_avg"] == got[f"{group}/average_jaccard"] == 1.0
  assert got["pooled/occlusion_accuracy"] == 1.0
  # First: 2 x 6 frames after the query and 4 of the hidden one; CFG-3: 4 + 4 + 2 pairs.
  assert got["a/num_visible"] == (16 if protocol == "first" else 10)


def test_errors_are_measured_at_256_by_256(tmp_path):
  _write_clip(tmp_path / "a")
  got = dict(tapvid.TapVidEvaluator(_Oracle(error=0.75), ClipFolders(tmp_path)).run())
  # 0.75 of 64 rows are 3 of 256.
  assert got["pooled/average_distance"] == pytest.approx(3.0, abs=1e-5)
  assert (got["a/within_2"], got["a/within_4"]) == (0.0, 1.0)


def test_zero_motion_is_wrong_by_the_motion(tmp_path):
  _write_clip(tmp_path / "a", points=1)
  clips = ClipFolders(tmp_path)
  evaluator = tapvid.TapVidEvaluator(trackers.ZeroMotion(), clips, protocol="cfg", frame_gap=2)
  # Two frames of 4 px of 128 columns are 16 px of 256.
  assert dict(evaluator.run())["pooled/average_distance"] == pytest.approx(16.0, abs=1e-4)


def test_clips_that_are_done_are_not_asked_about_again(tmp_path):
  _write_clip(tmp_path / "data" / "a")
  _write_clip(tmp_path / "data" / "b", seed=1)
  oracle, seen = _Oracle(error=0.5), []
  make = lambda: tapvid.TapVidEvaluator(  # noqa: E731
    oracle,
    ClipFolders(tmp_path / "data"),
    kept=tmp_path / "out",
    on_clip=lambda name, numbers: seen.append(name),
  )
  whole = dict(make().run())
  (tmp_path / "out" / "b.npz").unlink()
  np.testing.assert_equal(dict(make().run()), whole)
  assert oracle.calls == 3 and seen == ["a", "b"] * 2


def test_an_unknown_protocol_is_refused(tmp_path):
  _write_clip(tmp_path / "a")
  with pytest.raises(InputError, match="protocol"):
    tapvid.TapVidEvaluator(_Oracle(), ClipFolders(tmp_path), protocol="last")


def test_real_clips_are_measured(cwm_data):
  clips = ClipFolders(cwm_data / "tapvid_davis" / "dog")
  got = dict(tapvid.TapVidEvaluator(trackers.ZeroMotion(), clips).run())
  assert 10 < got["pooled/average_distance"] < 80
  assert 0 < got["pooled/delta_avg"] < 0.5
