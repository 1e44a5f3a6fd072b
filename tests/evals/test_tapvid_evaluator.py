import threading

import numpy as np
import pytest
from tapvid_clips import write_clip

from cwm_jax.data.tapvid import ClipFolders
from cwm_jax.evals import tapvid, trackers
from cwm_jax.types import InputError, PointFlow, Tracks


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
  write_clip(tmp_path / "a")
  write_clip(tmp_path / "b", seed=1)
  clips = ClipFolders(tmp_path)
  got = dict(tapvid.TapVidEvaluator(_Oracle(gap), clips, protocol=protocol, frame_gap=gap).run())
  for group in ("a", "b", "mean", "pooled"):
    assert got[f"{group}/average_distance"] == pytest.approx(0, abs=1e-5)
    assert got[f"{group}/delta_avg"] == got[f"{group}/average_jaccard"] == 1.0
  assert got["pooled/occlusion_accuracy"] == 1.0
  # First: 2 x 6 frames after the query and 4 of the hidden one; CFG-3: 4 + 4 + 2 pairs.
  assert got["a/num_visible"] == (16 if protocol == "first" else 10)


def test_errors_are_measured_at_256_by_256(tmp_path):
  write_clip(tmp_path / "a")
  got = dict(tapvid.TapVidEvaluator(_Oracle(error=0.75), ClipFolders(tmp_path)).run())
  # 0.75 of 64 rows are 3 of 256.
  assert got["pooled/average_distance"] == pytest.approx(3.0, abs=1e-5)
  assert (got["a/within_2"], got["a/within_4"]) == (0.0, 1.0)


def test_zero_motion_is_wrong_by_the_motion(tmp_path):
  write_clip(tmp_path / "a", points=1)
  clips = ClipFolders(tmp_path)
  evaluator = tapvid.TapVidEvaluator(trackers.ZeroMotion(), clips, protocol="cfg", frame_gap=2)
  # Two frames of 4 px of 128 columns are 16 px of 256.
  assert dict(evaluator.run())["pooled/average_distance"] == pytest.approx(16.0, abs=1e-4)


def test_clips_that_are_done_are_not_asked_about_again(tmp_path):
  write_clip(tmp_path / "data" / "a")
  write_clip(tmp_path / "data" / "b", seed=1)
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
  write_clip(tmp_path / "a")
  with pytest.raises(InputError, match="protocol"):
    tapvid.TapVidEvaluator(_Oracle(), ClipFolders(tmp_path), protocol="last")


@pytest.mark.parametrize("protocol", ["release_cfg", "release_first", "doduo_first"])
def test_a_clip_about_which_nothing_is_asked_is_in_no_mean(tmp_path, protocol):
  write_clip(tmp_path / "asked", seed=1)
  write_clip(tmp_path / "empty", frames=3)
  if protocol != "release_cfg":
    stored = dict(np.load(tmp_path / "empty" / "points.npz"))
    stored["occluded"][:] = True
    np.savez(tmp_path / "empty" / "points.npz", **stored)
  tracker = _Oracle(gap=4, error=0.5)
  evaluator = tapvid.TapVidEvaluator(tracker, ClipFolders(tmp_path), protocol=protocol, frame_gap=4)
  got = dict(evaluator.run())
  assert (got["num_clips"], got["num_empty"], got["num_skipped"]) == (2, 1, 0)
  assert np.isnan(got["empty/average_distance"])
  for name in ("average_distance", "delta_avg", "average_jaccard", "occlusion_accuracy"):
    assert got[f"mean/{name}"] == got[f"asked/{name}"] > 0


def test_where_every_clip_is_empty_no_number_is_made_up(tmp_path):
  write_clip(tmp_path / "empty", frames=3)
  got = dict(tapvid.TapVidEvaluator(_Oracle(), ClipFolders(tmp_path), protocol="cfg").run())
  assert got["num_empty"] == 1 and np.isnan(got["mean/average_distance"])


def test_progress_is_told_clip_by_clip_with_the_time_left(tmp_path, caplog):
  for name in ("a", "b"):
    write_clip(tmp_path / name)
  with caplog.at_level("INFO", logger="cwm_jax.evals.tapvid"):
    dict(tapvid.TapVidEvaluator(_Oracle(error=0.75), ClipFolders(tmp_path)).run())
  first, last = (r.message for r in caplog.records if r.name.startswith("cwm_jax"))
  assert (
    first.startswith("  1/2 a: AD 3.00 px  eta 0:0") and last == "  2/2 b: AD 3.00 px  eta 0:00"
  )


def test_broken_clips_are_left_out_counted_and_named_once(tmp_path, caplog):
  for name in ("a", "b", "c"):
    write_clip(tmp_path / name)
  (tmp_path / "b" / "video" / "003.png").write_bytes(b"nothing")
  evaluator = tapvid.TapVidEvaluator(_Oracle(error=0.5), ClipFolders(tmp_path))
  got = dict(evaluator.run())
  assert (got["num_clips"], got["num_skipped"]) == (2.0, 1.0)
  assert "b/average_distance" not in got and got["c/average_distance"] > 0
  assert "003.png" in evaluator.skipped["b"]
  assert sum("003.png" in record.message for record in caplog.records) == 1


def test_a_set_of_broken_clips_only_is_refused(tmp_path):
  write_clip(tmp_path / "a")
  (tmp_path / "a" / "video" / "003.png").write_bytes(b"nothing")
  with pytest.raises(InputError, match="none of the 1 clips can be used.*003.png"):
    dict(tapvid.TapVidEvaluator(_Oracle(), ClipFolders(tmp_path)).run())


def test_a_tracker_sees_the_clip_at_the_resolution_and_numbers_do_not_depend_on_it(tmp_path):
  write_clip(tmp_path / "a")
  asked = []

  class Halved(_Oracle):
    def track(self, video, queries, *, mode="query"):
      asked.append(video.shape)
      later = np.arange(len(video))[None] - queries[:, :1]
      xy = queries[:, None, :0:-1] + later[..., None] * [2.0, 0.0] + [0.0, 0.5]
      return Tracks(xy, later >= 0, (later >= 0) * 1.0)

  clips = ClipFolders(tmp_path)
  half = dict(tapvid.TapVidEvaluator(Halved(), clips, resolution="32x64").run())
  assert asked == [(7, 32, 64, 3)]
  whole = dict(tapvid.TapVidEvaluator(_Oracle(error=1.0), clips).run())
  assert half["mean/average_distance"] == pytest.approx(4.0, abs=1e-4)
  np.testing.assert_allclose(list(half.values()), list(whole.values()), atol=1e-4)
  with pytest.raises(InputError, match="resolution"):
    tapvid.TapVidEvaluator(_Oracle(), clips, resolution="half")


def test_several_trackers_share_the_clips_and_none_has_two_at_a_time(tmp_path):
  for seed in range(5):
    write_clip(tmp_path / f"{seed}", seed=seed)
  together = threading.Barrier(2, timeout=20)

  class Busy(_Oracle):
    busy = False

    def track(self, video, queries, *, mode="query"):
      assert not self.busy
      self.busy = True
      if not self.calls:
        together.wait()  # passes only when both are at work
      tracks = super().track(video, queries, mode=mode)
      self.busy = False
      return tracks

  clips, both = ClipFolders(tmp_path), [Busy(error=0.5), Busy(error=0.5)]
  got = dict(tapvid.TapVidEvaluator(both, clips).run())
  assert sum(tracker.calls for tracker in both) == 5
  alone = dict(tapvid.TapVidEvaluator(_Oracle(error=0.5), clips).run())
  np.testing.assert_equal(got, alone)


def test_kept_answers_have_the_project_s_form_of_tracks(tmp_path):
  points_xy = write_clip(tmp_path / "data" / "a")
  clips = ClipFolders(tmp_path / "data")
  dict(tapvid.TapVidEvaluator(_Oracle(), clips, kept=tmp_path / "out").run())
  with np.load(tmp_path / "out" / "a.npz") as file:
    kept = {name: file[name] for name in file.files}
  assert kept["tracks_xy"].shape == (3, 7, 2) and kept["occluded"].dtype == bool
  assert kept["size_hw"].tolist() == [64, 128] and kept["confidence"].shape == (3, 7)
  np.testing.assert_allclose(kept["tracks_xy"][1], points_xy[1], atol=1e-4)
  np.testing.assert_allclose(kept["queries_tyx"][0], [2, *points_xy[0, 2, ::-1]])
  assert kept["occluded"][0].tolist() == [True, True] + [False] * 5


def test_a_damaged_file_of_answers_is_made_again(tmp_path):
  write_clip(tmp_path / "data" / "a")
  oracle, clips = _Oracle(), ClipFolders(tmp_path / "data")
  make = lambda: tapvid.TapVidEvaluator(oracle, clips, kept=tmp_path / "out")  # noqa: E731
  whole = dict(make().run())
  path = tmp_path / "out" / "a.npz"
  path.write_bytes(path.read_bytes()[:200])
  np.testing.assert_equal(dict(make().run()), whole)
  assert oracle.calls == 2


def test_real_clips_are_measured(cwm_data):
  clips = ClipFolders(cwm_data / "tapvid_davis" / "dog")
  got = dict(tapvid.TapVidEvaluator(trackers.ZeroMotion(), clips).run())
  assert 10 < got["pooled/average_distance"] < 80
  assert 0 < got["pooled/delta_avg"] < 0.5
