"""Pictures: colours mean what they say, marks lie where points are, files can be read back."""

from __future__ import annotations

import numpy as np
import pytest

from cwm_jax import viz
from cwm_jax.types import InputError


def _grey(h=64, w=96):
  return np.full((h, w, 3), 100, np.uint8)


def _flow(dx, dy):
  return np.full((1, 1, 2), (dx, dy), np.float32)


@pytest.mark.parametrize(
  "direction, colour",
  [
    # Worked out by hand from the published steps: 15, 6, 4, 11, 13, 6 round the wheel.
    ((1, 0), (255, 0, 0)),
    ((0, 1), (255, 229, 0)),
    ((-1, 0), (0, 209, 255)),
    ((0, -1), (88, 0, 255)),
  ],
)
def test_each_direction_has_its_colour_of_the_wheel(direction, colour):
  found = viz.flow_colours(_flow(*direction), longest=1.0)[0, 0].astype(int)
  assert np.abs(found - colour).max() <= 1


def test_no_flow_is_white_longer_flow_is_stronger_and_too_long_is_darker():
  flow = np.array([[[0, 0], [2, 0], [4, 0], [8, 0]]], np.float32)
  still, half, full, beyond = viz.flow_colours(flow, longest=4.0)[0].astype(int)
  np.testing.assert_array_equal(still, [255, 255, 255])
  np.testing.assert_array_equal(half, [255, 128, 128])
  np.testing.assert_array_equal(full, [255, 0, 0])
  np.testing.assert_array_equal(beyond, [191, 0, 0])


def test_unknown_flow_is_black_and_does_not_set_the_scale():
  flow = np.array([[[np.nan, 0], [3, 0], [np.inf, 1]]], np.float32)
  colours = viz.flow_colours(flow)[0]
  np.testing.assert_array_equal(colours, [[0, 0, 0], [255, 0, 0], [0, 0, 0]])


def test_opposite_directions_never_share_a_colour():
  angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
  flow = np.stack([np.cos(angles), np.sin(angles)], -1)[None].astype(np.float32)
  there = viz.flow_colours(flow, longest=1.0).astype(int)
  back = viz.flow_colours(-flow, longest=1.0).astype(int)
  assert np.abs(there - back).sum(-1).min() > 150


def test_the_wheel_shows_each_direction_at_its_place_on_white_paper():
  wheel = viz.flow_wheel(101)
  np.testing.assert_array_equal(wheel[0, 0], [255, 255, 255])
  assert wheel[50, 98, 0] > 240 and wheel[50, 98, 1] < 40  # right: red
  assert wheel[50, 50].min() > 235  # centre: nearly no flow


def test_heat_grows_from_black_to_light_evenly():
  heat = np.linspace(0, 2, 50, dtype=np.float32)[None]
  lightness = viz.heat_colours(heat).astype(float)[0] @ [0.2126, 0.7152, 0.0722]
  assert lightness[0] < 3 and lightness[-1] > 240
  assert (np.diff(lightness) > 0).all()
  np.testing.assert_array_equal(viz.heat_colours(np.zeros((2, 2), np.float32)).max(), 4)


def test_heat_is_laid_over_the_picture_at_its_own_place():
  heat = np.zeros((8, 8), np.float32)
  heat[6, 1] = 5.0
  mixed = viz.heat_over(_grey(64, 64), heat)
  hot = np.unravel_index(mixed.sum(-1).argmax(), (64, 64))
  assert 48 <= hot[0] < 56 and 8 <= hot[1] < 16
  np.testing.assert_array_equal(mixed[2, 60], [55, 55, 55])


def test_values_on_a_grid_spread_linearly_between_its_points_and_stay_beyond_them():
  x, y = np.meshgrid([2.0, 6.0], [1.0, 3.0, 5.0])
  points = np.stack([x, y], -1).astype(np.float32)
  values = (points * [2.0, -1.0] + 3.0).astype(np.float32)
  image = viz.spread(values, points, (6, 8))
  assert image.shape == (6, 8, 2) and image.dtype == np.float32
  np.testing.assert_allclose(image[2, 3], [2 * 3.5 + 3, -2.5 + 3], rtol=1e-6)
  np.testing.assert_allclose(image[0, 0], [2 * 2 + 3, -1 + 3], rtol=1e-6)


def test_sixteen_tracks_have_sixteen_clearly_different_colours():
  colours = np.array(viz.track_colours(16), int)
  apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(16, dtype=int)
  assert apart.min() > 40


def test_a_visible_point_is_a_disc_centred_on_its_coordinates_and_a_hidden_one_is_hollow():
  points = np.array([[20.0, 30.0], [70.0, 30.0]], np.float32)
  colours = [(255, 0, 0), (255, 0, 0)]
  image = viz.draw_points(
    _grey(), points, visible=np.array([True, False]), colours=colours, radius=6
  )
  red = (image[..., 0] > 200) & (image[..., 1] < 60)
  rows, columns = np.nonzero(red[:, :45])
  assert abs(columns.mean() + 0.5 - 20) < 0.5 and abs(rows.mean() + 0.5 - 30) < 0.5
  assert red[29:31, 19:21].all()  # filled
  assert not red[29:31, 69:71].any() and red[:, 45:].any()  # a ring
  np.testing.assert_array_equal(image[30, 70], [100, 100, 100])


def test_truth_is_a_white_cross_and_unknown_truth_draws_nothing():
  points = np.array([[20.0, 30.0], [70.0, 30.0]], np.float32)
  truth = np.array([[40.0, 12.0], [np.nan, np.nan]], np.float32)
  image = viz.draw_points(_grey(), points, truth_xy=truth, radius=4)
  rows, columns = np.nonzero(image.min(-1) > 240)
  assert abs(columns.mean() + 0.5 - 40) < 0.6 and abs(rows.mean() + 0.5 - 12) < 0.6
  assert columns.max() < 50


def test_drawing_leaves_the_given_image_as_it_was():
  image = _grey()
  viz.draw_points(image, np.array([[20.0, 30.0]], np.float32))
  np.testing.assert_array_equal(image, _grey())


def test_tracks_begin_at_their_query_and_their_tails_fade():
  frames = np.stack([_grey(40, 80)] * 6)
  xy = np.zeros((1, 6, 2), np.float32)
  xy[0, :, 0], xy[0, :, 1] = np.arange(6) * 12 + 10, 20
  drawn = list(viz.draw_tracks(iter(frames), xy, np.ones((1, 6), bool), starts=[2], tail=4))
  assert len(drawn) == 6 and drawn[0].shape == (40, 80, 3)
  np.testing.assert_array_equal(drawn[1], frames[1])
  assert np.abs(drawn[2].astype(int) - 100).max() > 50
  # At frame 5 the tail reaches back to the query at x = 34, and is fainter there.
  change = np.abs(drawn[5].astype(int) - 100).sum(-1)[20]
  assert change[:33].max() == 0
  assert 0 < change[40] < change[60]


def test_tracks_on_enlarged_frames_move_with_the_frames():
  xy = np.full((1, 1, 2), 10.0, np.float32)
  (drawn,) = viz.draw_tracks([_grey(20, 20)], xy, np.ones((1, 1), bool), scale=3)
  rows, columns = np.nonzero(np.abs(drawn.astype(int) - 100).sum(-1) > 100)
  assert drawn.shape == (60, 60, 3)
  assert abs(rows.mean() + 0.5 - 30) < 0.6 and abs(columns.mean() + 0.5 - 30) < 0.6


def test_a_point_far_outside_the_frame_does_no_harm():
  image = viz.draw_points(_grey(), np.array([[-500.0, 4000.0]], np.float32))
  np.testing.assert_array_equal(image, _grey())


def test_a_page_holds_every_picture_unchanged_with_margins_round_it():
  one, two = np.full((30, 50, 3), 10, np.uint8), np.full((40, 20, 3), 77, np.uint8)
  sheet = viz.page([[("one", one), ("two\nlines", two)], [("three", one)]], title="T", note="n")
  assert (sheet == 10).all(-1).sum() >= 2 * 30 * 50
  assert (sheet == 77).all(-1).sum() >= 40 * 20
  border = np.concatenate([sheet[:12].ravel(), sheet[-12:].ravel(), sheet[:, :24].ravel()])
  assert (border == 255).all()


def test_a_png_comes_back_as_it_was(tmp_path):
  from cwm_jax.data.images import read_image

  image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
  np.testing.assert_array_equal(read_image(viz.write_png(tmp_path / "a.png", image)), image)


def test_an_mp4_of_odd_size_plays_with_all_its_frames_and_colours(tmp_path):
  import av

  frames = [np.full((33, 51, 3), (200, 40 * i, 30), np.uint8) for i in range(5)]
  path = viz.write_mp4(tmp_path / "a.mp4", iter(frames), fps=12.5)
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
    assert float(stream.average_rate) == 12.5
    back = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
  assert len(back) == 5 and back[0].shape == (34, 52, 3)
  for frame, got in zip(frames, back):
    assert np.abs(got[16, 25].astype(int) - frame[16, 25]).max() <= 12


def test_pictures_that_cannot_be_written_are_said_in_a_sentence(tmp_path):
  with pytest.raises(InputError, match="cannot write .*No such file"):
    viz.write_png(tmp_path / "no" / "a.png", _grey())
  with pytest.raises(InputError, match="cannot write .*No such file"):
    viz.write_mp4(tmp_path / "no" / "a.mp4", [_grey()], fps=10)
  with pytest.raises(InputError, match="no frames to write"):
    viz.write_mp4(tmp_path / "a.mp4", [], fps=10)
  # More than H.264 can hold, and times that step back.
  with pytest.raises(InputError, match="cannot write .*a.mp4"):
    viz.write_mp4(tmp_path / "a.mp4", [_grey(2, 17_000)], fps=10)
  with pytest.raises(InputError, match="cannot write .*a.mp4"):
    viz.write_mp4(tmp_path / "a.mp4", [_grey()] * 3, fps=10, times_s=[0.0, 1.0, 0.5])
  assert not list(tmp_path.iterdir())
