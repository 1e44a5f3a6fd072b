"""Trackers as configs name them: how they ask, and where their answers lie."""

from __future__ import annotations

import functools
import hashlib

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tapvid_clips import write_clip

from cwm_jax import evaluate, whole_files
from cwm_jax.configs import base, eval_tapvid
from cwm_jax.data.tapvid import ClipFolders
from cwm_jax.evals import named, trackers
from cwm_jax.models.perturber import Perturber
from cwm_jax.pretrained import mark_files, weights
from cwm_jax.tracker import Tracker
from cwm_jax.types import PointFlow, Tracks


def _saved(path, config):
  return str(weights.save(path, command_line.random_params(config), config))


@pytest.fixture
def predictor(tmp_path):
  return _saved(tmp_path / "tiny.safetensors", {"model": tiny_model.config()})


def _answers(workdir, title, tracker):
  with np.load(workdir / "answers" / title / tracker / "a.npz") as kept:
    return {name: kept[name] for name in kept}


def test_the_release_s_evaluation_asks_by_its_protocol_and_keeps_the_pixels_centres(
  tmp_path, predictor
):
  write_clip(tmp_path / "clips" / "a", frames=3, hw=(20, 28), points=2)
  config = eval_tapvid.get_config("release")
  # Zoom has programs of its own; that it is handed on is another test's.
  config.evaluate.update(
    trackers=("mm1", "zero"), weights=predictor, tapvid=str(tmp_path / "clips"), zoom=0
  )
  config.evaluate.update(frame_gap=1, overlays=0)
  numbers = evaluate.run(config, tmp_path / "out")

  asked = Tracker.load(
    predictor, num_masks=1, readout="argmax", order="release", protocol="release"
  )
  video = ClipFolders(tmp_path / "clips").read(0).video
  first = _answers(tmp_path / "out", "release_first", "mm1")
  bare = asked.track(video, first["queries_tyx"])
  later = np.arange(3) > first["queries_tyx"][:, :1]
  assert later.any()
  np.testing.assert_array_equal(first["tracks_xy"][later], bare.xy[later] + 0.5)
  np.testing.assert_array_equal(first["tracks_xy"] % 1, 0.5)
  for (start, *query_yx), found in zip(first["queries_tyx"], first["tracks_xy"]):
    own = asked.flow(video[int(start)], video[int(start)], [query_yx[::-1]])
    np.testing.assert_array_equal(found[int(start)], own.xy[0] + 0.5)
  pairs = _answers(tmp_path / "out", "release_cfg-1", "mm1")
  for (start, *query_yx), found in zip(pairs["queries_tyx"], pairs["tracks_xy"]):
    one = asked.flow(video[int(start)], video[int(start) + 1], [query_yx[::-1]])
    np.testing.assert_array_equal(found, [query_yx[::-1], one.xy[0] + 0.5])

  # What needs no weights answers continuous places under either.
  config.evaluate.update(trackers=("zero",), tracker_protocol="half_pixel")
  plain = evaluate.run(config, tmp_path / "plain")
  for title, rows in plain.items():
    for name, value in rows["zero"].items():
      if name != "seconds":
        np.testing.assert_equal(numbers[title]["zero"][name], value)


def test_the_release_s_settings_reach_predictors_and_its_distilled_network(
  tmp_path, predictor, monkeypatch
):
  config = base.get_config()
  config.flow_network.update(tiny_model.flow_network(), context_norm="instance")
  network = _saved(tmp_path / "student.safetensors", config.to_dict())
  loaded = []
  monkeypatch.setattr(Tracker, "load", lambda path, **settings: loaded.append(settings))
  settings = eval_tapvid.get_config("release").evaluate
  settings.weights = predictor
  (built,) = named.build("mm10", settings)
  assert isinstance(built, trackers.AtPixelCentres)
  released = dict(num_masks=10, zoom=4, readout="argmax", order="release", average="release")
  assert loaded[0].items() >= (released | {"protocol": "release"}).items()
  distilled = eval_tapvid.get_config("release_distilled").evaluate
  assert distilled.trackers == ("opt-cwm-distilled", "zero")
  assert distilled.resolution == "nearest_16"
  assert isinstance(named.build(network, distilled)[0], trackers.AtPixelCentres)
  assert loaded[1]["protocol"] == "release" and "num_masks" not in loaded[1]
  named.build("mm10", base.get_config().evaluate)
  assert loaded[2]["protocol"] == "half_pixel"


class _Bare:
  """Answers with 7, whatever is asked; of its query's frame and before, with the query."""

  def track(self, video, queries_tyx, *, mode="query"):
    queries = np.asarray(queries_tyx)
    later = np.arange(len(video)) > queries[:, :1]
    xy = np.where(later[..., None], 7.0, queries[:, None, :0:-1]).astype(np.float32)
    return Tracks(xy, later, later * 1.0)

  def flow(self, frame1, frame2, points_xy):
    ones = np.ones(np.shape(points_xy)[:-1])
    return PointFlow(np.full_like(points_xy, 7.0), ones > 0, ones)

  pairs = functools.partialmethod(flow, None)

  def ask(self, program, frame1, frame2, point_xy, **named):
    return point_xy


def test_bare_indices_become_the_centres_of_their_pixels_wherever_they_are_asked_for():
  tracker, points = trackers.AtPixelCentres(_Bare()), np.full((2, 1, 2), 3.25, np.float32)
  assert (tracker.flow(None, None, points[0]).xy == 7.5).all()
  assert (tracker.pairs([None, None], points).xy == 7.5).all()
  assert tracker.ask(None, None, None, (1.0, 2.0)) == (1.0, 2.0)
  tracks = tracker.track([None] * 4, [[1, 2.25, 3.25]])
  assert tracks.xy[0].tolist() == [[3.25, 2.25]] * 2 + [[7.5, 7.5]] * 2
  assert tracks.xy.dtype == np.float32


def test_answers_counted_from_an_even_square_s_middle_have_another_origin_than_older_ones(
  predictor,
):
  settings = base.get_config().evaluate
  settings.weights = predictor  # recommends no mark: a red square of 2 pixels is painted
  file = whole_files.sha256(predictor)
  assert named.origin("mm1", settings) != file
  settings.mark.update(kind="square", size=3)
  assert named.origin("mm1", settings) == file
  settings.mark.size = 4
  assert named.origin("mm1", settings) != file
  # Whole pixels were and are told as they are.
  settings.readout = "argmax"
  assert named.origin("mm1", settings) == file


@pytest.mark.parametrize(
  "scale, on_pixel, same", [(1, True, True), (2, True, False), (2, False, True)]
)
def test_so_have_those_counted_from_the_middle_of_a_learned_mark_that_is_enlarged_evenly(
  predictor, tmp_path, scale, on_pixel, same
):
  model = tiny_model.config()
  params = Perturber(hidden_width=6).init(jax.random.key(0), jnp.zeros(16))["params"]
  mark = mark_files.save(
    tmp_path / "mark.safetensors", params, model=model, size=5, scale=scale, on_pixel=on_pixel
  )
  settings = base.get_config().evaluate
  settings.weights = predictor
  settings.mark.update(kind="learned", file=str(mark))
  files = f"{whole_files.sha256(predictor)} {whole_files.sha256(mark)}"
  assert (named.origin("mm1", settings) == hashlib.sha256(files.encode()).hexdigest()) is same
  # The same where the mark lies beside the predictor.
  told = dict(kind="learned", hidden_width=6, size=5, scale=scale, on_pixel=on_pixel)
  both = {"model": model, "mark": told}
  settings.weights = _saved(tmp_path / "both.safetensors", both)
  settings.mark.kind = ""
  assert (named.origin("mm1", settings) == whole_files.sha256(settings.weights)) is same
