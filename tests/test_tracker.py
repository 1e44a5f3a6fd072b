import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import toy_predictors as toys

from cwm_jax.counterfactual import compiled, engine, flow, multimask, perturb
from cwm_jax.counterfactual import masks as masks_lib
from cwm_jax.tracker import Tracker
from cwm_jax.types import InputError

GAUSSIAN = {"kind": "gaussian", "amplitude": 0.5, "sigma": 1.0}
MODEL = tiny_model.config(image_hw=(16, 24))


def _video(frames=5, hw=(24, 32), seed=0):
  return np.random.default_rng(seed).integers(0, 256, (frames, *hw, 3), dtype=np.uint8)


def _toy(predict=None, **named):
  named = dict(image_hw=(24, 32), patch=4, num_masks=6, mark=GAUSSIAN) | named
  return Tracker(predict or toys.shifted_by(3, 5), **named)


@pytest.mark.parametrize("point", [[0, 10.5, 8.5], [[10.5, 8.5, 0]], 4.0])
def test_a_point_of_another_shape_is_one_sentence(point):
  tracker, video = _toy(), _video(2)
  with pytest.raises(InputError, match=r"points are \(x, y\)"):
    tracker.explain(*video, point)
  with pytest.raises(InputError, match=r"points are \(x, y\)"):
    tracker.ask(lambda *_, **__: None, *video, point)


@pytest.mark.parametrize("mark", [GAUSSIAN, {"kind": "square", "colour": [0, 255, 0], "size": 1}])
def test_argmax_finds_the_exact_destination_pixel(mark):
  video = _video(2)
  answer = _toy(mark=mark).flow(*video, [[10.5, 8.5], [20.9, 12.1], [3.1, 4.1]])
  np.testing.assert_array_equal(answer.xy, [[15.5, 11.5], [25.5, 15.5], [8.5, 7.5]])
  assert answer.visible.all()


@pytest.mark.parametrize(
  ("readout", "mark"),
  [
    ("soft", {"kind": "square", "colour": [0, 255, 0], "size": 1}),
    ("window", {"kind": "square", "colour": [0, 255, 0], "size": 1}),
    ("window", dict(GAUSSIAN, amplitude=2.0)),
  ],
)
def test_sub_pixel_read_outs_tell_where_in_its_pixel_the_query_lies(readout, mark):
  points = np.array([[10.5, 8.5], [20.9, 12.1], [13.25, 9.75]], np.float32)
  tracker = _toy(readout=readout, mark=mark)
  np.testing.assert_allclose(tracker.flow(*_video(2), points).xy, points + [5, 3], atol=0.1)


def test_the_window_read_out_finds_a_shift_of_half_a_pixel():
  def half(frames, mask):
    first = (jnp.roll(frames[:, 0], 2, axis=2) + jnp.roll(frames[:, 0], 3, axis=2)) / 2
    return toys.hidden_only(first, mask)

  answer = _toy(half, readout="window").flow(*_video(2), [[10.5, 8.5]])
  np.testing.assert_allclose(answer.xy, [[13.0, 8.5]], atol=0.1)


@pytest.mark.parametrize("hw", [(24, 32), (48, 64), (72, 128), (31, 57)])
def test_points_of_any_video_size_go_to_the_predictor_and_back_without_a_shift(hw):
  h, w = hw
  points = np.array([[0.3 * w, 0.4 * h], [0.55 * w, 0.61 * h]], np.float32)
  answer = _toy(readout="window").flow(*_video(2, hw), points)
  # A shift of (5, 3) predictor pixels, in pixels of this video.
  np.testing.assert_allclose(answer.xy - points, [[5 * w / 32, 3 * h / 24]] * 2, atol=0.05)


def test_one_image_pair_gives_what_the_program_gives_in_its_plain_form():
  video, points = _video(2), np.array([[10.5, 8.5], [20.5, 12.5]], np.float32)
  tracker = _toy(readout="soft", order="paper")
  masks = compiled.make_masks(0, grid_hw=(6, 8), mask_ratio=0.9, num_masks=6, zoom=0)[0]
  frames = (jnp.asarray(video, jnp.float32) / 255 - jnp.array([0.485, 0.456, 0.406])) / jnp.array(
    [0.229, 0.224, 0.225]
  )
  want = flow.flow_pair(
    toys.shifted_by(3, 5),
    perturb.build(GAUSSIAN),
    frames,
    masks,
    jnp.asarray(points),
    readout="soft",
    order="paper",
  )
  got = tracker.flow(*video, points)
  np.testing.assert_allclose(got.xy, want.xy, atol=1e-4)
  np.testing.assert_allclose(got.confidence, want.confidence, atol=1e-5)


@pytest.fixture(scope="module")
def network():
  """A real predictor with random weights: (predict_fn, its sizes)."""
  from cwm_jax import models

  model = models.build(MODEL)
  visible = 24 + masks_lib.num_visible_patches((4, 6), 0.75)
  masks = masks_lib.sample_masks(jax.random.key(0), (4, 6), visible - 24, (1,))
  init = jax.jit(model.init, static_argnames="num_visible")
  params = init(jax.random.key(1), jnp.zeros((1, 2, 16, 24, 3)), masks, num_visible=visible)

  def predict(params, frames, mask):
    return model.apply(params, frames, mask, num_visible=visible)

  return jax.tree_util.Partial(predict, params), dict(image_hw=(16, 24), patch=4, mask_ratio=0.75)


def test_a_memory_budget_changes_the_chunks_and_not_the_answers(network):
  predict, sizes = network
  video, points = _video(2, (20, 30)), np.random.default_rng(1).uniform(1, 19, (7, 2))
  # A steeper softmax would make pixels of the heat's last digits.
  sizes = sizes | dict(num_masks=4, readout="soft", inverse_temperature=10.0)
  ask = lambda **k: Tracker(predict, **sizes, **k)  # noqa: E731
  one_pass = multimask.measure_pass_bytes(predict, (16, 24), (4, 6))
  whole, small = ask(memory_budget=2**30), ask(memory_budget=2 * one_pass)
  assert (small._engine.plan.masks, whole._engine.plan.masks) == (2, 4)
  for a, b in zip(whole.flow(*video, points), small.flow(*video, points)):
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_an_answer_does_not_depend_on_the_points_asked_beside_it(network):
  predict, sizes = network
  tracker = Tracker(predict, **sizes, num_masks=3, readout="soft", inverse_temperature=10.0)
  video, points = _video(2, (20, 30)), np.random.default_rng(1).uniform(1, 19, (18, 2))
  together = tracker.flow(*video, points)
  for count in (1, 5):
    alone = tracker.flow(*video, points[:count])
    np.testing.assert_allclose(alone.xy, together.xy[:count], atol=1e-3)
    np.testing.assert_allclose(alone.confidence, together.confidence[:count], atol=1e-5)


def test_more_points_than_the_largest_bucket_are_answered(monkeypatch):
  monkeypatch.setattr(engine, "BUCKETS", (1, 4))
  points = np.random.default_rng(1).integers(2, 20, (11, 2)) + 0.5
  np.testing.assert_array_equal(_toy().flow(*_video(2), points).xy, points + [5, 3])


def test_no_points_at_all_get_an_empty_answer():
  answer = _toy().flow(*_video(2), np.zeros((0, 2)))
  assert answer.xy.shape == (0, 2) and answer.visible.shape == (0,)
  assert _toy().track(_video(3), np.zeros((0, 3))).xy.shape == (0, 3, 2)


def test_the_number_of_compilations_does_not_depend_on_the_number_of_points_in_a_bucket(network):
  predict, sizes = network
  tracker = Tracker(predict, **sizes, num_masks=2)
  video = _video(6, (20, 30))
  compiled = []

  def count(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(seconds)

  points = np.random.default_rng(1).uniform(1, 19, (16, 2))
  tracker.flow(*video[:2], points[:9])
  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    for n in (5, 10, 16):
      tracker.flow(*video[:2], points[:n])
    assert len(compiled) == 0
    # The listener does see a compilation: another bucket is another program.
    tracker.flow(*video[:2], points[:1])
    assert len(compiled) > 0
  finally:
    jax.monitoring.unregister_event_duration_listener(count)


def test_many_pairs_are_answered_as_one_by_one(monkeypatch):
  tracker = _toy(toys.matching)
  rng = np.random.default_rng(2)
  shifts = [(2, -3), (0, 4), (-4, 1), (3, 3), (1, 0)]
  first = _video(5)
  pairs = np.stack([first, np.stack([np.roll(f, s, (0, 1)) for f, s in zip(first, shifts)])], 1)
  points = rng.integers(8, 16, (5, 3, 2)) + 0.5
  want = points + np.array(shifts)[:, None, ::-1]
  np.testing.assert_array_equal(tracker.pairs(pairs, points).xy, want)
  tracker._engine.pairs_at_once = 2
  np.testing.assert_array_equal(tracker.pairs(iter(pairs), points).xy, want)


def test_with_frame_2_exchanged_the_answer_follows_the_wrong_frame():
  tracker = _toy(toys.matching)
  first = _video(2)
  second = np.stack([np.roll(first[0], (2, 3), (0, 1)), np.roll(first[0], (-4, 5), (0, 1))])
  points = np.array([[10.5, 12.5]])
  for frame2, shift in zip(second, [(3, 2), (5, -4)]):
    np.testing.assert_array_equal(tracker.flow(first[0], frame2, points).xy, points + shift)


def test_a_video_is_tracked_from_each_query_frame_on():
  video, queries = _video(4), np.array([[0, 8.5, 10.5], [2, 12.5, 20.5], [2, 4.5, 3.5], [3, 1, 2]])
  tracks = _toy().track(video, queries)
  assert tracks.xy.shape == (4, 4, 2) and tracks.visible.shape == (4, 4)
  np.testing.assert_array_equal(
    tracks.visible,
    [[True] * 4, [False, False, True, True], [False, False, True, True]]
    + [[False, False, False, True]],
  )
  assert (tracks.confidence[~tracks.visible] == 0).all()
  assert ((tracks.confidence >= 0) & (tracks.confidence <= 1)).all()
  # At its own frame a query is itself; after it, every frame is compared with the query's frame.
  np.testing.assert_array_equal(tracks.xy[0], [[10.5, 8.5]] + [[15.5, 11.5]] * 3)
  np.testing.assert_array_equal(tracks.xy[1], [[20.5, 12.5]] * 3 + [[25.5, 15.5]])


def test_frames_that_come_one_by_one_give_what_an_array_gives(network):
  predict, sizes = network
  tracker = Tracker(predict, **sizes, num_masks=2, readout="soft")
  video, queries = _video(4, (20, 30)), np.array([[0, 8.5, 10.5], [1, 12.5, 20.5]])
  consumed = []
  stream = (consumed.append(t) or frame for t, frame in enumerate(video))
  for a, b in zip(tracker.track(video, queries), tracker.track(stream, queries)):
    np.testing.assert_array_equal(a, b)
  assert consumed == [0, 1, 2, 3]


def test_dense_flow_covers_the_frame_with_a_grid_of_cell_centres():
  flow_xy, points_xy = _toy(readout="window").dense_flow(*_video(2), stride=8)
  assert flow_xy.shape == points_xy.shape == (3, 4, 2)
  np.testing.assert_array_equal(points_xy[2, 1], [12.0, 20.0])
  np.testing.assert_allclose(flow_xy[:2, :3], np.broadcast_to([5, 3], (2, 3, 2)), atol=0.05)


def test_explain_holds_every_step_of_the_answer():
  video, tracker = _video(2), _toy()
  e = tracker.explain(*video, [10.5, 8.5])
  np.testing.assert_array_equal(e.to_xy, tracker.flow(*video, [[10.5, 8.5]]).xy[0])
  assert e.masks.shape == (6, 6, 8) and e.visible
  np.testing.assert_allclose(e.mark[8, 10], 0.5, atol=1e-6)
  np.testing.assert_allclose(e.marked[0, 0], video[0, 0, 0] / 255, atol=1e-6)
  hidden = np.kron(e.masks, np.ones((4, 4), bool))
  np.testing.assert_allclose(e.clean[~hidden], np.stack([video[1] / 255] * 6)[~hidden], atol=1e-5)
  np.testing.assert_allclose(e.responses[:, 11, 15], 1.5 * hidden[:, 11, 15], atol=1e-5)
  np.testing.assert_allclose(e.mean[11, 15], 1.5 * hidden[:, 11, 15].any(), atol=1e-5)


@pytest.mark.parametrize("order, average", [("release", "hidden"), ("paper", "release")])
def test_explaining_grows_mask_by_mask_into_the_explanation(order, average):
  video, tracker = _video(2), _toy(readout="soft", order=order, average=average)
  whole = tracker.explain(*video, [10.5, 8.5])
  grown = list(tracker.explaining(*video, [10.5, 8.5]))
  assert [len(e.masks) for e in grown] == [1, 2, 3, 4, 5, 6]
  for name, last, want in zip(whole._fields, grown[-1], whole):
    np.testing.assert_allclose(last, want, atol=1e-5, err_msg=name)
  # After one mask the mean is that mask's own response.
  np.testing.assert_allclose(grown[0].mean, whole.responses[0], atol=1e-5)
  assert grown[0].visible == (whole.responses[0].max() >= 0.05)


def test_chained_and_anchored_tracks_follow_what_is_known():
  first = _video(1)[0]
  video = np.stack([np.roll(first, (3 * t, 2 * t), (0, 1)) for t in range(4)])
  queries = [[0, 4.5, 6.5], [1, 10.5, 12.5]]
  want = np.array([[[6.5, 4.5], [8.5, 7.5], [10.5, 10.5], [12.5, 13.5]]], np.float32)
  for mode in ("query", "chain", "anchor"):
    tracks = _toy(toys.matching).track(video, queries, mode=mode)
    np.testing.assert_array_equal(tracks.xy[:1], want)
    np.testing.assert_array_equal(tracks.xy[1, :2], [[12.5, 10.5]] * 2)
    np.testing.assert_array_equal(tracks.xy[1, 3], [16.5, 16.5])
    assert tracks.visible[0].all()


def test_a_counterfactual_of_ones_own_sees_what_the_trackers_own_does():
  def program(predict_fn, frames, masks, point_xy, *, patch, twice):
    return {
      "frames": frames,
      "masks": masks,
      "point": point_xy * (2 if twice else 1),
      "side": patch,
    }

  video, tracker = _video(2, (48, 64)), _toy()
  told = tracker.ask(program, *video, [20, 10], twice=True)
  np.testing.assert_allclose(told["point"], [20, 10])
  assert told["frames"].shape == (2, 24, 32, 3) and told["side"] == 4
  np.testing.assert_array_equal(told["masks"][:, 1], tracker.explain(*video, [20, 10]).masks)
  with pytest.raises(InputError, match="lies outside"):
    tracker.ask(program, *video, [65, 10], twice=False)


def test_zoom_answers_more_finely_than_the_predictor_sees():
  rng = np.random.default_rng(3)
  coarse = rng.integers(0, 256, (3, 60, 80, 3)).astype(np.float32)
  smooth = sum(np.roll(coarse[0], s, (0, 1)) for s in ((0, 0), (1, 0), (0, 1), (1, 1))) / 4
  wide = np.kron(smooth, np.ones((3, 3, 1)))
  first, second = (wide[10:130, 12:172]).astype(np.uint8), (wide[5:125, 5:165]).astype(np.uint8)
  points = np.array([[70.5, 60.5], [95.5, 48.5]])
  errors = []
  for rounds in (0, 5):
    tracker = _toy(toys.matching, zoom=rounds, readout="window", num_masks=4)
    answer = tracker.flow(first, second, points)
    errors.append(np.abs(answer.xy - points - [7, 5]).max())
  # Seen whole, a predictor's pixel is five pixels of the video; in the fifth round 1.6.
  assert errors[1] < 0.6 * errors[0]


def test_nothing_hidden_for_zoom_is_refused():
  with pytest.raises(InputError, match="zoom hides 3 x 3"):
    _toy(image_hw=(12, 12), zoom=1, mask_ratio=0.5)


@pytest.mark.parametrize(
  "call, sentence",
  [
    (lambda t, v: t.track(v, [[0, 1, 2]], mode="chains"), "mode is .chains."),
    (lambda t, v: t.track([], [[0, 1, 2]]), "no frames"),
    (lambda t, v: t.track(v, [[9, 1, 2]]), "names frame 9"),
    (lambda t, v: t.track(v, [[-1, 1, 2]]), "whole number"),
    (lambda t, v: t.track(v, [[0.5, 1, 2]]), "whole number"),
    (lambda t, v: t.track(v, [[0, np.nan, 2]]), "finite"),
    (lambda t, v: t.track(v, [[0, 1]]), "rows of"),
    (lambda t, v: t.track(v, [[0, 30, 2]]), "outside"),
    (lambda t, v: t.track([v[0], v[1, :20]], [[0, 1, 2]]), "in size"),
    (lambda t, v: t.track(v / 255, [[0, 1, 2]]), "uint8"),
    (lambda t, v: t.flow(v[0, :, :, 0], v[1], [[1, 2]]), "uint8"),
    (lambda t, v: t.flow(v[0], v[1], [[np.nan, 2]]), "outside"),
    (lambda t, v: t.pairs(v[:2][None], np.ones((2, 3, 2))), "fewer pairs"),
    (lambda t, v: t.pairs([v[:2], v[:2]], np.ones((1, 3, 2))), "more pairs"),
    (lambda t, v: t.dense_flow(v[0], v[1], stride=0), "stride"),
    (lambda t, v: Tracker.load("/nowhere.safetensors"), "no weights file"),
    (lambda t, v: _toy(readout="max"), "read-out"),
    (lambda t, v: _toy(num_masks=0), "num_masks"),
    (lambda t, v: _toy(patch=5), "divide"),
    (lambda t, v: _toy(memory_budget=10), "memory budget"),
  ],
)
def test_what_cannot_be_used_gets_a_sentence(call, sentence):
  with pytest.raises(InputError, match=sentence):
    call(_toy(), _video(2))


@pytest.fixture
def weights_file(tmp_path):
  """Writes tiny random weights with a mark; its arguments change the config's model section."""
  from cwm_jax import models
  from cwm_jax.pretrained import weights

  model = models.build(MODEL)
  masks = masks_lib.sample_masks(jax.random.key(0), (4, 6), 6, (1,))
  init = jax.jit(model.init, static_argnames="num_visible")
  params = init(jax.random.key(1), jnp.zeros((1, 2, 16, 24, 3)), masks, num_visible=30)["params"]

  def write(**changes):
    config = {"model": MODEL | changes, "mark": {"kind": "gaussian", "sigma": 3.0}}
    return weights.save(tmp_path / "w.safetensors", params, config)

  return write


def test_a_weights_file_becomes_a_tracker_with_its_own_ratio_and_mark(weights_file):
  path = weights_file()
  tracker = Tracker.load(path, num_masks=2)
  assert tracker._engine._mark.func == perturb.WhiteGaussian(sigma=3.0)
  assert (~np.asarray(tracker._engine.masks)[:, :, 1]).sum() == 2 * 6
  assert tracker.track(_video(3, (20, 30)), [[0, 3, 4]]).xy.shape == (1, 3, 2)
  # A second load of the same file asks no new program of the compiler.
  size = compiled.ask._cache_size()
  Tracker.load(path, num_masks=2).track(_video(3, (20, 30)), [[0, 3, 4]])
  assert compiled.ask._cache_size() == size


def test_weights_from_a_machine_with_cudnn_are_used_on_one_without(weights_file):
  points = [[3.0, 4.0], [12.0, 9.0]]
  video = _video(2, (16, 24))
  expected = Tracker.load(weights_file(), num_masks=2).flow(*video, points)
  found = Tracker.load(weights_file(attention_impl="cudnn"), num_masks=2).flow(*video, points)
  np.testing.assert_array_equal(found.xy, expected.xy)


def test_attention_keeps_its_dtype_when_the_rest_computes_in_bfloat16(weights_file, monkeypatch):
  from cwm_jax import models

  path, asked, build = weights_file(), [], models.build
  monkeypatch.setattr(models, "build", lambda model: asked.append(model) or build(model))
  for settings in ({}, dict(dtype="bfloat16"), dict(dtype="bfloat16", attention_dtype="bfloat16")):
    Tracker.load(path, **settings)
  built = [(m["dtype"], m["attention_dtype"]) for m in asked if m["dtype"] == "bfloat16"]
  assert built == [("bfloat16", "float32"), ("bfloat16", "bfloat16")]
