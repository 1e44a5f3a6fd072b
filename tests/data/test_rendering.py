"""Pictures and truth agree, and both are deterministic."""

import jax
import numpy as np
import pytest

from cwm_jax import geometry
from cwm_jax.data import procedural, rendering

SIZE = (48, 48)


def scenes(seeds, preset="worlds", **changes):
  drawn = [procedural.draw_scene(seed, procedural.PRESETS[preset], max_objects=4) for seed in seeds]
  batch = {name: np.stack([scene[name] for scene in drawn]) for name in drawn[0]}
  return batch | changes


def without_light(batch):
  return batch | {name: 0 * batch[name] for name in ("light", "lens", "shadow")}


def assert_alike(found, wanted):
  """One scene, drawn by two programs: a few pixels may fall to the other side of an edge."""
  assert np.mean(np.abs(found - wanted) > 1e-5) < 0.002


def test_frames_are_rgb_in_range_and_the_same_each_time():
  batch = scenes([1, 2])
  first = rendering.render(batch, size_hw=SIZE, texture_size=32, truth=True)
  again = rendering.render(batch, size_hw=SIZE, texture_size=32, truth=True)
  assert first.frames.shape == (2, 2, 48, 48, 3)
  assert 0 <= float(first.frames.min()) and float(first.frames.max()) <= 1
  assert float(first.frames.std()) > 0.05
  jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_scene_looks_the_same_whatever_stands_beside_it_in_the_batch():
  together = rendering.render(scenes([1, 2, 3]), size_hw=SIZE, texture_size=32).frames
  alone = rendering.render(scenes([2]), size_hw=SIZE, texture_size=32).frames
  assert_alike(together[1:2], alone)


def test_flow_carries_frame_2_onto_frame_1_where_visible():
  batch = without_light(scenes(range(8), preset="scenes-test-v1"))
  size = (128, 128)
  pair = rendering.render(batch, size_hw=size, texture_size=64, truth=True)
  warped = jax.vmap(geometry.warp_backward)(pair.frames[:, 1], pair.flow_xy)
  visible = np.asarray(pair.visible)
  error = np.abs(np.asarray(warped - pair.frames[:, 0])).mean(-1)[visible]
  still = np.abs(np.asarray(pair.frames[:, 1] - pair.frames[:, 0])).mean(-1)[visible]
  assert np.median(error) < 0.01 and error.mean() < 0.1 * still.mean()


def test_flow_is_wrong_where_it_says_occluded():
  """Otherwise the visibility map would be an empty claim."""
  batch = without_light(scenes(range(8), preset="scenes-test-v1"))
  pair = rendering.render(batch, size_hw=(64, 64), texture_size=64, truth=True)
  warped = jax.vmap(geometry.warp_backward)(pair.frames[:, 1], pair.flow_xy)
  error = np.abs(np.asarray(warped - pair.frames[:, 0])).mean(-1)
  hidden = ~np.asarray(pair.visible)
  assert 0.02 < hidden.mean() < 0.6
  assert error[hidden].mean() > 3 * error[~hidden].mean()


def test_dense_flow_and_point_tracks_are_one_truth():
  scene = procedural.draw_scene(3, procedural.PRESETS["worlds"], max_objects=4)
  batch = {name: value[None] for name, value in scene.items()}
  pair = rendering.render(batch, size_hw=SIZE, texture_size=32, truth=True)
  points_xy = geometry.pixel_centres(*SIZE)[10::13, 5::11].reshape(-1, 2)
  tracks = rendering.trace(scene, 0, points_xy, size_hw=SIZE)
  np.testing.assert_allclose(tracks.xy[:, 0], points_xy, atol=1e-3)
  assert bool(tracks.visible[:, 0].all())
  flow = np.asarray(pair.flow_xy)[0][10::13, 5::11].reshape(-1, 2)
  np.testing.assert_allclose(tracks.xy[:, 1] - points_xy, flow, atol=1e-3)


def test_tracks_can_start_at_any_frame_and_return():
  """A point traced from the first frame to the last and back is where it was."""
  scene = procedural.draw_scene(11, procedural.PRESETS["demo"], num_frames=5, max_objects=4)
  points_xy = geometry.pixel_centres(*SIZE)[4::9, 4::9].reshape(-1, 2)
  forth = rendering.trace(scene, 0, points_xy, size_hw=SIZE)
  seen = np.asarray(forth.visible[:, -1])
  back = rendering.trace(scene, 4, forth.xy[:, -1], size_hw=SIZE)
  assert seen.sum() > 10
  np.testing.assert_allclose(back.xy[seen, 0], points_xy[seen], atol=0.01)


def test_a_pair_is_the_first_and_last_frame_of_the_video():
  scene = procedural.draw_scene(7, procedural.PRESETS["demo"], num_frames=4, max_objects=4)
  video = rendering.render_video(scene, size_hw=SIZE, texture_size=32)
  batch = {name: value[None] for name, value in scene.items()}
  pair = rendering.render(batch, size_hw=SIZE, texture_size=32).frames[0]
  assert_alike(video[0], pair[0])
  assert_alike(video[-1], pair[1])


@pytest.mark.parametrize("size_hw", [(32, 64), (64, 32)])
def test_other_aspects_keep_scenes_round_and_truth_right(size_hw):
  batch = without_light(scenes(range(4)))
  pair = rendering.render(batch, size_hw=size_hw, texture_size=32, truth=True)
  warped = jax.vmap(geometry.warp_backward)(pair.frames[:, 1], pair.flow_xy)
  error = np.abs(np.asarray(warped - pair.frames[:, 0])).mean(-1)[np.asarray(pair.visible)]
  assert np.median(error) < 0.02


def test_photographs_become_textures():
  batch = scenes([1, 2])
  batch["photo"][:] = True
  grey = np.full((2, 1, 32, 32, 3), 128, np.uint8)
  pair = rendering.render(
    without_light(batch) | {"photos": grey}, size_hw=SIZE, texture_size=32
  ).frames
  np.testing.assert_allclose(pair, 128 / 255, atol=1e-3)
