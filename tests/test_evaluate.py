import json

import command_line
import numpy as np
import pytest
import tiny_model
from PIL import Image

from cwm_jax import evaluate
from cwm_jax.configs import base, eval_scenes, eval_tapvid
from cwm_jax.evals import flow, scenes, trackers
from cwm_jax.pretrained import weights
from cwm_jax.types import InputError


@pytest.fixture
def config(tmp_path):
  """Two clips, protocol First, zero motion and phase correlation."""
  rng = np.random.default_rng(0)
  for name in ("one", "two"):
    (tmp_path / "clips" / name / "video").mkdir(parents=True)
    for t in range(3):
      pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(tmp_path / "clips" / name / "video" / f"{t}.png")
    points_xy = rng.uniform(4, 28, (2, 3, 2)).astype(np.float32)
    np.savez(
      tmp_path / "clips" / name / "points.npz",
      points_xy=points_xy,
      occluded=np.zeros((2, 3), bool),
      hw=np.array((32, 32)),
    )
  c = eval_tapvid.get_config()
  c.evaluate.update(
    trackers=("zero", "phase"), tapvid=str(tmp_path / "clips"), protocols=("first",)
  )
  return c


def test_a_table_and_a_file_of_results_come_out(config, tmp_path, capsys):
  numbers = evaluate.run(config, tmp_path / "out")
  printed = capsys.readouterr().out
  assert "tapvid/first" in printed and "zero" in printed and "phase" in printed
  value = numbers["tapvid/first"]["zero"]["pooled/average_distance"]
  assert f"{value:.2f}" in printed
  stored = json.loads((tmp_path / "out" / "results.json").read_text())
  assert stored["numbers"]["tapvid/first"]["zero"]["pooled/average_distance"] == value
  metrics = (tmp_path / "out" / "metrics.jsonl").read_text()
  assert "tapvid/first/zero/pooled/average_distance" in metrics
  # Numbers of single clips have their own files; they would bury the others.
  assert "tapvid/first/zero/one" not in metrics
  written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
  assert {
    "answers/first/zero/one.npz",
    "tapvid/first/zero/clips.txt",
    "tapvid/first/error-by-gap.png",
  } <= written


def test_a_second_run_computes_nothing_again_and_adds_what_is_new(config, tmp_path, monkeypatch):
  first = evaluate.run(config, tmp_path / "out")
  asked = []
  build = trackers.build
  monkeypatch.setattr(trackers, "build", lambda name: asked.append(name) or build(name))
  config.evaluate.trackers = ("zero", "phase", "lk")
  pytest.importorskip("cv2")
  second = evaluate.run(config, tmp_path / "out")
  assert asked == ["lk"]
  np.testing.assert_equal(second["tapvid/first"]["zero"], first["tapvid/first"]["zero"])
  rows = (tmp_path / "out" / "metrics.jsonl").read_text()
  for name in config.evaluate.trackers:
    assert rows.count(f'"tapvid/first/{name}/num_clips"') == 1


def test_results_of_other_settings_are_not_mixed(config, tmp_path):
  evaluate.run(config, tmp_path / "out")
  config.evaluate.masks_seed = 5
  with pytest.raises(InputError, match="masks_seed"):
    evaluate.run(config, tmp_path / "out")


def test_percent_are_printed_for_fractions_and_a_dash_for_what_is_not_known():
  rows = {"zero": {"delta_avg": 0.5, "average_distance": 2.0, "seconds": 1.0}}
  columns = (("AD", "average_distance", False), ("delta %", "delta_avg", True), ("x", "x", True))
  line = evaluate.table(rows, columns, ["zero"]).splitlines()[1]
  assert line.split() == ["zero", "2.00", "50.00", "-", "1.00"]


def test_an_evaluation_of_nothing_is_refused(tmp_path):
  with pytest.raises(InputError, match="nothing to evaluate"):
    evaluate.run(eval_tapvid.get_config(), tmp_path)


def test_a_damaged_results_file_is_named(config, tmp_path):
  (tmp_path / "results.json").write_text("{")
  with pytest.raises(InputError, match="results.json is damaged"):
    evaluate.run(config, tmp_path)


def test_scenes_are_evaluated_with_the_honesty_test(tmp_path, capsys, monkeypatch):
  frames = np.random.default_rng(0).integers(0, 256, (2, 2, 16, 16, 3), dtype=np.uint8)
  points = np.full((2, 1, 2), 8.0, np.float32)
  one = flow.FlowQuestions(frames, points, points + 2, np.ones((2, 1), bool))
  asked = []
  monkeypatch.setattr(flow, "scene_questions", lambda limit: asked.append(limit) or iter([one]))
  c = eval_scenes.get_config("runlocal")
  c.evaluate.trackers = ("zero",)
  (numbers,) = evaluate.run(c, tmp_path).values()
  assert numbers["zero"]["median_ratio"] == 1.0
  assert asked == [20]
  assert "exchanged MD" in capsys.readouterr().out


def test_the_weights_prediction_of_frame_2_is_measured_beside_copying(
  tmp_path, monkeypatch, capsys
):
  model = {"model": tiny_model.config()}
  path = weights.save(tmp_path / "tiny.safetensors", command_line.random_params(model), model)
  frames = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32, 3), dtype=np.uint8)
  asked = []

  def drawn(*, limit, at_a_time):
    asked.append(limit)
    points = np.zeros((2, 4, 2), np.float32)
    layers = np.zeros((2, 32, 32), np.uint8)
    yield scenes.ScenePairs(frames, points, points, np.zeros((2, 4), bool), layers)

  monkeypatch.setattr(scenes, "scenes_test_v1", drawn)
  c = base.get_config()
  c.evaluate.update(weights=str(path), prediction=2)
  (numbers,) = evaluate.run(c, tmp_path / "out").values()
  got = numbers["predictor"]
  assert asked == [2] and got["loss"] > 0
  assert got["loss_ratio"] == pytest.approx(got["loss"] / got["copy/loss"])
  # Noise at half its size, in another frame: copying is bad, and random weights are no better.
  assert 5 < got["copy/psnr"] < 20 and 0 < got["psnr"] < 20
  printed = capsys.readouterr().out
  assert "prediction[2]" in printed and f"{got['copy/psnr']:.2f}" in printed


@pytest.mark.parametrize(
  "argument, protocols", [("", ("first", "cfg")), ("strided", ("strided",)), ("runlocal", None)]
)
def test_the_config_s_arguments_choose_protocols_and_trackers(argument, protocols):
  c = eval_tapvid.get_config(argument).evaluate
  assert c.protocols == (protocols or ("first", "cfg"))
  assert ("dis" in c.trackers) is (argument != "runlocal")
  released = eval_tapvid.get_config("release").evaluate
  assert released.protocols == ("release_first", "release_cfg") and released.zoom == 4
  with pytest.raises(ValueError, match="strided, release or runlocal"):
    eval_tapvid.get_config("other")
