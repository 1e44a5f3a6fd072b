import json

import command_line
import numpy as np
import pytest
import tiny_model
from PIL import Image

from cwm_jax import evaluate
from cwm_jax.configs import base, eval_scenes, eval_tapvid
from cwm_jax.evals import flow, named, prediction, scenes, tapvid_answers, trackers
from cwm_jax.pretrained import weights
from cwm_jax.types import InputError, PointFlow


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


def test_numbers_that_are_not_known_are_null_in_the_file_and_nan_when_gone_on_with(
  config, tmp_path
):
  first = evaluate.run(config, tmp_path / "out")["tapvid/first"]["zero"]
  # Zero motion never says that a point is hidden.
  assert np.isnan(first["mean/occlusion_f1"])

  def refuse(constant):
    raise ValueError(f"{constant} is not JSON")

  text = (tmp_path / "out" / "results.json").read_text()
  kept = json.loads(text, parse_constant=refuse)["numbers"]["tapvid/first"]["zero"]
  assert kept["mean/occlusion_f1"] is None
  again = evaluate.run(config, tmp_path / "out")["tapvid/first"]["zero"]
  np.testing.assert_equal(again, first)


class _Shifted(trackers.PairTracker):
  """Answers that every point moves so many pixels to the right."""

  def __init__(self, by):
    super().__init__()
    self._by = by

  def flow(self, frame1, frame2, points_xy):
    xy = np.asarray(points_xy, np.float32) + np.array([self._by, 0], np.float32)
    return PointFlow(xy, np.ones(len(xy), bool), np.ones(len(xy), np.float32))


@pytest.fixture
def weights_files(tmp_path, monkeypatch):
  """Two files `model.safetensors`; each tracker answers as many pixels off as its file is long."""
  files = [tmp_path / name / "model.safetensors" for name in ("a", "b")]
  for length, path in enumerate(files, start=1):
    path.parent.mkdir()
    path.write_bytes(b"x" * length)
  build = named.build

  def stand_in(name, settings):
    path = named.weights_path(name, settings)
    return build(name, settings) if path is None else [_Shifted(path.stat().st_size)]

  monkeypatch.setattr(named, "build", stand_in)
  return files


def _moved(workdir, row):
  """By how many pixels the kept answers of a row moved a point of a clip."""
  with np.load(workdir / "answers" / "first" / row / "one.npz") as kept:
    later = kept["tracks_xy"][0, -1]
    return float((later - kept["queries_tyx"][0, :0:-1])[0])


@pytest.mark.parametrize("change", ["another folder's", "the same, retrained"])
def test_weights_of_one_name_are_measured_again_where_their_file_is_another(
  config, tmp_path, weights_files, caplog, change
):
  a, b = weights_files
  config.evaluate.trackers = (str(a), "zero")
  first = evaluate.run(config, tmp_path / "out")["tapvid/first"]
  assert _moved(tmp_path / "out", "model") == 1
  if change == "another folder's":
    config.evaluate.trackers = (str(b), "zero")
  else:
    a.write_bytes(b"xx")
  second = evaluate.run(config, tmp_path / "out")["tapvid/first"]
  assert "the stored numbers of model are not of these weights" in caplog.text
  assert _moved(tmp_path / "out", "model") == 2
  distance = "pooled/average_distance"
  assert second["model"][distance] != first["model"][distance]
  np.testing.assert_equal(second["zero"], first["zero"])
  # And those are kept in their turn.
  again = evaluate.run(config, tmp_path / "out")["tapvid/first"]
  np.testing.assert_equal(again["model"], second["model"])


def test_of_results_without_origins_weights_are_measured_again_and_baselines_are_not(
  config, tmp_path, weights_files
):
  config.evaluate.trackers = (str(weights_files[0]), "zero")
  out = tmp_path / "out"
  evaluate.run(config, out)
  # As a version left them that did not note origins, of weights that answered something else.
  stored = json.loads((out / "results.json").read_text())
  noted = stored.pop("origins")["tapvid/first"]
  for row in stored["numbers"]["tapvid/first"].values():
    row["seconds"] = -1.0
  (out / "results.json").write_text(json.dumps(stored))
  for path in (out / "answers" / "first" / "model").glob("*.npz"):
    with np.load(path) as kept:
      answers = {name: kept[name] for name in kept if name != "origin"}
    answers["tracks_xy"] += 7
    np.savez(path, **answers)
  assert _moved(out, "model") > 7
  rows = evaluate.run(config, out)["tapvid/first"]
  assert rows["model"]["seconds"] > 0 and _moved(out, "model") == 1
  assert rows["zero"]["seconds"] == -1
  again = json.loads((out / "results.json").read_text())["origins"]["tapvid/first"]
  assert again["model"] == noted["model"]


def test_what_mm_n_asks_and_the_prediction_go_with_the_weights_file_too(
  config, tmp_path, weights_files, monkeypatch
):
  asked = []
  monkeypatch.setattr(
    prediction, "of_weights", lambda path, **_: asked.append(path) or {"loss": 1.0}.items()
  )
  a = weights_files[0]
  config.evaluate.update(trackers=("mm1",), weights=str(a), prediction=3)
  first = evaluate.run(config, tmp_path / "out")
  a.write_bytes(b"xxx")
  second = evaluate.run(config, tmp_path / "out")
  assert _moved(tmp_path / "out", "mm1") == 3 and len(asked) == 2
  distance = "pooled/average_distance"
  assert second["tapvid/first"]["mm1"][distance] != first["tapvid/first"]["mm1"][distance]
  evaluate.run(config, tmp_path / "out")
  assert len(asked) == 2


def test_two_weights_files_of_one_name_have_a_row_each_called_by_their_folders(
  config, tmp_path, weights_files, capsys
):
  a, b = map(str, weights_files)
  config.evaluate.trackers = (a, b, "zero")
  numbers = evaluate.run(config, tmp_path / "out")["tapvid/first"]
  assert set(numbers) == {"a-model", "b-model", "zero"}
  assert [_moved(tmp_path / "out", row) for row in ("a-model", "b-model")] == [1, 2]
  assert "a-model" in capsys.readouterr().out
  config.evaluate.trackers = (a, a)
  with pytest.raises(InputError, match="would be kept under one name"):
    evaluate.run(config, tmp_path / "out")


def test_a_clip_s_answers_of_other_weights_are_asked_again(
  config, tmp_path, weights_files, monkeypatch
):
  a, b = map(str, weights_files)
  # Interrupted after one clip: no row is stored, the clip's answers are.
  save = tapvid_answers.save

  def once(path, answers, **named):
    save(path, answers, **named)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(tapvid_answers, "save", once)
    config.evaluate.trackers = (a,)
    with pytest.raises(KeyboardInterrupt):
      evaluate.run(config, tmp_path / "out")
  assert _moved(tmp_path / "out", "model") == 1
  config.evaluate.trackers = (b,)
  evaluate.run(config, tmp_path / "out")
  assert _moved(tmp_path / "out", "model") == 2


def test_answers_asked_in_another_manner_are_not_taken_where_the_table_is_lost(
  config, tmp_path, weights_files, monkeypatch
):
  out, a = tmp_path / "out", weights_files[0]
  config.evaluate.update(trackers=(str(a), "zero"), overlays=0)
  evaluate.run(config, out)
  asked = []
  ask = tapvid_answers.ask
  monkeypatch.setattr(
    tapvid_answers,
    "ask",
    lambda tracker, *given, **named: asked.append(tracker) or ask(tracker, *given, **named),
  )

  def again(**changes):
    asked.clear()
    config.evaluate.update(changes)
    (out / "results.json").unlink()
    evaluate.run(config, out)
    return [isinstance(tracker, _Shifted) for tracker in asked]

  assert again() == []
  # Zero motion is the same however predictors are asked.
  assert again(zoom=4) == [True, True]
  assert again(memory_budget=1e6) == []
  assert again(resolution="16x16").count(False) == 2
  # Files from before the manner was noted are taken as they are.
  for path in (out / "answers").rglob("*.npz"):
    with np.load(path) as kept:
      answers = {name: kept[name] for name in kept if name != "manner"}
    np.savez(path, **answers)
  assert again(zoom=2) == []


def test_a_refusal_of_a_folder_names_no_option_that_only_one_entry_has(config, tmp_path):
  evaluate.run(config, tmp_path / "out")
  config.evaluate.zoom = 3
  with pytest.raises(InputError, match="take another folder"):
    evaluate.run(config, tmp_path / "out")
  (tmp_path / "out" / "results.json").write_text("{")
  with pytest.raises(InputError, match="delete it or take another folder"):
    evaluate.run(config, tmp_path / "out")


def test_results_from_before_a_key_was_there_are_of_what_held_then(config, tmp_path):
  evaluate.run(config, tmp_path / "out")
  path = tmp_path / "out" / "results.json"
  stored = json.loads(path.read_text())
  del stored["settings"]["tracker_protocol"]
  stored["numbers"]["tapvid/first"]["zero"]["seconds"] = -1.0
  path.write_text(json.dumps(stored))
  assert evaluate.run(config, tmp_path / "out")["tapvid/first"]["zero"]["seconds"] == -1.0
  path.write_text(json.dumps(stored))
  config.evaluate.tracker_protocol = "release"
  with pytest.raises(InputError, match="tracker_protocol"):
    evaluate.run(config, tmp_path / "out")


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
  with pytest.raises(ValueError, match="release_distilled or runlocal, not 'other'"):
    eval_tapvid.get_config("other")


def test_flow_networks_get_settings_of_their_own(tmp_path):
  config = base.get_config()
  config.flow_network.update(tiny_model.flow_network(), context_norm="instance")
  params = command_line.random_params(config.to_dict())
  path = str(weights.save(tmp_path / "student.safetensors", params, config.to_dict()))
  settings = config.evaluate
  settings.flow.update(occlusion="relative", occlusion_threshold=1e-6)
  pair = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
  (strict,) = named.build(path, settings)
  settings.flow.occlusion_threshold = 1e6
  (lenient,) = named.build(path, settings)
  points = [[8.0, 8.0], [5.0, 9.0]]
  assert not strict.flow(*pair, points).visible.any() and lenient.flow(*pair, points).visible.all()
  settings.flow.iterations = -1
  with pytest.raises(InputError, match="run for -1 iterations"):
    named.build(path, settings)
