import sys

import numpy as np
import pytest

from cwm_jax.evals import trackers
from cwm_jax.types import InputError


def _texture(hw=(120, 160), seed=0):
  """Smooth noise whose spectrum can be shifted by fractions of a pixel, [H, W, 3] in 0..1."""
  noise = np.random.default_rng(seed).standard_normal((*hw, 3))
  fy, fx = np.fft.fftfreq(hw[0])[:, None, None], np.fft.fftfreq(hw[1])[None, :, None]
  smooth = np.fft.ifft2(
    np.fft.fft2(noise, axes=(0, 1)) * np.exp(-80 * (fx**2 + fy**2)), axes=(0, 1)
  ).real
  return (smooth - smooth.min()) / np.ptp(smooth)


def _moved(image, dx, dy):
  fy, fx = (
    np.fft.fftfreq(image.shape[0])[:, None, None],
    np.fft.fftfreq(image.shape[1])[None, :, None],
  )
  spectrum = np.fft.fft2(image, axes=(0, 1)) * np.exp(-2j * np.pi * (fx * dx + fy * dy))
  return (np.clip(np.fft.ifft2(spectrum, axes=(0, 1)).real, 0, 1) * 255).round().astype(np.uint8)


POINTS = np.array([[50.5, 60.5], [90.25, 40.75]], np.float32)


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (2.5, 4.25), (-11.3, 7.6)])
def test_phase_correlation_finds_a_translation_to_a_fraction_of_a_pixel(shift):
  image = _texture()
  answer = trackers.PhaseCorrelation().flow(_moved(image, 0, 0), _moved(image, *shift), POINTS)
  np.testing.assert_allclose(answer.xy - POINTS, [shift, shift], atol=0.2)


def test_zero_motion_answers_the_question_itself():
  frame = np.zeros((10, 10, 3), np.uint8)
  np.testing.assert_array_equal(trackers.ZeroMotion().flow(frame, frame, POINTS).xy, POINTS)


@pytest.mark.parametrize("name", ["dis", "farneback", "lk", "dis_chain"])
def test_opencv_trackers_count_pixels_as_the_house_does(name):
  pytest.importorskip("cv2")
  image = _texture()
  answer = trackers.build(name).flow(_moved(image, 0, 0), _moved(image, 2.5, -1.5), POINTS)
  # Half a pixel of disagreement about where a pixel's centre lies would show.
  np.testing.assert_allclose(answer.xy - POINTS, [[2.5, -1.5]] * 2, atol=0.2)
  assert answer.visible.all()


@pytest.mark.parametrize("chain", [False, True])
def test_tracks_begin_at_their_query_and_follow_the_frames(chain):
  image = _texture()
  video = np.stack([_moved(image, 2 * t, t) for t in range(4)])
  queries = [[0, 60.5, 50.5], [2, 40.0, 90.0]]
  tracks = trackers.PhaseCorrelation(chain=chain).track(iter(video), queries)
  np.testing.assert_array_equal(tracks.visible, [[True] * 4, [False, False, True, True]])
  want = np.array([50.5, 60.5]) + np.arange(4)[:, None] * [2, 1]
  np.testing.assert_allclose(tracks.xy[0], want, atol=0.3)
  np.testing.assert_allclose(tracks.xy[1, 3], [92.0, 41.0], atol=0.2)


def test_pairs_are_answered_one_by_one():
  image = _texture()
  still, moved = _moved(image, 0, 0), _moved(image, 4, 0)
  points = np.stack([POINTS, POINTS])
  answer = trackers.PhaseCorrelation().pairs(
    np.stack([np.stack([still, moved]), np.stack([moved, still])]), points
  )
  np.testing.assert_allclose(answer.xy - points, [[[4, 0]] * 2, [[-4, 0]] * 2], atol=0.2)


def test_without_opencv_a_sentence_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "cv2", None)
  for name in ("dis", "lk"):
    with pytest.raises(InputError, match=r"cwm-jax\[baselines\]"):
      trackers.build(name)


def test_an_unknown_baseline_is_refused_with_the_known_names():
  with pytest.raises(InputError, match="zero, phase"):
    trackers.build("raft")
