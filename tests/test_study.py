"""The study from end to end at the smallest size: cells are kept, and made into a table."""

from __future__ import annotations

import json

import joint_job
import numpy as np
import pytest
from PIL import Image

from cwm_jax import study
from cwm_jax.evals import study_report
from cwm_jax.pretrained import mark_files
from cwm_jax.types import InputError


def job(predictor, **changes):
  config = joint_job.get_config(predictor, total="2 steps", **changes)
  config.job = "study"
  config.study.update(marks=("red", "learned_white"), masks=(1,), seeds=(0,), scenes=2)
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


def test_cells_of_other_settings_are_not_taken_for_these(done):
  predictor, workdir, _ = done
  config = job(predictor)
  config.study.readout = "soft"
  with pytest.raises(InputError, match="other settings .readout.; take another --workdir"):
    study.run(config, workdir)


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
