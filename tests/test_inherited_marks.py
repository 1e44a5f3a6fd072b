"""Weights that were trained on keep the mark that their first ones recommend."""

from __future__ import annotations

import json

import command_line
import numpy as np
import pytest
import tiny_model

from cwm_jax import checkpoint, conversion
from cwm_jax.pretrained import weights

SHIPPED = {"kind": "gaussian", "amplitude": 0.5, "sigma": 1.0}
LEARNED = dict(kind="learned", hidden_width=4, size=6, scale=1, on_pixel=True, reach=1.0)
SIDE = 16


def first_weights(tmp_path, mark):
  """A weights file for images of SIDE pixels, which recommends the mark, or none."""
  config = {"model": tiny_model.config(image_hw=[SIDE, SIDE])} | ({"mark": mark} if mark else {})
  return weights.save(tmp_path / "first.safetensors", command_line.random_params(config), config)


@pytest.fixture
def converted(tmp_path, monkeypatch, capsys):
  """A function that makes a weights file of a run begun with `init_from`: (file, what is said)."""

  def convert(init_from, side=SIDE):
    config = {"task": "pretrain", "init_from": str(init_from)}
    config["model"] = tiny_model.config(image_hw=[side, side])
    params = command_line.random_params({"model": config["model"]})
    monkeypatch.setattr(checkpoint, "load_params", lambda source: (params, config))
    (tmp_path / "run").mkdir(exist_ok=True)
    made = tmp_path / "run" / "model.safetensors"
    conversion.run(
      source=str(tmp_path / "run"), out=str(made), dtype="float32",
      over=None, keep_base=False, like=None, heads=None, as_json=False,
    )  # fmt: skip
    return made, capsys.readouterr().out

  return convert


def test_a_run_s_file_recommends_the_mark_of_the_weights_it_was_begun_with(converted, tmp_path):
  made, said = converted(first_weights(tmp_path, SHIPPED))
  assert weights.read_header(made).config["mark"] == SHIPPED
  assert "mark: gaussian (amplitude 0.5, sigma 1.0), as " in said


def test_a_learned_mark_goes_along_with_its_perturber(converted, tmp_path):
  first = first_weights(tmp_path, LEARNED)
  made, said = converted(first)
  assert weights.read_header(made).config["mark"] == LEARNED and "mark: learned" in said
  kept, wanted = (weights.flatten(weights.load_perturber(path)) for path in (made, first))
  assert kept.keys() == wanted.keys()
  assert all(np.array_equal(kept[name], wanted[name]) for name in wanted)
  weights.load_model(made)  # the predictor's own names are as they were


@pytest.mark.parametrize(
  "mark, grown",
  [
    (SHIPPED, SHIPPED | {"sigma": 2.0}),
    (
      {"kind": "square", "colour": [0, 255, 0], "size": 3},
      {"kind": "square", "colour": [0, 255, 0], "size": 6},
    ),
    (LEARNED, LEARNED | {"scale": 2}),
  ],
)
def test_a_mark_is_as_large_in_the_scene_where_images_are_larger(converted, tmp_path, mark, grown):
  made, said = converted(first_weights(tmp_path, mark), side=2 * SIDE)
  assert weights.read_header(made).config["mark"] == grown
  assert "first.safetensors recommends for images 0.5 times as large" in said


def test_a_run_that_went_on_from_another_run_looks_where_that_one_began(converted, tmp_path):
  earlier = tmp_path / "earlier"
  earlier.mkdir()
  begun = {"init_from": str(first_weights(tmp_path, SHIPPED))}
  (earlier / "config.json").write_text(json.dumps(begun))
  made, _ = converted(earlier)
  assert weights.read_header(made).config["mark"] == SHIPPED
  # A run may also be begun with itself.
  (earlier / "config.json").write_text(json.dumps({"init_from": str(earlier)}))
  made, said = converted(earlier)
  assert "mark" not in weights.read_header(made).config and "mark: none is recommended," in said


def test_a_file_without_a_mark_says_so_and_why(converted, tmp_path):
  for source, told in [("", ", so"), (first_weights(tmp_path, None), ", so"), ("gone", "gone")]:
    made, said = converted(source)
    assert "mark" not in weights.read_header(made).config
    line = next(line for line in said.splitlines() if line.startswith("mark: none is recommended"))
    assert told in line and "a red square of half a patch is used" in line
  # An image that is not a whole number of times as large has no grid for a learned mark.
  made, said = converted(first_weights(tmp_path, LEARNED), side=24)
  assert "cannot be drawn at 1.5 times its grid" in said
