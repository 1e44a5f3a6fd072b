"""The study from end to end at the smallest size: cells are kept, and made into a table."""

from __future__ import annotations

import functools
import json
import logging
import shutil

import joint_job
import numpy as np
import pytest
import tapvid_clips
import tiny_clips
from PIL import Image

from cwm_jax import study, study_marks, train
from cwm_jax.evals import study_report, tapvid
from cwm_jax.pretrained import mark_files, weights
from cwm_jax.types import InputError


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


def test_a_study_goes_on_where_it_was_left(done):
  predictor, workdir, found = done
  lost, kept = (cell.path(workdir) for cell in found)
  lost.unlink()
  stamp = kept.stat().st_mtime_ns
  again = study.run(job(predictor), workdir)
  assert lost.is_file() and kept.stat().st_mtime_ns == stamp
  for cell, numbers in found.items():
    assert again[cell]["average_distance"] == pytest.approx(numbers["average_distance"], abs=1e-3)


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
  # What is to be measured is not the training's affair.
  config.stop_after, config.study.masks = "", ()
  study.run(config, workdir)
  assert weights.read_header(mark).extra["steps"] == 2


class PowerCutError(Exception):
  pass


def clips_job(predictor, tmp_path, **changes):
  if not (tmp_path / "clips").exists():
    for i in range(3):
      tapvid_clips.write_clip(tmp_path / "clips" / f"clip{i}", frames=3, hw=(16, 32), seed=i)
  config = job(predictor)
  config.study.update(marks=("red",), scenes=0, tapvid=str(tmp_path / "clips"), **changes)
  return config


@pytest.fixture
def asked(monkeypatch):
  """The clips that are asked about; add a None, and there is a power cut at the third question."""
  real, names = tapvid.tapvid_answers.ask, []

  def ask(*args, **settings):
    if None in names and len(names) == 3:
      raise PowerCutError
    names.append(args[1].name)
    return real(*args, **settings)

  monkeypatch.setattr(tapvid.tapvid_answers, "ask", ask)
  return names


def test_a_study_on_clips_goes_on_where_it_was_left_and_never_with_answers_of_another(
  done, tmp_path, asked
):
  predictor, _, _ = done
  workdir = tmp_path / "study"
  asked.append(None)
  with pytest.raises(PowerCutError):
    study.run(clips_job(predictor, tmp_path), workdir)
  assert asked == [None, "clip0", "clip1"]
  # Under another protocol two clips' answers are there that are not its own.
  asked.clear()
  (other,) = study.run(clips_job(predictor, tmp_path, protocol="first"), workdir).values()
  assert asked == ["clip0", "clip1", "clip2"]
  (alone,) = study.run(clips_job(predictor, tmp_path, protocol="first"), tmp_path / "2").values()
  assert other["average_distance"] == alone["average_distance"]
  with pytest.raises(InputError, match="other settings .protocol.; take another --workdir"):
    study.run(clips_job(predictor, tmp_path), workdir)


def test_an_interrupted_study_on_clips_asks_about_the_rest_only(done, tmp_path, asked):
  predictor, _, _ = done
  asked.append(None)
  with pytest.raises(PowerCutError):
    study.run(clips_job(predictor, tmp_path), tmp_path / "study")
  asked.clear()
  (found,) = study.run(clips_job(predictor, tmp_path), tmp_path / "study").values()
  assert asked == ["clip2"]
  asked.clear()
  (whole,) = study.run(clips_job(predictor, tmp_path), tmp_path / "whole").values()
  assert found["num_clips"] == 3 and found["average_distance"] == whole["average_distance"]


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
  ],
)
def test_a_study_of_nothing_known_is_refused(tmp_path, changes, told):
  config = joint_job.get_config("nowhere")
  config.study.update(changes)
  with pytest.raises(InputError, match=told):
    study.run(config, tmp_path)


def cells(**distances):
  """{(mark, masks, data, seed): numbers}, from mark_masks=[a distance a seed]."""
  made = {}
  for name, values in distances.items():
    mark, _, masks = name.rpartition("_")
    for seed, value in enumerate(values):
      numbers = dict(average_distance=value, median_distance=value / 2, delta_avg=0.25)
      made[mark, int(masks), "scenes", seed] = numbers
  return made


def test_the_table_tells_means_and_spreads_over_seeds_and_the_trends():
  found = cells(
    red_10=[20.0, 21.0], white_10=[16.5, 16.5], learned_white_1=[22.0, 22.0],
    learned_white_10=[15.0, 17.0], learned_white_40=[15.0, 15.0],
  )  # fmt: skip
  table = study_report.markdown(
    found, marks=("red", "white", "learned_white"), masks=(1, 10, 40)
  ).splitlines()
  # A seed that is measured with few masks only says nothing of what many gain.
  del found["learned_white", 40, "scenes", 0]
  assert "learned + WBinit: MM-40 gains +2.00 px on MM-10" in study_report.trends(found, "scenes")
  assert "| red square | MM-10 | 2 | 20.50 ± 0.71 | 10.25 ± 0.35 | 25.00 ± 0.00 | - |" in table
  told = "\n".join(table)
  assert "better than the red square at MM-10 by more than the spread over seeds: +4.50 px" in told
  assert "not better than the white Gaussian" in told
  assert "learned + WBinit: MM-10 gains +6.00 px on MM-1" in told
  assert "learned + WBinit: MM-40 gains +1.00 px on MM-10" in told
  # Nobody knows the spread of one seed.
  alone = study_report.trends(cells(red_10=[20.0], learned_white_10=[19.0]), "scenes")
  assert alone == ["learned + WBinit is better than the red square at MM-10: +1.00 px, one seed"]


def test_the_figure_has_a_line_a_mark():
  found = cells(red_1=[20.0], red_10=[10.0], white_1=[15.0], white_10=[np.nan])
  figure = study_report.figure(found, marks=("red", "white"))
  assert figure.dtype == np.uint8 and figure.shape[2] == 3 and figure.min() < 100
