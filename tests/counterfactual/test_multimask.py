import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_predictors as toys

from cwm_jax.counterfactual import masks, multimask, perturb
from cwm_jax.types import InputError, Prediction

GRID, PATCH, HW = (6, 8), 4, (24, 32)


def _question(num_masks=4, points=((10.5, 8.5), (20.5, 12.5), (3.5, 20.5)), visible=12):
  keys = jax.random.split(jax.random.key(0))
  frames = jax.random.normal(keys[0], (2, *HW, 3))
  sampled = masks.sample_masks(keys[1], GRID, visible, (num_masks,))
  n = len(points)
  return (
    jnp.broadcast_to(frames, (n, *frames.shape)),
    jnp.broadcast_to(sampled, (n, *sampled.shape)),
    jnp.array(points),
  )


def _noisy(frames, mask):
  """A predictor whose answer depends on everything it sees, and on hidden patches in frame 2."""
  shown = toys.shifted_by(1, 2)(frames, mask).image
  context = jnp.mean(jnp.where(shown == 0, frames[:, 1], 0.0), axis=(1, 2), keepdims=True)
  answer = jnp.where(shown != 0, shown * (1.5 + context) + jnp.sin(3 * shown), 0.0)
  return Prediction(answer)


def _respond(frames, sampled, points, masks_at_once=None, order="release", average="hidden"):
  n, m = sampled.shape[:2]
  clean = multimask.clean_predictions(_noisy, frames, sampled, jnp.ones(n, bool), chunk=3)
  return multimask.respond(
    _noisy,
    perturb.WhiteGaussian(2.0, 1.5),
    frames,
    sampled,
    clean,
    points,
    masks_at_once=masks_at_once or m,
    order=order,
    average=average,
  )


@pytest.mark.parametrize("order", multimask.ORDERS)
@pytest.mark.parametrize("average", multimask.AVERAGES)
def test_many_masks_at_once_equal_a_plain_loop_over_masks(order, average):
  frames, sampled, points = _question()
  got = _respond(frames, sampled, points, order=order, average=average)
  mark = perturb.WhiteGaussian(2.0, 1.5)
  for n in range(3):
    signed, sizes, times, peaks = 0.0, 0.0, np.zeros(HW), []
    # A white mark's response is as strong in all channels, and not dark.
    size_of = lambda d: np.maximum(d.sum(-1), 0) if order == "matched" else np.abs(d).sum(-1)  # noqa: E731
    for m in range(4):
      first = mark(frames[n, 0], points[n])
      marked = _noisy(jnp.stack([first, frames[n, 1]])[None], sampled[n, m][None]).image[0]
      diff = np.asarray(marked - _noisy(frames[n][None], sampled[n, m][None]).image[0])
      signed, sizes = signed + diff, sizes + size_of(diff)
      times += np.kron(np.asarray(sampled[n, m, 1]), np.ones((PATCH, PATCH)))
      peaks.append(size_of(diff).max())
    times = np.maximum(times, 1) if average == "hidden" else np.full(HW, 4.0)
    want = sizes / times if order == "paper" else size_of(signed / times[..., None])
    np.testing.assert_allclose(got.heat[n], want, atol=1e-5)
    np.testing.assert_allclose(got.peak[n], np.mean(peaks), rtol=1e-5)


def test_groups_of_masks_give_the_sums_of_all_at_once():
  question = _question()
  whole, parts = _respond(*question), _respond(*question, masks_at_once=2)
  np.testing.assert_allclose(parts.heat, whole.heat, atol=1e-5)
  np.testing.assert_allclose(parts.peak, whole.peak, rtol=1e-5)


def test_a_destination_that_is_often_revealed_is_not_held_back_by_the_hidden_average():
  # Two equal destinations; the patch of the second is hidden in one mask of four only.
  total = jnp.zeros((1, *HW)).at[0, 2, 2].set(4.0).at[0, 2, 10].set(1.0)
  sampled = jnp.ones((1, 4, 2, *GRID), bool).at[:, :, 0].set(False)
  sampled = sampled.at[0, 1:, 1, 0, 2].set(False)
  average = lambda how: multimask.average_over_masks(  # noqa: E731
    total, jnp.ones(1), sampled, order="paper", average=how
  ).heat[0]
  assert average("hidden")[2, 2] == average("hidden")[2, 10] == 1.0
  assert average("release")[2, 2] == 1.0 and average("release")[2, 10] == 0.25


def test_a_pixel_that_is_never_hidden_has_no_response():
  frames, sampled, points = _question()
  sampled = sampled.at[:, :, 1, 2, 3].set(False)
  heat = np.asarray(_respond(frames, sampled, points).heat)
  assert (heat[:, 8:12, 12:16] == 0).all() and np.isfinite(heat).all() and heat.max() > 0


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 100])
def test_chunks_of_any_size_give_what_all_at_once_gives(chunk):
  x = jnp.arange(7.0)
  got = multimask.map_chunks(lambda v: (v**2, v[:, None] + 1), x, jnp.ones(7, bool), chunk=chunk)
  np.testing.assert_array_equal(got[0], x**2)
  np.testing.assert_array_equal(got[1], x[:, None] + 1)


def test_a_chunk_of_padding_is_not_computed():
  seen = []

  def fn(v):
    jax.debug.callback(lambda batch: seen.append(np.asarray(batch).tolist()), v)
    return v * 2

  valid = jnp.arange(8) < 3
  got = jax.jit(lambda x: multimask.map_chunks(fn, x, valid, chunk=2))(jnp.arange(8.0) + 1)
  jax.effects_barrier()
  assert sorted(seen) == [[1.0, 2.0], [3.0, 4.0]]
  np.testing.assert_array_equal(got[:3], [2.0, 4.0, 6.0])


def test_gradients_reach_the_mark_through_the_marked_pass_only():
  frames, sampled, points = _question()

  def total(amplitude, keep):
    mark = perturb.additive(lambda token, point: jnp.full((*HW, 3), amplitude))
    clean = multimask.clean_predictions(
      lambda f, m: Prediction(_noisy(f * keep, m).image),
      frames,
      sampled,
      jnp.ones(3, bool),
      chunk=9,
    )
    return multimask.respond(
      _noisy,
      mark,
      frames,
      sampled,
      clean,
      points,
      masks_at_once=2,
      order="release",
      average="hidden",
    ).heat.sum()

  by_amplitude, by_clean = jax.grad(total, argnums=(0, 1))(0.1, 1.0)
  assert by_amplitude != 0 and np.isfinite(by_amplitude)
  assert by_clean == 0


def test_a_mark_that_reads_tokens_gets_the_token_of_its_patch_under_each_mask():
  frames, sampled, points = _question(num_masks=2, points=((10.5, 8.5), (31.9, 23.9)))
  tokens = jnp.arange(2 * 2 * 6 * 8 * 1.0).reshape(2, 2, 6, 8, 1)
  mark = perturb.additive(lambda token, point: jnp.full((*HW, 3), token[0]))
  marked = multimask.mark_frames(mark, frames[:, 0] * 0, tokens, points)
  np.testing.assert_array_equal(
    marked[:, :, 0, 0, 0], [tokens[0, :, 2, 2, 0], tokens[1, :, 5, 7, 0]]
  )


def test_a_larger_budget_makes_larger_chunks_up_to_what_is_of_use():
  plan = lambda mib, **k: multimask.plan(10, pass_bytes=2**20, memory_budget=mib * 2**20, **k)  # noqa: E731
  assert plan(35) == multimask.Plan(clean=35, points=3, masks=10)
  assert plan(7) == multimask.Plan(clean=7, points=1, masks=5)
  assert plan(1) == multimask.Plan(clean=1, points=1, masks=1)
  assert plan(1000, max_passes=64) == multimask.Plan(clean=64, points=6, masks=10)
  with pytest.raises(InputError, match="memory budget"):
    plan(0.5)


def test_the_measured_bytes_of_a_pass_leave_parameters_out_and_grow_with_the_image():
  big = jnp.ones((3, 4096))

  def predict(frames, mask):
    wide = jnp.tanh(frames[:, 0] @ big)
    return Prediction(wide[..., :3])

  small = multimask.measure_pass_bytes(predict, (8, 8), (2, 2))
  large = multimask.measure_pass_bytes(predict, (16, 16), (4, 4))
  # tanh reads and writes [h, w, 4096]; the estimate is twice that.
  assert small == 2 * 2 * 4 * 8 * 8 * 4096
  assert large == 4 * small


def test_unknown_averages_are_refused_in_a_sentence():
  with pytest.raises(InputError, match="order is 'mean'"):
    multimask.check_averaging("mean", "hidden")
  with pytest.raises(InputError, match="average is 'paper'"):
    multimask.check_averaging("release", "paper")
