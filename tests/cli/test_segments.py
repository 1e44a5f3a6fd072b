"""`cwm-jax segments`: the program's answers about the points that are asked."""

from __future__ import annotations

import json

import command_line
import numpy as np
import pytest

from cwm_jax import viz
from cwm_jax.counterfactual import segments
from cwm_jax.data import images


def test_segments_writes_what_the_program_says_at_the_pictures_size(
  capsys, tmp_path, frame_paths, weights_path
):
  from cwm_jax.tracker import Tracker

  argv = ["segments", frame_paths[0], "--at", "20,12", "--weights", weights_path, "--masks", 1]
  code, out, err = command_line.run(capsys, *argv, "--out", tmp_path, "--json")
  assert (code, err) == (0, "")
  assert json.loads(out)["points"] == [[20, 12]]
  saved = np.load(tmp_path / "segments.npz")
  frame = images.read_image(frame_paths[0])
  tracker = Tracker.load(weights_path, num_masks=1)
  along = tracker.ask(segments.moves_along, frame, frame, [20, 12])
  np.testing.assert_allclose(saved["along"][0], viz.resized(along, (40, 56)), atol=1e-5)
  assert images.read_image(tmp_path / "segments.png").shape[1] > 420


def test_an_interrupt_keeps_the_points_up_to_there(
  capsys, tmp_path, frame_paths, weights_path, monkeypatch
):
  from cwm_jax.tracker import Tracker

  asked, ask = [], Tracker.ask

  def interrupted(self, *arguments, **named):
    asked.append(arguments)
    if len(asked) == 3:
      raise KeyboardInterrupt
    return ask(self, *arguments, **named)

  monkeypatch.setattr(Tracker, "ask", interrupted)
  (tmp_path / "p.csv").write_text("x,y\n5,6\n20,12\n30,9\n")
  argv = ["segments", frame_paths[0], "--points", tmp_path / "p.csv", "--weights", weights_path]
  code, _, err = command_line.run(capsys, *argv, "--masks", 1, "--out", tmp_path / "o")
  assert code == 130 and "the first 2 points' are in" in err
  saved = np.load(tmp_path / "o" / "segments.npz")
  np.testing.assert_array_equal(saved["points_xy"], [[5, 6], [20, 12]])
  assert saved["along"].shape == (2, 40, 56)


@pytest.mark.parametrize(
  "more, told",
  [
    (["--at", "60,5"], "(x=60, y=5) lies outside the 56 x 40 frames"),
    (["--points", "gone.csv"], "gone.csv cannot be read"),
  ],
)
def test_a_point_that_cannot_be_asked_is_one_sentence(
  capsys, tmp_path, frame_paths, weights_path, more, told
):
  argv = ["segments", frame_paths[0], "--weights", weights_path, "--out", tmp_path, *more]
  code, _, err = command_line.run(capsys, *argv)
  assert code == 2 and told in err and err.count("\n") == 1
