"""The study from end to end at the smallest size: cells are kept, and made into a table."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import threading

import jax
import joint_job
import numpy as np
import pytest
import tiny_clips
from PIL import Image

from cwm_jax import study, study_marks, train
from cwm_jax.pretrained import mark_files, weights
from cwm_jax.types import InputError, SaveError


def job(predictor, **changes):
  config = joint_job.get_config(predictor, total="2 steps", **changes)
  config.job = "study"
  config.study.update(marks=("red", "learned_white"), masks=(1,), seeds=(0,), scenes=2)
  config.study.bottleneck_scenes = 8
  return config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """(predictor, workdir, what was found) of a study of two marks."""
  workdir = tmp_path_factory.mktemp("study")
  predictor = joint_job.weights_file(workdir)
  return predictor, workdir, study.run(job(predictor), workdir)


def test_every_cell_is_measured_and_kept_and_its_mark_too(done):
  predictor, workdir, found = done
  assert [cell[:2] for cell in found] == [("red", 1), ("learned_white", 1)]
  for cell, numbers in found.items():
    assert 0 < numbers["average_distance"] < 400 and numbers["num_points"] == 8
    assert json.loads(cell.path(workdir).read_text())["numbers"] == numbers
  mark = workdir / "marks" / "learned_white-0.safetensors"
  model = study.joint_building.predictor_file(str(predictor))[1]["model"]
  _, config = mark_files.read(mark, model=model)
  assert config["mark"]["size"] == 5
  table = (workdir / "study.md").read_text()
  assert "| red square | MM-1 | 1 |" in table and "| 21.92 / 12.49 / 27.8 |" in table
  assert Image.open(workdir / "study.png").size[0] > 400


def test_a_study_goes_on_where_it_was_left(done, monkeypatch):
  predictor, workdir, found = done
  lost, kept = (cell.path(workdir) for cell in found)
  lost.unlink()
  stamp = kept.stat().st_mtime_ns
  # Its answers are there, scenes by scenes.
  monkeypatch.setattr(study.flow.FlowEvaluator, "_distances", None)
  again = study.run(job(predictor), workdir)
  assert lost.is_file() and kept.stat().st_mtime_ns == stamp
  for cell, numbers in found.items():
    assert again[cell]["average_distance"] == numbers["average_distance"]


@pytest.fixture
def copied(done, tmp_path):
  """(predictor, workdir) of the same study, to be changed."""
  predictor, workdir, _ = done
  shutil.copytree(workdir, tmp_path / "study")
  return predictor, tmp_path / "study"


def without_training(monkeypatch):
  """Makes a study fail that trains once more."""

  def never(*_):
    raise AssertionError("it trains")

  monkeypatch.setattr(train, "run", never)


def as_before_notes(workdir):
  """Rewrites marks and cells as they were before they told all of their settings."""
  for path in workdir.glob("marks/*"):
    params, extra = weights.load_perturber(path), weights.read_header(path).extra
    del extra["training"]
    weights.save(path, {"perturber": params}, weights.read_header(path).config, extra=extra)
  path = study.Cell("learned_white", 1, "scenes", 0).path(workdir)
  kept = json.loads(path.read_text())
  nested = {}
  for key, value in kept["settings"].items():
    *sections, name = key.split(".")
    if not key.startswith(("data.", "mark", "init_from")):
      functools.reduce(lambda d, part: d.setdefault(part, {}), sections, nested)[name] = value
  nested["joint"] |= {"weights": "elsewhere.safetensors", "points_at_once": 7}
  path.write_text(json.dumps(kept | {"settings": nested}))


def test_a_mark_of_another_training_is_refused_and_the_settings_named(copied, monkeypatch):
  predictor, workdir = copied
  without_training(monkeypatch)
  # Without its cells, too: nothing but the mark then tells of the settings.
  shutil.rmtree(workdir / "cells")
  changes = dict(joint__inverse_temperature=9.0, data__batch_size=4)
  told = "other settings .data.batch_size, joint.inverse_temperature.; take another --workdir"
  with pytest.raises(InputError, match=f"learned_white-0.safetensors was trained with {told}"):
    study.run(job(predictor, **changes), workdir)
  worlds = ((0, "worlds"),)
  with pytest.raises(InputError, match="other settings .data.sources.scenes.curriculum."):
    study.run(job(predictor, data__sources__scenes__curriculum=worlds), workdir)


def test_what_changes_no_number_of_a_training_is_not_compared(copied, monkeypatch, tmp_path):
  predictor, workdir = copied
  without_training(monkeypatch)
  moved = shutil.copy(predictor, tmp_path / "moved.safetensors")
  changes = dict(joint__points_at_once=2, data__num_workers=1, data__prefetch=5)
  changes |= dict(data__sources__video__gap_ms=500.0)  # of a source that is not opened
  again = study.run(job(moved, **changes), workdir)
  assert [cell.mark for cell in again] == ["red", "learned_white"]


def test_marks_and_cells_of_before_they_told_their_training_are_taken(copied, monkeypatch, caplog):
  predictor, workdir = copied
  without_training(monkeypatch)
  as_before_notes(workdir)
  config = job(predictor)
  config.study.masks = (1, 1)
  with caplog.at_level(logging.INFO, logger="cwm_jax"):
    again = study.run(config, workdir)
  assert len(again) == 2
  assert caplog.text.count("does not say what it was trained with") == 1
  # What such a cell does tell counts.
  with pytest.raises(InputError, match="other settings .joint.num_points.; take another"):
    study.run(job(predictor, joint__num_points=1), workdir)


def test_a_cell_that_was_measured_with_another_mark_file_is_refused(copied):
  predictor, workdir = copied
  mark = study_marks.mark_path(workdir, "learned_white", 0)
  header, params = weights.read_header(mark), weights.load_perturber(mark)
  params["fc1"]["bias"] = params["fc1"]["bias"] + 1
  weights.save(mark, {"perturber": params}, header.config, extra=header.extra)
  config = job(predictor)
  config.study.bottleneck_scenes = 0
  with pytest.raises(InputError, match="other settings .mark.sha256.; take another --workdir"):
    study.run(config, workdir)


def test_the_bottleneck_is_measured_once_a_training_and_told_in_a_table(done, copied, monkeypatch):
  _, workdir, _ = done
  path = workdir / "bottleneck" / "learned_white-0.json"
  numbers = json.loads(path.read_text())["numbers"]
  assert numbers["num_scenes"] == 8 and numbers["loss"] > 0 and numbers["spread_px"] > 0
  for name in ("zeroed", "exchanged"):
    assert numbers[f"{name}_low"] < numbers[name] < numbers[f"{name}_high"]
  row = f"| learned + WBinit | 0 | 8 | {numbers['loss']:.5f} | {100 * numbers['zeroed']:+.1f} ("
  assert row in (workdir / "study.md").read_text()
  # A workdir of before gets its table; its cells are told beside it and not measured.
  predictor, older = copied
  shutil.rmtree(older / "bottleneck")
  (older / "study.md").unlink()
  as_before_notes(older)
  config = job(predictor)
  config.study.masks = ()
  monkeypatch.setattr(study, "Tracker", None)
  assert study.run(config, older) == {}
  # Compiled once more, the sums may fall in another order.
  table = (older / "study.md").read_text()
  for row in ("| red square | MM-1 | 1 |", "| learned + WBinit | MM-1 | 1 |"):
    assert row in table
  assert "| learned + WBinit | 0 | 8 |" in table
  found = json.loads((older / "bottleneck" / "learned_white-0.json").read_text())["numbers"]
  assert found == pytest.approx(numbers, rel=1e-4, abs=1e-5)
  # Kept from now on.
  shutil.rmtree(older / "train")
  assert study.run(config, older) == {}
  assert (older / "study.md").read_text() == table
  # A part of the study tells of the whole as well.
  config.study.update(marks=("red",), masks=(1,))
  assert len(study.run(config, older)) == 1
  assert (older / "study.md").read_text() == table


@pytest.mark.parametrize("lost", ["checkpoints", "its last one"])
def test_without_the_checkpoint_of_a_mark_it_has_no_row_of_the_bottleneck(copied, lost, caplog):
  predictor, workdir = copied
  shutil.rmtree(workdir / "bottleneck")
  if lost == "checkpoints":
    shutil.rmtree(workdir / "train")
  else:
    mark = study_marks.mark_path(workdir, "learned_white", 0)
    header, params = weights.read_header(mark), weights.load_perturber(mark)
    params["fc1"]["bias"] = params["fc1"]["bias"] + 1
    weights.save(mark, {"perturber": params}, header.config, extra=header.extra)
  config = job(predictor)
  config.study.masks = ()
  with caplog.at_level(logging.INFO, logger="cwm_jax"):
    study.run(config, workdir)
  assert "no row for learned_white-0 in the bottleneck table: " in caplog.text
  assert not (workdir / "bottleneck").exists()


def test_a_training_in_epochs_of_films_may_be_left_and_gone_on_with(done, tmp_path):
  predictor, _, _ = done
  for i in range(4):
    tiny_clips.write_video(tmp_path / f"{i}.mp4", 8, 40 + 20 * i)
  config = job(predictor, data__sources__scenes__weight=0.0)
  config.total = "1 epochs"
  config.data.sources.video.update(weight=1.0, paths=str(tmp_path))
  config.study.update(marks=("learned",), bottleneck_scenes=0)
  config.stop_after = "1 steps"
  workdir = tmp_path / "study"
  assert study.run(config, workdir) == {}
  mark = study_marks.mark_path(workdir, "learned", 0)
  assert not mark.exists()
  # The predictor may move meanwhile, but be no other one.
  params, about = weights.load(predictor)
  params["decoder"] = jax.tree.map(np.zeros_like, params["decoder"])
  other = weights.save(tmp_path / "other.safetensors", params, about)
  config.joint.weights = str(other)
  with pytest.raises(InputError, match="learned-0 was begun with another predictor; take another"):
    study.run(config, workdir)
  config.joint.weights = str(shutil.copy(predictor, tmp_path / "moved.safetensors"))
  # What is to be measured is not the training's affair.
  config.stop_after, config.study.masks = "", ()
  study.run(config, workdir)
  assert weights.read_header(mark).extra["steps"] == 2


def test_cells_of_other_settings_are_not_taken_for_these(done):
  predictor, workdir, _ = done
  config = job(predictor)
  config.study.readout = "soft"
  with pytest.raises(InputError, match="other settings .readout.; take another --workdir"):
    study.run(config, workdir)


def test_cells_of_even_squares_of_before_their_middle_was_noted_are_measured_anew(
  copied, monkeypatch
):
  predictor, workdir = copied
  red, learned = (study.Cell(m, 1, "scenes", 0).path(workdir) for m in ("red", "learned_white"))
  kept = json.loads(red.read_text())
  assert kept["settings"].pop("mark_middle") == 0.0
  assert "mark_middle" not in json.loads(learned.read_text())["settings"]
  red.write_text(json.dumps(kept))
  asked = []

  class Evaluator:
    def __init__(self, *_, **__):
      asked.append("once")

    def run(self):
      return {**kept["numbers"], "average_distance": 7.0}.items()

  monkeypatch.setattr(study.flow, "FlowEvaluator", Evaluator)
  for _ in range(2):
    again = study.run(job(predictor), workdir)
  assert asked == ["once"]
  assert again["red", 1, "scenes", 0]["average_distance"] == 7.0
  # An odd square's middle is its pixel's centre, as it always was; its cells tell nothing new.
  odd = job(predictor)
  odd.study.square = 3
  stored = study._Asks(odd, workdir).stored(
    study.Cell("red", 1, "scenes", 0), study._hand_made(odd, "red")
  )
  assert "mark_middle" not in stored


@pytest.mark.parametrize(
  "changes, told",
  [
    (dict(marks=("blue",)), "study.marks names 'blue'; choose from red, green, white"),
    (dict(scenes=0), "set study.scenes or study.tapvid"),
    (dict(scenes=501), "scenes-test-v1 has 500 scenes, and study.scenes is 501"),
    (dict(masks=(10, 0)), "study.masks is .10, 0.; a point takes 1 mask or more"),
    (dict(tapvid="no/clips"), "no/clips holds no clips"),
    (dict(tapvid="no/clips", protocol="last"), "there is no protocol 'last'"),
    (dict(tapvid="no/clips", frame_gap=0), "study.frame_gap is 0; give 1 or more"),
    (dict(readout="mean"), "the read-out is 'mean'"),
    (dict(order="first"), "the averaging order is 'first'"),
    (dict(average="all"), "the average is 'all'"),
    (dict(square=-1), "a square mark's size is a whole number of pixels from 1 up"),
    (dict(white=dict(sigma=0.0)), "a Gaussian mark's sigma is above 0"),
  ],
)
def test_a_study_that_cannot_be_is_refused_before_a_mark_is_trained(
  done, tmp_path, monkeypatch, changes, told
):
  without_training(monkeypatch)
  config = job(done[0])
  config.study.update({"marks": ("learned", "red", "white"), **changes})
  with pytest.raises(InputError, match=told):
    study.run(config, tmp_path)


def test_hand_made_marks_under_none_of_whose_seeds_it_measures_are_told(done, tmp_path, caplog):
  config = job(done[0])
  config.study.update(marks=("red", "white"), seeds=(1, 2))
  with caplog.at_level(logging.INFO, logger="cwm_jax"):
    assert study.run(config, tmp_path) == {}
  told = "red, white: not measured, for none of study.seeds (1, 2) is one of study.hand_made_seeds"
  assert told in caplog.text


def test_a_report_has_what_another_study_has_measured_meanwhile(copied, monkeypatch):
  predictor, workdir = copied
  red, learned = (study.Cell(m, 1, "scenes", 0).path(workdir) for m in ("red", "learned_white"))
  others = red.rename(workdir / "not yet")
  real = study._measure

  def measure(*args):
    others.rename(red)
    return real(*args)

  monkeypatch.setattr(study, "_measure", measure)
  config = job(predictor)
  config.study.marks = ("learned_white",)
  assert len(study.run(config, workdir)) == 1
  table = (workdir / "study.md").read_text()
  assert "| red square | MM-1 | 1 |" in table and "| learned + WBinit | MM-1 | 1 |" in table


@pytest.mark.parametrize("name", ["study.md", "study.png"])
def test_a_report_for_which_there_is_no_room_leaves_the_last_one_whole(copied, name):
  predictor, workdir = copied
  before = (workdir / name).read_bytes()
  partial = f"{name}.{os.getpid()}.{threading.get_ident()}.partial"
  (workdir / partial).symlink_to("/dev/full")
  with pytest.raises(SaveError, match="can no longer be written .No space left on device.*same"):
    study.run(job(predictor), workdir)
  assert (workdir / name).read_bytes() == before
