"""What a study's cells are made into: the table, its sentences, the figure."""

from __future__ import annotations

import numpy as np

from cwm_jax.evals import study_report


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
  assert figure.dtype == np.uint8 and figure.shape[2] == 3
  # The legend, in the same colours, is to the right of both charts; a single point is a dot.
  chart = figure[:, : figure.shape[1] // 3].reshape(-1, 3).tolist()
  drawn = {name: chart.count([*study_report._COLOURS[name]]) for name in ("red", "white", "green")}
  assert drawn["red"] > 200 > drawn["white"] > 0 == drawn["green"]
