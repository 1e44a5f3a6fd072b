"""Points move with the pixels that they lie on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import geometry
from cwm_jax.tasks.augment import Augmentation

H, W = 40, 32
# Away from the border: outside a frame its last pixels go on, and there colours say nothing.
POINTS = jnp.array([[12.5, 18.0], [18.0, 24.5], [16.25, 15.0]])
FLOW = jnp.array([[4.0, -2.0], [-3.0, 1.5], [0.5, 6.0]])


def places() -> jax.Array:
  """Two frames whose red and green tell where a pixel was, and whose blue tells the frame."""
  here = jnp.broadcast_to(geometry.pixel_centres(H, W) / H, (2, H, W, 2))
  return jnp.concatenate([here, jnp.zeros((2, H, W, 1)).at[1].set(1.0)], axis=-1)


def test_at_a_moved_point_is_the_colour_that_was_under_it():
  augment = jax.jit(jax.vmap(Augmentation(light=0.0, noise=0.0), in_axes=(0, None, None, None)))
  frames, points, flow, inside = augment(
    jax.random.split(jax.random.key(0), 40), places(), POINTS, FLOW
  )
  swapped = np.asarray(frames[:, 0, 0, 0, 2]) > 0.5
  assert 5 < swapped.sum() < 35
  read = jax.vmap(jax.vmap(geometry.sample_bilinear))
  seen = H * np.asarray(read(frames, jnp.stack([points, points + flow], axis=1)))[..., :2]
  ends = np.stack([POINTS, POINTS + FLOW])
  want = np.where(swapped[:, None, None, None], ends[::-1], ends)
  kept = np.asarray(inside)
  assert kept.mean() > 0.9
  np.testing.assert_allclose(
    seen.transpose(0, 2, 1, 3)[kept], want.transpose(0, 2, 1, 3)[kept], atol=0.02
  )
  # Mirrors, turns and extra motion: flow is not the old one turned over and no more.
  assert len({tuple(np.round(f, 3)) for f in np.asarray(flow[:, 0])}) == 40


def test_a_point_that_leaves_is_told():
  augment = Augmentation(turn_over=False, turn=0.0, zoom=0.0, shift=0.0, motion=0.5)
  points = jnp.array([[16.0, 20.0], [31.0, 20.0]])
  flow = jnp.array([[0.0, 0.0], [0.0, 0.0]])
  many = jax.jit(jax.vmap(augment, in_axes=(0, None, None, None)))
  _, new, moved, inside = many(jax.random.split(jax.random.key(0), 30), places(), points, flow)
  there = np.asarray(new + moved)
  np.testing.assert_array_equal(inside, ((there >= 0) & (there <= (W, H))).all(axis=-1))
  assert 0 < np.mean(inside) < 1


def test_without_ranges_nothing_changes():
  augment = Augmentation(False, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
  frames, points, flow, inside = jax.jit(augment)(jax.random.key(3), places(), POINTS, FLOW)
  np.testing.assert_allclose(frames, places(), atol=1e-5)
  np.testing.assert_allclose(points, POINTS, atol=1e-4)
  np.testing.assert_allclose(flow, FLOW, atol=1e-4)
  assert bool(inside.all())
