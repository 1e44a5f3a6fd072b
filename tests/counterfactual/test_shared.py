import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_predictors as toys

from cwm_jax.counterfactual import compiled, engine, masks, multimask, perturb, shared
from cwm_jax.types import Prediction

GRID, PATCH, HW = (6, 8), 4, (24, 32)


class Counted:
  """A predictor that counts the passes asked of it, as they are run."""

  def __init__(self, predict=None):
    self.predict, self.passes = predict or toys.shifted_by(3, 5), 0

  def __call__(self, frames, mask):
    jax.debug.callback(lambda batch: self._add(len(batch)), mask)
    return self.predict(frames, mask)

  def _add(self, count):
    self.passes += count


def _in_place(predict, frames, sampled):
  flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
  m = sampled.shape[1]
  return predict(jnp.repeat(frames, m, axis=0), flat(sampled))


def _with_tokens(frames, mask):
  """Tokens are the means of the predicted patches, so that each pass has others."""
  image = toys.shifted_by(1, 2)(frames, mask).image
  patches = image.reshape(-1, GRID[0], PATCH, GRID[1], PATCH, 3)
  return Prediction(image, jnp.mean(patches, axis=(2, 4)))


@pytest.mark.parametrize("chunk, passes", [(1, 5), (2, 6), (3, 6)])
def test_equal_windows_under_equal_masks_are_predicted_once(chunk, passes):
  keys = jax.random.split(jax.random.key(0))
  frames = jax.random.normal(keys[0], (5, 2, *HW, 3))
  frames = frames.at[jnp.array([1, 3])].set(frames[0])
  sampled = jnp.broadcast_to(masks.sample_masks(keys[1], GRID, 12, (2,)), (5, 2, 2, *GRID))
  # The fourth point's second mask is another one; the fifth is padding that looks like the first.
  sampled = sampled.at[3, 1, 1].set(~sampled[3, 1, 1])
  windows = jnp.array([[0, 1], [0, 1], [0, 2], [0, 1], [0, 1]], jnp.int32)
  # In the windows that the first two points share, each lies in a patch of its own.
  points = jnp.array([[1.5, 2.5], [30.0, 23.0], [9.0, 9.0], [13.0, 2.0], [5.0, 5.0]])
  counted = Counted(_with_tokens)

  def predict(f, s):
    clean, place = shared.clean_predictions(
      counted, f, s, windows, jnp.arange(5) < 4, chunk=chunk, points_xy=points
    )
    return shared.own_predictions(clean, place, jnp.arange(4))

  got = jax.jit(predict)(frames, sampled)
  jax.effects_barrier()
  assert counted.passes == passes
  want = _in_place(_with_tokens, frames[:4], sampled[:4])
  want = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), want)
  np.testing.assert_allclose(got.image, want.image, atol=1e-6)
  assert got.tokens.shape == (4, 2, 1, 1, 3)
  mark = perturb.additive(lambda token, point_xy: jnp.broadcast_to(token, (*HW, 3)))
  marked = [
    multimask.mark_frames(mark, frames[:4, 0], tokens, points[:4])
    for tokens in (got.tokens, want.tokens)
  ]
  np.testing.assert_allclose(*marked, atol=1e-6)


def test_masks_of_another_number_are_not_taken_for_each_other():
  windows = jnp.zeros((3, 1), jnp.int32)
  sampled = jnp.zeros((3, 2, 2, 1, 2), bool).at[1, :, 1, 0, 0].set(True).at[2, 0, 1, 0, 0].set(True)
  np.testing.assert_array_equal(shared.first_alike(windows, sampled), [[0, 0], [1, 1], [1, 0]])


def _ask(predict, points_xy, *, plan, zoom, video, protocol="half_pixel"):
  asker = engine.Engine(
    predict,
    perturb.Square(size=1),
    compiled.make_masks(0, grid_hw=GRID, mask_ratio=0.75, num_masks=3, zoom=zoom),
    patch=PATCH,
    memory_budget=None,
    settings=dict(
      order="release",
      average="release",
      readout="argmax",
      inverse_temperature=200.0,
      occlusion_threshold=0.05,
      protocol=protocol,
    ),
  )
  asker.plan = plan
  pair = tuple(asker.prepare(frame) for frame in video)
  points = np.asarray(points_xy, np.float32)
  return asker.ask([pair], np.zeros(len(points), int), points, video[0].shape[:2]).fetch()


@pytest.mark.parametrize("protocol", ["half_pixel", "release"])
def test_points_in_the_same_windows_share_the_clean_passes_of_zoom(protocol):
  video = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
  plan, counted = multimask.Plan(clean=1, points=1, masks=3), Counted()
  # The first window of a square video is the whole of it, for whatever point.
  asked = dict(one=[[10, 12]] * 2, near=[[10, 12], [10, 13]], far=[[10, 12], [30, 30]])
  passes, answers = {}, {}
  for name, points in asked.items():
    counted.passes = 0
    answers[name] = _ask(counted, points, zoom=1, video=video, protocol=protocol, plan=plan)
    jax.effects_barrier()
    passes[name] = counted.passes
    np.testing.assert_array_equal(answers[name].xy[0], answers["one"].xy[0])
  num_masks = 3
  # A clean pass for each mask of the whole frame and of the window; marked ones for each point.
  assert passes["one"] == 2 * num_masks + 2 * 2 * num_masks
  # So too for another point, while the same patches are hidden round the guess.
  assert passes["near"] == passes["one"]
  assert passes["near"] < passes["far"] <= passes["near"] + num_masks


def test_sharing_changes_no_answer_and_order_does_not_matter():
  rng = np.random.default_rng(1)
  video = rng.integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
  points = rng.uniform(6, 34, (13, 2)).astype(np.float32)
  plan = multimask.Plan(clean=4, points=2, masks=3)
  together = _ask(toys.matching, points, zoom=3, video=video, plan=plan)
  order = rng.permutation(13)
  shuffled = _ask(toys.matching, points[order], zoom=3, video=video, plan=plan)
  np.testing.assert_array_equal(shuffled.xy, together.xy[order])
  for point, xy in zip(points[:4], together.xy):
    alone = _ask(toys.matching, point[None], zoom=3, video=video, plan=plan)
    np.testing.assert_array_equal(alone.xy[0], xy)


@pytest.mark.parametrize("protocol", ["half_pixel", "release"])
def test_memory_for_256_points_is_that_for_16(protocol, monkeypatch):
  video = np.random.default_rng(2).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
  temporary = {}

  def measured(name):
    program = getattr(compiled, name)

    def call(*args, **named):
      stats = program.lower(*args, **named).compile().memory_analysis()
      temporary[name, count] = stats.temp_size_in_bytes
      return program(*args, **named)

    return call

  for name in ("ask", "refine"):
    monkeypatch.setattr(compiled, name, measured(name))
  for count in (16, 256):
    points = np.full((count, 2), 20.0)
    plan = multimask.Plan(clean=6, points=2, masks=3)
    _ask(toys.shifted_by(3, 5), points, zoom=1, video=video, protocol=protocol, plan=plan)
  for name in ("ask", "refine"):
    assert 0 < temporary[name, 256] <= 1.2 * temporary[name, 16], temporary
