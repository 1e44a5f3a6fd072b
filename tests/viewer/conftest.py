"""A viewer about a clip whose motion is known, over a predictor of a few lines."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import toy_predictors as toys

from cwm_jax import viz
from cwm_jax.tracker import Tracker
from cwm_jax.types import Tracks
from cwm_jax.viewer import command
from cwm_jax.viewer.answers import Answers
from cwm_jax.viewer.footage import Footage

MASKS, FRAMES, SHIFT_XY = 4, 6, (2, 1)


def drifting(count=FRAMES, hw=(24, 32)):
  """A picture that wraps round, moved by SHIFT_XY a frame."""
  coarse = np.random.default_rng(5).integers(0, 256, (hw[0] // 2, hw[1] // 2, 3), np.uint8)
  first = viz.resized(coarse, hw)
  return np.stack(
    [np.roll(first, (t * SHIFT_XY[1], t * SHIFT_XY[0]), (0, 1)) for t in range(count)]
  )


def truth(t, points_xy):
  """The true tracks; hidden in the last frame."""
  away = (np.arange(FRAMES) - t)[None, :, None] * np.array(SHIFT_XY)
  visible = np.ones((len(points_xy), FRAMES), bool)
  visible[:, -1] = False
  return Tracks((points_xy[:, None] + away).astype(np.float32), visible, visible.astype(np.float32))


@pytest.fixture(scope="session")
def toy_tracker():
  mark = {"kind": "gaussian", "amplitude": 2.0, "sigma": 1.0}
  return Tracker(
    toys.matching, image_hw=(24, 32), patch=4, num_masks=MASKS, mark=mark, readout="window"
  )


@pytest.fixture(scope="session")
def answers(toy_tracker):
  # The clip is told to be twice as large as the frames that are kept of it.
  return Answers(Footage("drift.mp4", drifting(), (48, 64), 0, 10.0, truth), toy_tracker)


@pytest.fixture
def server(answers):
  made = command.make_server(answers, None)
  thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
  thread.start()
  yield made
  made.shutdown()
  made.server_close()
  thread.join(10)
