import numpy as np
import pytest
import toy_predictors as toys

from cwm_jax.counterfactual import adaptive, many
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError


def _moving_video():
  """Frame 1 of noise, and frame 2 that is frame 1 moved by (dy 2, dx 4), size 48 x 64."""
  first = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
  return np.stack([first, np.roll(first, (2, 4), axis=(0, 1))])


def _asker(*, mark=None, **named):
  return Tracker(
    toys.shifted_by(2, 4),
    image_hw=(48, 64),
    patch=8,
    mark=mark or {"kind": "gaussian", "amplitude": 1.0, "sigma": 1.0},
    readout="window",
    mask_ratio=0.75,
    **named,
  )


def test_adaptive_masks_answer_as_fixed_ones_do_with_fewer_passes():
  points = np.random.default_rng(1).uniform(8, 36, (2, 20, 2)).astype(np.float32)
  video = _moving_video()
  adaptive_tracker, fixed = _asker(num_masks="adaptive"), _asker(num_masks=16)
  pairs = np.stack([video, video])
  found, known = adaptive_tracker.pairs(pairs, points), fixed.pairs(pairs, points)
  # Few masks may have shown the same neighbour of a destination at a patch's border every time,
  # and with it a part of the response.
  for wanted in (known.xy, points + (4, 2)):
    error = np.linalg.norm(found.xy - wanted, axis=-1)
    assert np.mean(error < 0.3) >= 0.95 and error.max() < 2.0
  assert found.visible.all()
  assert 40 * 4 <= adaptive_tracker.passes.marked < fixed.passes.marked == 40 * 16
  assert fixed.passes.clean == 2 * 16


def test_a_rule_of_adaptive_masks_is_followed():
  rule = adaptive.Rule(bank=6, first=1, least=3, most=3)
  asker = _asker(num_masks=rule)
  asker.flow(*_moving_video(), [[20.0, 20.0], [30.0, 10.0]])
  assert asker.passes.marked == 2 * 3


def test_adaptive_masks_read_the_mark_s_own_colour_unless_told_otherwise():
  video, points = _moving_video(), [[20.0, 20.0], [30.0, 10.0]]
  # What a red square adds is of another colour at every pixel.
  square = {"kind": "square", "size": 6}
  told, other, plain = (
    _asker(num_masks="adaptive", mark=square, **named).flow(*video, points).confidence
    for named in (dict(order="matched"), dict(order="release"), {})
  )
  np.testing.assert_array_equal(plain, told)
  assert np.abs(plain - other).max() > 1e-3


@pytest.mark.parametrize(
  ("named", "said"),
  [
    (dict(num_masks="most"), "adaptive"),
    (dict(num_masks="adaptive", zoom=1), "zoom"),
    (dict(num_masks="adaptive", protocol="release"), "release"),
    (dict(num_masks=adaptive.Rule(bank=2)), "bank"),
  ],
)
def test_adaptive_masks_that_cannot_be_are_refused(named, said):
  with pytest.raises(InputError, match=said):
    _asker(**named)


def test_a_grid_asked_with_many_marks_is_that_asked_one_by_one():
  asker = _asker(num_masks=12)
  video = _moving_video()
  one, where = asker.dense_flow(*video, stride=4)
  before = asker.passes
  many, same = asker.dense_flow(*video, stride=4, marks=6)
  after = asker.passes
  np.testing.assert_array_equal(where, same)
  np.testing.assert_allclose(many[2:-3, 2:-3], one[2:-3, 2:-3], atol=0.5)
  assert before.marked == 12 * 12 * 16 and after.marked - before.marked == 12 * 12 * 16 // 6
  voted, _ = asker.dense_flow(*video, stride=4, votes=0.5)
  assert np.abs(voted - one).max() > 0
  np.testing.assert_allclose(voted[2:-3, 2:-3], one[2:-3, 2:-3], atol=0.5)
  with pytest.raises(InputError, match="marks"):
    asker.dense_flow(*video, stride=16, marks=13)
  for named in (dict(zoom=1), dict(protocol="release")):
    with pytest.raises(InputError, match="whole frames: no zoom, no protocol 'release'"):
      _asker(num_masks=2, **named).dense_flow(*video, stride=4, marks=6)


def test_a_grid_may_lie_anywhere_but_is_even():
  asker = _asker(num_masks=12)
  grid = np.stack(np.meshgrid(np.arange(12.0, 50, 3), np.arange(9.0, 36, 3)), axis=-1)
  found = asker.flow_grid(*_moving_video(), grid, marks=4)
  assert found.xy.shape == (9, 13, 2) and found.visible.all()
  assert found.confidence.shape == (9, 13) and (found.confidence[2:-2, 2:-2] > 0.5).all()
  np.testing.assert_allclose(found.xy[2:-2, 2:-2], grid[2:-2, 2:-2] + (4, 2), atol=0.5)
  crooked = grid.copy()
  crooked[4, 5] += 1
  for points, said in (
    (crooked, "even steps"),
    (np.moveaxis(grid, 0, 1), "even steps"),
    (grid[:, ::-1], "even steps"),
    (grid[::-1], "even steps"),
    (np.full_like(grid, 20), "even steps"),
    (grid.reshape(-1, 2), "rows, columns"),
    (grid + 20, "lies outside"),
  ):
    with pytest.raises(InputError, match=said):
      asker.flow_grid(*_moving_video(), points, marks=4)


def test_neighbours_vote_where_they_are_on_a_grid_that_leaves_a_margin():
  # Cells of 5 pixels fill 45 of 48 rows and 60 of 64 columns.
  asker = _asker(num_masks=12)
  motion, _ = asker.dense_flow(*_moving_video(), stride=5, marks=3, votes=2.0)
  error = np.linalg.norm(motion[3:-3, 3:-3] - (4, 2), axis=-1)
  assert np.median(error) < 0.1 and error.max() < 0.5


def test_a_grid_that_memory_does_not_hold_is_asked_in_parts_between_each_other():
  whole, parts = _asker(num_masks=12), _asker(num_masks=12)
  parts._engine._memory_budget = 200 * many.bytes_a_point((48, 64))
  known, where = whole.dense_flow(*_moving_video(), stride=2, marks=4)
  found, same = parts.dense_flow(*_moving_video(), stride=2, marks=4)
  np.testing.assert_array_equal(where, same)
  inner = (slice(4, -6), slice(4, -6))
  np.testing.assert_allclose(found[inner], known[inner], atol=0.5)
  # 768 points of 24 rows: every second row and column are 12 x 16, which fits.
  assert len(many.parts((24, 32), 200)) == 4
  assert parts.passes.clean == 4 * whole.passes.clean == 4 * 12


def test_a_program_may_ask_about_several_points():
  points = np.array([[4.0, 6.0], [60.0, 40.0]], np.float32)
  double = lambda predict_fn, frames, masks, point_xy, *, patch: 2 * point_xy  # noqa: E731
  np.testing.assert_allclose(_asker().ask(double, *_moving_video(), points), 2 * points)
