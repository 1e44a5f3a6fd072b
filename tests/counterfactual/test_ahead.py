"""Programs compiled before the first question are those that its answer runs."""

from __future__ import annotations

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_predictors as toys

from cwm_jax.flow_tracker import FlowNetworkTracker
from cwm_jax.tracker import Tracker
from cwm_jax.types import FlowEstimate, InputError


@contextmanager
def compilations():
  """Fills a list with the seconds of each backend compilation meanwhile."""
  heard = []

  def hear(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      heard.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(hear)
  try:
    yield heard
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)


def _video(count, hw=(20, 30)):
  return np.random.default_rng(0).integers(0, 256, (count, *hw, 3), dtype=np.uint8)


def _points(*shape):
  return np.random.default_rng(1).uniform(1, 19, (*shape, 2)).astype(np.float32)


def _tracker(**named):
  # A predictor of its own, so that no other test has had its programs compiled.
  predict = lambda frames, mask: toys.shifted_by(3, 5)(frames, mask)  # noqa: E731
  sizes = dict(image_hw=(16, 24), patch=4, mask_ratio=0.75, num_masks=2)
  return Tracker(predict, **sizes | named)


def _brightening(frames):
  levels = frames.mean(axis=(2, 3, 4))
  flow = (levels[:, 1] - levels[:, 0])[:, None, None, None] * jnp.ones(2)
  return FlowEstimate(jnp.broadcast_to(flow, (*frames.shape[:1], *frames.shape[2:4], 2)))


@pytest.mark.parametrize(
  "named",
  [
    pytest.param({}, id="fixed masks"),
    pytest.param(dict(zoom=1), id="zoom"),
    pytest.param(dict(zoom=1, protocol="release"), id="release"),
    pytest.param(dict(num_masks="adaptive"), id="adaptive masks"),
  ],
)
def test_after_compile_the_first_question_compiles_nothing(named):
  tracker, video = _tracker(**named), _video(2)
  with compilations() as ahead:
    programs = tracker.compile((20, 30), points=1)
  assert len(programs) == len(ahead) == 2 + named.get("zoom", 0)
  assert tracker.passes == (0, 0)
  with compilations() as first:
    asked = tracker.flow(*video, _points(1))
  assert first == []
  plain = _tracker(**named).flow(*video, _points(1))
  for ours, theirs in zip(asked, plain):
    np.testing.assert_array_equal(ours, theirs)
  # It is the number of points that was told: others have programs of their own.
  with compilations() as others:
    tracker.flow(*video, _points(9))
  assert len(others) > 0


def test_any_number_of_points_of_any_number_of_pairs_can_be_compiled_for():
  tracker = _tracker()
  tracker.compile((20, 30))
  tracker.compile((20, 30), pairs=3)
  with compilations() as heard:
    for count in (1, 12, 40):
      tracker.flow(*_video(2), _points(count))
    # Frames of any size, and queries that begin in several of them.
    tracker.pairs(np.stack([_video(2, (24, 20))] * 3), _points(3, 4))
    tracker.track(_video(4), [[0, 5, 5], [1, 6, 6], [2, 7, 7]])
  assert heard == []


def test_flow_networks_are_compiled_for_a_size_of_frame():
  tracker, video = FlowNetworkTracker(_brightening), _video(2)
  with compilations() as ahead:
    assert len(tracker.compile((20, 30), points=20)) == len(ahead) == 2
  with compilations() as first:
    asked = tracker.flow(*video, _points(20))
  assert first == []
  np.testing.assert_array_equal(
    asked.xy, FlowNetworkTracker(_brightening).flow(*video, _points(20)).xy
  )


def test_an_explanation_that_grows_mask_by_mask_compiles_three_programs():
  tracker, video = _tracker(num_masks=5), _video(2)
  with compilations() as heard:
    assert len(list(tracker.explaining(*video, [9.5, 9.5]))) == 5
  assert len(heard) == 3  # clean pass, marked pass, answer


@pytest.mark.parametrize("named", [dict(points=0), dict(pairs=0), dict(video_hw=(0, 30))])
def test_sizes_that_cannot_be_are_refused(named):
  with pytest.raises(InputError, match="1 or more"):
    _tracker().compile(**dict(video_hw=(20, 30)) | named)
