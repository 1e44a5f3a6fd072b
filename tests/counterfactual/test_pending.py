"""Answers are on their way to the host while the next question is put."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import toy_predictors as toys

from cwm_jax.counterfactual import pending
from cwm_jax.flow_tracker import FlowNetworkTracker
from cwm_jax.tracker import Tracker
from cwm_jax.types import FlowEstimate, PointFlow


class _Leaf:
  """An array on a device that tells when it is copied and when it is waited for."""

  def __init__(self, value, name, events):
    self._value, self._name, self._events = value, name, events

  def copy_to_host_async(self):
    self._events.append(f"copy {self._name}")

  def __array__(self, dtype=None, copy=None):
    self._events.append(f"wait {self._name}")
    return self._value


def test_each_part_is_copied_before_the_next_one_is_put_and_none_is_waited_for():
  events = []

  def parts():
    for number in range(2):
      events.append(f"put {number}")
      leaf = _Leaf(np.full(3, number, np.float32), number, events)
      xy = _Leaf(np.full((3, 2), number, np.float32), number, events)
      yield np.array([number, 2 + number]), PointFlow(xy, leaf, leaf)

  asked = pending.begin(parts(), 4)
  assert events == ["put 0"] + ["copy 0"] * 3 + ["put 1"] + ["copy 1"] * 3
  np.testing.assert_array_equal(asked.fetch().confidence, [0, 1, 0, 1])
  assert events[8:] == ["wait 0"] * 3 + ["wait 1"] * 3


def _still(frames):
  return FlowEstimate(jnp.zeros((*frames.shape[:1], *frames.shape[2:4], 2)))


def _tracker(num_masks):
  sizes = dict(image_hw=(16, 24), patch=4, mask_ratio=0.75)
  return Tracker(toys.shifted_by(3, 5), **sizes, num_masks=num_masks)


@pytest.mark.parametrize(
  "build",
  [
    pytest.param(lambda: _tracker(2), id="fixed masks"),
    pytest.param(lambda: _tracker("adaptive"), id="adaptive masks"),
    pytest.param(lambda: FlowNetworkTracker(_still), id="flow network"),
  ],
)
def test_every_kind_of_tracker_has_its_answers_copied_ahead(build, monkeypatch):
  copied = []
  kind = type(jnp.zeros(1))
  copy = kind.copy_to_host_async
  monkeypatch.setattr(
    kind, "copy_to_host_async", lambda self: (copied.append(self.shape), copy(self))[1]
  )
  engine = build()._engine
  image = np.zeros((20, 30, 3), np.uint8)
  pair = (engine.prepare(image), engine.prepare(image))
  points = np.full((2, 2), 9.5, np.float32)
  asked = engine.ask([pair], np.zeros(2, int), points, (20, 30))
  ((_, answer),) = asked.parts
  assert copied == [value.shape for value in answer]
  assert asked.fetch().xy.shape == (2, 2)
