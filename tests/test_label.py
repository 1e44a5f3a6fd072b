"""The labelling job: what is in the shards, what is said of them, and how it goes on."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import label_job
import numpy as np
import pytest
import toy_predictors

from cwm_jax import label, label_answers, prepare, tasks, viz
from cwm_jax.configs import distill_tiny
from cwm_jax.data import clips, labels, procedural, rendering
from cwm_jax.evals import named, spread
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError, PointFlow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A finished job: (workdir, manifest)."""
  workdir = tmp_path_factory.mktemp("labels")
  return workdir, label.run(label_job.get_config(), workdir)


def test_each_pair_of_the_source_is_there_once_with_points_on_pixel_centres(whole):
  workdir, manifest = whole
  found = label_job.records(workdir)
  assert [int(record["index"]) for record in found] == list(range(10))
  scenes = label_job.get_config().data.sources.scenes
  scene = procedural.draw_scene(
    scenes.first_seed + 7, procedural.PRESETS["shifts"], max_objects=scenes.max_objects
  )
  batch = {f"scene/{name}": value[None] for name, value in scene.items()}
  drawn = rendering.render_batch(jax.tree.map(np.asarray, batch), size_hw=(16, 16)).frames[0]
  # Of two programs; a few of the pixels may fall to the other side of an edge.
  assert np.mean(np.abs(found[7]["pair"] - np.asarray(drawn) * 255) > 1) < 0.01
  for record in found:
    assert record["points_xy"].shape == (3, 2)
    np.testing.assert_array_equal(record["points_xy"] % 1, 0.5)
    assert (record["points_xy"] > 0).all() and (record["points_xy"] < 16).all()
    np.testing.assert_array_equal(record["flow_xy"], 0)
  assert manifest["complete"] and (manifest["pairs"], manifest["points"]) == (10, 30)


def test_the_manifest_on_disk_is_what_was_returned_and_counts_by_shard(whole):
  workdir, manifest = whole
  assert json.loads((workdir / label.MANIFEST).read_text()) == json.loads(json.dumps(manifest))
  assert [shard["pairs"] for shard in manifest["shards"].values()] == [4, 4, 2]
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert all(row["kept"] == 1 and row["pairs_per_second"] > 0 for row in rows)
  assert (workdir / "pictures" / "labels_00000001.png").is_file()


def test_a_finished_job_given_again_changes_nothing(whole):
  workdir, manifest = whole
  before = {path.name: path.stat().st_mtime_ns for path in labels.find_shards(workdir)}
  assert label.run(label_job.get_config(), workdir) == manifest
  assert before == {path.name: path.stat().st_mtime_ns for path in labels.find_shards(workdir)}


def test_shards_from_before_a_key_was_there_are_of_what_held_then(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  manifest = json.loads((tmp_path / label.MANIFEST).read_text())
  del manifest["settings"]["evaluate"]["tracker_protocol"]
  (tmp_path / label.MANIFEST).write_text(json.dumps(manifest))
  assert label.run(label_job.get_config(), tmp_path)["complete"]


def test_a_job_that_goes_on_makes_what_is_missing_or_damaged_and_keeps_the_rows(whole, tmp_path):
  label.run(label_job.get_config(), tmp_path)
  _, second, third = labels.find_shards(tmp_path)
  before = (tmp_path / "metrics.jsonl").read_text().splitlines()
  # What a power cut may leave: numbers without their bytes, and no shard.
  second.with_suffix(".json").write_bytes(b"")
  third.unlink()
  config = label_job.get_config()
  config.evaluate.memory_budget = 1e6
  assert label.run(config, tmp_path)["complete"]
  for mine, one in zip(label_job.records(tmp_path), label_job.records(whole[0]), strict=True):
    for name in labels.FIELDS:
      np.testing.assert_array_equal(mine[name], one[name])
  after = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert after[0] == before[0] and [json.loads(row)["step"] for row in after] == [1, 2, 3]


def test_a_shard_lost_from_the_middle_takes_its_own_row_alone(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  labels.find_shards(tmp_path)[1].unlink()
  before = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert label.run(label_job.get_config(), tmp_path)["complete"]
  after = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert after[:2] == [before[0], before[2]]
  assert [json.loads(row)["step"] for row in after] == [1, 3, 2]


def test_rows_stay_where_another_process_goes_on_with_the_next_shards(whole, tmp_path, monkeypatch):
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  labels.find_shards(tmp_path)[0].unlink()
  # The first of two processes, which has shards 0 and 2 where one process made all three.
  monkeypatch.setattr(spread, "my_share", lambda count: range(0, count, 2))
  assert label.run(label_job.get_config(), tmp_path)["complete"]
  rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(row)["step"] for row in rows] == [2, 3, 1]


# The first is no shard at all; the second is whole, and of other pairs.
@pytest.mark.parametrize("harm", ["cut to 100 bytes", "records that are too few"])
def test_a_shard_that_does_not_hold_what_is_said_of_it_is_made_anew(harm, whole, tmp_path):
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  first, _, third = labels.find_shards(tmp_path)
  if harm == "cut to 100 bytes":
    first.write_bytes(first.read_bytes()[:100])
  else:
    first.write_bytes(third.read_bytes())
  assert label.run(label_job.get_config(), tmp_path)["complete"]
  for mine, one in zip(label_job.records(tmp_path), label_job.records(whole[0]), strict=True):
    for name in labels.FIELDS:
      np.testing.assert_array_equal(mine[name], one[name])


def test_two_jobs_that_write_one_shard_at_a_time_leave_it_whole(whole, tmp_path):
  records = label_job.records(whole[0])
  path = tmp_path / labels.shard_name(0, 1)
  with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda _: label._write_shard(path, records), range(8)))
  assert [record["index"] for record in label_job.records(tmp_path)] == list(range(10))
  assert list(tmp_path.iterdir()) == [path]


def _film(path, level):
  """A picture at 10 frames a second that moves 2 pixels to the right in each."""
  wide = np.random.default_rng(level).integers(0, 256, (8, 12, 3), np.uint8)
  wide = viz.resized(wide, (32, 48))
  viz.write_mp4(path, np.stack([wide[:, 8 - 2 * t : 40 - 2 * t] for t in range(4)]), fps=10)


@pytest.mark.parametrize("source", ["video", "tfds"])
def test_any_source_is_labelled_by_any_tracker(source, tmp_path):
  films = tmp_path / "films"
  films.mkdir()
  for level in range(2):
    _film(films / f"{level}.mp4", level)
  (films / "broken.mp4").write_text("not a video")
  config = label_job.get_config()
  config.data.sources.scenes.weight = 0.0
  config.data.update(crop="centre", flip=False)
  config.label.update(tracker="phase", pairs=4, image_hw=(32, 32))
  if source == "video":
    config.data.sources.video.update(weight=1.0, paths=str(films), gap_ms=100.0)
  else:
    how = clips.Cut(seconds=0.4, fps=10.0, short_side=32, quality=95, limit=0)
    made = prepare.prepare(films, tmp_path / "clips", how=how, shard_videos=3)
    config.data.sources.tfds.update(weight=1.0, data_dir=str(made), gap=1)
  assert label.run(config, tmp_path / "out")["pairs"] == 4
  for record in label_job.records(tmp_path / "out"):
    np.testing.assert_allclose(record["flow_xy"], [[2, 0]] * 3, atol=0.5)
  (row,) = [
    json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
  ]
  assert (row["skipped_items"] > 0) == (source == "video")


def test_the_shares_of_two_processes_together_are_the_whole(whole, tmp_path, monkeypatch):
  for process in (1, 0):
    monkeypatch.setattr(spread, "my_share", lambda count, p=process: range(p, count, 2))
    manifest = label.run(label_job.get_config(), tmp_path)
    assert manifest["complete"] is (process == 0)
  for mine, one in zip(label_job.records(tmp_path), label_job.records(whole[0]), strict=True):
    for name in labels.FIELDS:
      np.testing.assert_array_equal(mine[name], one[name])


def test_other_settings_are_refused_by_name(whole):
  config = label_job.get_config()
  config.label.points = 5
  config.data.sources.scenes.first_seed += 1
  told = r"other settings \(data.sources.scenes.first_seed, label.points\)"
  with pytest.raises(InputError, match=told):
    label.run(config, whole[0])


def test_other_weights_of_the_same_path_are_another_job(tmp_path, monkeypatch):
  label.run(label_job.get_config(), tmp_path)
  monkeypatch.setattr(named, "origin", lambda name, settings: "another file")
  with pytest.raises(InputError, match=r"other settings \(origin\)"):
    label.run(label_job.get_config(), tmp_path)


@pytest.mark.parametrize(
  "change, told",
  [
    ({"shard_pairs": 3}, "no multiple of data.batch_size"),
    ({"pairs": 0}, "are 1 or more"),
    ({"marks": 4, "points": 5}, "square grid"),
    ({"marks": 4, "points": 4}, "zero paints no marks"),
  ],
)
def test_settings_that_cannot_be_are_a_sentence(change, told, tmp_path):
  config = label_job.get_config()
  config.label.update(change)
  with pytest.raises(InputError, match=told):
    label.run(config, tmp_path)


def test_filters_keep_what_is_sure_and_comes_back_and_their_shares_are_told(tmp_path, monkeypatch):
  config = label_job.get_config()
  config.label.update(
    pairs=2, points=5, shard_pairs=2, round_trip=True, min_confidence=0.15, max_round_trip=2.0
  )
  asked = []

  class Says:
    """Says that all moves 2 pixels to the right, and then half a pixel to the left."""

    def pairs(self, frames, points_xy):
      asked.append(frames)
      step = np.array([2.0 if len(asked) == 1 else -0.5, 0.0], np.float32)
      sure = (np.arange(points_xy.shape[1]) / 10).astype(np.float32)
      everywhere = np.ones(points_xy.shape[:2], bool)
      return PointFlow(points_xy + step, everywhere, np.where(everywhere, sure, 0))

  monkeypatch.setattr(named, "build", lambda name, settings: [Says()])
  overall = label.run(config, tmp_path)["overall"]
  there, back = asked
  np.testing.assert_array_equal(there[:, ::-1], back)
  found = label_job.records(tmp_path)
  for record in found:
    np.testing.assert_allclose(record["flow_xy"], [[2, 0]] * 5)
    # What lands outside the frame, 16 pixels wide, cannot come back.
    left = record["points_xy"][:, 0] + 2 > 16
    np.testing.assert_allclose(record["round_trip"], np.where(left, np.inf, 1.5), atol=1e-5)
  assert overall["sure"] == pytest.approx(0.6)
  consistent = np.mean([np.isfinite(record["round_trip"]) for record in found])
  assert overall["consistent"] == pytest.approx(consistent)
  passed = [label.kept(record, config.label)["kept"] for record in found]
  assert overall["kept"] == pytest.approx(np.mean(passed))


def test_where_nobody_asked_for_the_way_back_nothing_is_said_of_it(whole, caplog, tmp_path):
  workdir, manifest = whole
  for record in label_job.records(workdir):
    assert np.isnan(record["round_trip"]).all()
    passed = label.kept(record, label_job.get_config().label)
    assert "consistent" not in passed and passed["kept"].all()
  assert "consistent" not in manifest["overall"] and manifest["overall"]["kept"] == 1
  assert "consistent" not in (workdir / "metrics.jsonl").read_text()
  config = label_job.get_config()
  config.label.update(pairs=4)
  with caplog.at_level("INFO"):
    label.run(config, tmp_path)
  assert "kept 100% (sure 100%)" in caplog.text


def test_a_limit_of_the_way_back_is_refused_where_nobody_asked_for_it(whole, tmp_path):
  workdir, _ = whole
  config = label_job.get_config()
  config.label.max_round_trip = 2.0
  with pytest.raises(InputError, match="were not asked for the way back"):
    label.run(config, tmp_path)
  with pytest.raises(InputError, match="were not asked for the way back"):
    label.kept(label_job.records(workdir)[0], config.label)


def test_training_refuses_a_limit_of_the_way_back_only_where_nobody_asked_for_it(whole, tmp_path):
  config = distill_tiny.get_config("runlocal")
  config.label.image_hw = (16, 16)
  config.data.sources.labels.paths = str(whole[0])
  assert tasks.build(config).max_round_trip == config.label.max_round_trip
  config.label.max_round_trip = 2.0
  with pytest.raises(InputError, match="were not asked for the way back"):
    tasks.build(config)
  asking = label_job.get_config()
  asking.label.update(pairs=4, round_trip=True)
  label.run(asking, tmp_path)
  config.data.sources.labels.paths = str(tmp_path)
  assert tasks.build(config).max_round_trip == 2.0


def test_several_marks_a_pass_label_an_even_grid_there_and_back(tmp_path, monkeypatch):
  config = label_job.get_config()
  config.label.update(pairs=2, points=64, marks=4, shard_pairs=2, round_trip=True)
  tracker = Tracker(
    toy_predictors.shifted_by(1, 2),
    image_hw=(16, 16),
    patch=4,
    num_masks=8,
    mask_ratio=0.75,
    mark={"kind": "gaussian", "amplitude": 1.0, "sigma": 0.7},
    readout="window",
  )
  monkeypatch.setattr(named, "build", lambda name, settings: [tracker])
  label.run(config, tmp_path)
  # Forward and back, 8 rounds of 16 marked passes.
  assert tracker.passes == (2 * 2 * 8 * 16, 2 * 2 * 8)
  centres = np.arange(8) * 2 + 1.0
  for record in label_job.records(tmp_path):
    grid = record["points_xy"].reshape(8, 8, 2)
    np.testing.assert_array_equal(grid, np.stack(np.meshgrid(centres, centres), axis=-1))
    inner = np.s_[1:-3, 1:-3]
    flow = record["flow_xy"].reshape(8, 8, 2)[inner]
    assert np.abs(np.median(flow, axis=(0, 1)) - (2, 1)).max() < 0.2
    # The toy moves everything the same way whichever frame comes first.
    away = record["round_trip"].reshape(8, 8)[inner]
    assert abs(np.median(away) - np.hypot(4, 2)) < 0.3
    # What leaves the frame cannot come back.
    gone = (record["points_xy"] + record["flow_xy"] > 16).any(axis=-1)
    np.testing.assert_array_equal(np.isinf(record["round_trip"]), gone)


def test_points_lie_in_cells_of_their_own():
  points = label_answers.draw_points(np.random.default_rng(0), 16, (64, 32))
  assert len({(int(x // 8), int(y // 16)) for x, y in points}) == 16
  assert label_answers.draw_points(np.random.default_rng(0), 5, (64, 32)).shape == (5, 2)
