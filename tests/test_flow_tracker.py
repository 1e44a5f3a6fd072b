"""Flow networks with the methods of a tracker: exact on known motion, strict in what they take."""

from __future__ import annotations

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tapvid_clips import write_clip

from cwm_jax import evaluate, models
from cwm_jax.configs import base, eval_tapvid
from cwm_jax.flow_tracker import FlowNetworkTracker
from cwm_jax.pretrained import weights
from cwm_jax.tracker import Tracker
from cwm_jax.types import FlowEstimate, InputError

H, W = 24, 40
STEP = np.array([3.0, -2.0], np.float32)


def moved_by_brightness(frames):
  """STEP for every grey level that the frames differ by; a toy whose true flow is known."""
  levels = frames.mean(axis=(2, 3, 4)) * 255
  flow = (levels[:, 1] - levels[:, 0])[:, None, None, None] * STEP
  return FlowEstimate(jnp.broadcast_to(flow, (*frames.shape[:1], *frames.shape[2:4], 2)))


def grey(level):
  return np.full((H, W, 3), level, np.uint8)


@pytest.fixture(scope="module")
def toy():
  return FlowNetworkTracker(moved_by_brightness)


def test_points_go_where_the_flow_leads_and_are_hidden_outside(toy):
  points = np.array([[10.25, 12.5], [38.5, 12.5], [20.5, 1.5]], np.float32)
  found = toy.flow(grey(7), grey(8), points)
  np.testing.assert_allclose(found.xy, points + STEP, atol=1e-4)
  # Back from outside the frame there is no flow: 3.6 pixels are within the threshold of 6, so it is
  # the frame's border that hides the second and the third.
  np.testing.assert_array_equal(found.visible, [True, False, False])
  np.testing.assert_allclose(found.confidence, [1, 0, 0], atol=1e-4)


def test_a_video_is_followed_from_each_querys_own_frame(toy):
  video = [grey(level) for level in (5, 6, 8, 9)]
  queries = np.array([[0, 14.5, 8.5], [1, 20.5, 20.5]], np.float32)
  tracks = toy.track(iter(video), queries)
  np.testing.assert_allclose(
    tracks.xy[0], [[8.5, 14.5] + k * STEP for k in (0, 1, 3, 4)], atol=1e-3
  )
  np.testing.assert_allclose(
    tracks.xy[1, 1:], [[20.5, 20.5] + k * STEP for k in (0, 2, 3)], atol=1e-3
  )
  np.testing.assert_array_equal(tracks.visible, [[1, 1, 1, 1], [0, 1, 1, 1]])


def test_dense_flow_and_pairs_say_what_flow_says(toy):
  flow_xy, points_xy = toy.dense_flow(grey(1), grey(2), stride=8)
  assert flow_xy.shape == points_xy.shape == (3, 5, 2)
  np.testing.assert_allclose(flow_xy, np.broadcast_to(STEP, flow_xy.shape), atol=1e-4)
  pairs = toy.pairs([(grey(1), grey(2)), (grey(1), grey(3))], np.full((2, 1, 2), 12.0))
  np.testing.assert_allclose(pairs.xy[:, 0], [12 + STEP, 12 + 2 * STEP], atol=1e-4)


def test_under_the_releases_protocol_answers_are_bare_indices(toy):
  release = FlowNetworkTracker(moved_by_brightness, protocol="release")
  found = release.flow(grey(7), grey(8), [[10.25, 12.9], [38.5, 12.5]])
  np.testing.assert_allclose(found.xy, [[13, 10], [41, 10]], atol=1e-4)
  np.testing.assert_array_equal(found.visible, [True, True])


def test_what_does_not_come_back_is_hidden_and_half_as_sure_at_the_threshold():
  def one_way(frames):
    found = moved_by_brightness(frames).flow_xy
    return FlowEstimate(jnp.where(found[..., :1] > 0, found, 0.0))

  length = float(np.hypot(*STEP))
  for threshold, visible in ((length * 1.001, True), (length * 0.999, False)):
    tracker = FlowNetworkTracker(one_way, occlusion_threshold=threshold)
    found = tracker.flow(grey(0), grey(1), [[20.5, 12.5]])
    assert bool(found.visible[0]) is visible
    np.testing.assert_allclose(found.confidence, 0.5, atol=1e-3)
  # Relative: a squared distance of 13 against `share` of the flow's own 13, and 0.5 more.
  for share, visible in ((0.97, True), (0.95, False)):
    tracker = FlowNetworkTracker(one_way, occlusion="relative", occlusion_threshold=share)
    assert bool(tracker.flow(grey(0), grey(1), [[20.5, 12.5]]).visible[0]) is visible


def test_what_cannot_be_is_refused_in_a_sentence(toy):
  with pytest.raises(InputError, match="the occlusion is 'some'; choose one of absolute"):
    FlowNetworkTracker(moved_by_brightness, occlusion="some")
  with pytest.raises(InputError, match="the protocol is 'paper'"):
    FlowNetworkTracker(moved_by_brightness, protocol="paper")
  with pytest.raises(InputError, match="threshold is 0"):
    FlowNetworkTracker(moved_by_brightness, occlusion_threshold=0)
  with pytest.raises(InputError, match="nothing to explain"):
    toy.explain(grey(0), grey(1), [3, 3])
  with pytest.raises(InputError, match="nothing to explain"):
    toy.explaining(grey(0), grey(1), [3, 3])
  with pytest.raises(InputError, match="nothing to ask"):
    toy.ask(lambda: None, grey(0), grey(1), [3, 3])
  with pytest.raises(InputError, match="outside the 40 x 24 frames"):
    toy.flow(grey(0), grey(1), [[50, 3]])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """A tiny network's weights file."""
  config = base.get_config()
  config.flow_network.update(tiny_model.flow_network())
  net = models.build_flow_network(config.flow_network)
  params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 2, 16, 16, 3)))["params"]
  path = tmp_path_factory.mktemp("weights") / "student.safetensors"
  return weights.save(path, params, config.to_dict())


def test_a_weights_file_of_a_flow_network_makes_such_a_tracker(file):
  tracker = Tracker.load(file)
  assert isinstance(tracker, FlowNetworkTracker)
  video = np.random.default_rng(0).integers(0, 256, (2, 19, 30, 3), dtype=np.uint8)
  found = tracker.flow(*video, [[4.5, 5.5]])
  net, params, _ = weights.load_model(file)
  frames = jnp.asarray(video[None] / 255.0, jnp.float32)
  want = jax.jit(net.apply)({"params": params}, frames).flow_xy[0, 5, 4]
  np.testing.assert_allclose(found.xy[0], np.add(want, [4.5, 5.5]), atol=1e-4)
  with pytest.raises(InputError, match="not asked by marks"):
    Tracker.load(file, mark={"kind": "square"})


@pytest.mark.parametrize(
  "settings, sentence",
  [
    (dict(iterations=-1), "cannot be run for -1 iterations; give a whole number, 0 or more"),
    (dict(iterations=1.5), "cannot be run for 1.5 iterations"),
    (dict(dtype="float16"), "dtype is 'float16'; choose one of float32, bfloat16"),
    (dict(order="paper"), "has no setting 'order'; it has protocol, .*dtype and iterations"),
    (dict(average="hidden"), "has no setting 'average'"),
  ],
  ids=str,
)
def test_what_a_flow_network_cannot_have_is_refused_as_it_is_loaded(file, settings, sentence):
  with pytest.raises(InputError, match=sentence):
    Tracker.load(file, **settings)


def test_a_dtype_that_a_predictor_cannot_have_is_refused_as_it_is_loaded(tmp_path):
  config = {"model": tiny_model.config()}
  params = command_line.random_params(config)
  path = weights.save(tmp_path / "predictor.safetensors", params, config)
  for name in ("dtype", "attention_dtype"):
    with pytest.raises(InputError, match=f"model.{name} is 'float16'; choose one of float32"):
      Tracker.load(path, **{name: "float16"})


def test_the_evaluation_job_takes_a_flow_network_by_its_file(file, tmp_path):
  write_clip(tmp_path / "clips" / "one", frames=3, hw=(32, 48))
  config = eval_tapvid.get_config()
  config.evaluate.update(
    tapvid=str(tmp_path / "clips"), trackers=(str(file), "zero"), protocols=("first",),
    overlays=0, scenes=0,
  )  # fmt: skip
  numbers = evaluate.run(config, tmp_path / "out")["tapvid/first"]
  assert np.isfinite(numbers["student"]["pooled/average_distance"])
  assert (tmp_path / "out" / "answers" / "first" / "student" / "one.npz").is_file()
  config.evaluate.trackers = ("mm2",)
  config.evaluate.weights = str(file)
  with pytest.raises(InputError, match="mm2 asks a predictor, and .* is a flow network"):
    evaluate.run(config, tmp_path / "again")
  config.evaluate.trackers = ("none",)
  with pytest.raises(InputError, match="no tracker 'none'; choose mm<N>"):
    evaluate.run(config, tmp_path / "third")
