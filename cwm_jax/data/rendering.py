"""Procedural scenes to pictures and exact truth, in jitted JAX on the device.

A pixel asks every layer "where am I on your plane, and am I inside?"; the front-most answer is
seen. The same question, asked of points, gives flow, visibility and tracks, so that truth and
picture agree.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cwm_jax import geometry
from cwm_jax.data import procedural
from cwm_jax.types import FramePair, PointLabels, Tracks

# Bending shrinks by half a round at worst: 20 rounds leave a millionth of it.
_INVERSION_ROUNDS = 20


def _noise_field(key, slope, size: int) -> Float[Array, "s s"]:
  """Periodic noise with amplitude 1 / f ** slope, zero mean, unit variance."""
  half = size // 2 + 1
  parts = jax.random.uniform(key, (2, size, half), minval=-1.0)
  fy, fx = jnp.fft.fftfreq(size) * size, jnp.arange(half)
  radius = jnp.sqrt(fy[:, None] ** 2 + fx**2).at[0, 0].set(1.0)
  spectrum = (parts[0] + 1j * parts[1]) * (radius**-slope).at[0, 0].set(0.0)
  field = jnp.fft.irfft2(spectrum, s=(size, size))
  return field / jnp.std(field)


def _texture(seed, kind: Float[Array, " p"], colour: Float[Array, "3 4"], size: int):
  """One layer's texture, [size, size, 3], RGB, periodic."""
  slope, _, poster, levels, stripes, cx, cy, checkers, text, cells = kind
  keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), 3)
  luma, chroma = _noise_field(keys[0], slope, size), _noise_field(keys[1], slope, size)
  y, x = jnp.meshgrid(jnp.arange(size) / size, jnp.arange(size) / size, indexing="ij")
  # Posterised noise has flat regions and sharp edges, as surfaces have.
  steps = (jnp.floor(luma * levels) + 0.5) / levels
  wave = jnp.sin(2 * jnp.pi * (cx * x + cy * y) + 0.6 * chroma)
  boards = jnp.sign(jnp.sin(2 * jnp.pi * cells * x) * jnp.sin(2 * jnp.pi * cells * y) + 1e-6)
  # Text-like: rows of random strokes on even lines.
  ink = jax.random.uniform(keys[2], (size // 2, size // 2)) > 0.55
  ink = jnp.repeat(jnp.repeat(ink, 2, 0), 2, 1)
  ink = jnp.where(jnp.floor(y * size / 6) % 2 == 0, ink * 2.0 - 1.0, 0.8)
  for amount, pattern in ((poster, steps), (stripes, wave), (checkers, boards), (text, ink)):
    luma = luma * (1 - amount) + pattern * amount + 0.25 * amount * luma
  inputs = jnp.stack([luma, chroma, jnp.roll(chroma, size // 2, (0, 1)), jnp.ones_like(luma)], -1)
  return jnp.clip(inputs @ colour.T, 0.0, 1.0)


def _textures(scene, size: int) -> Float[Array, "l s s 3"]:
  make = jax.vmap(partial(_texture, size=size))
  textures = make(scene["texture_seed"], scene["texture"], scene["colour"])
  if "photos" not in scene:
    return textures
  photos = scene["photos"].astype(jnp.float32) / 255.0
  layers = textures.shape[0]
  chosen = photos[jnp.arange(layers) % photos.shape[0]]
  return jnp.where(scene["photo"][:, None, None, None], chosen, textures)


def _bend(points, deform):
  """Offset of the layer-plane coordinates; `deform` is [L, 5], points [L, N, 2]."""
  amount, fx, fy, px, py = (deform[:, i, None] for i in range(5))
  dx = amount * jnp.sin(2 * jnp.pi * fy * points[..., 1] + px)
  dy = amount * jnp.sin(2 * jnp.pi * fx * points[..., 0] + py)
  return jnp.stack([dx, dy], axis=-1)


def _ask(scene, t, points: Float[Array, "n 2"]):
  """Where each point lies on every layer's plane, and how far inside the layer (below 0: outside).

  Returns:
    plane coordinates [L, N, 2] and signed depth [L, N], both in image sides.
  """
  pose_inv = scene["pose_inv"][t]
  homogeneous = jnp.einsum("lij,nj->lni", pose_inv[:, :, :2], points) + pose_inv[:, None, :, 2]
  plane = homogeneous[..., :2] / homogeneous[..., 2:]
  plane = plane + _bend(plane, scene["deform"][t])
  rx, ry, power, wiggle, lobes, phase = (scene["shape"][:, i, None] for i in range(6))
  there = rx > 0
  a = jnp.abs(plane[..., 0]) / jnp.where(there, rx, 1.0) + 1e-6
  b = jnp.abs(plane[..., 1]) / jnp.where(there, ry, 1.0) + 1e-6
  power = jnp.where(there, power, 2.0)
  reach = (a**power + b**power) ** (1.0 / power)
  rim = 1.0 + wiggle * jnp.sin(lobes * jnp.arctan2(plane[..., 1], plane[..., 0]) + phase)
  depth = jnp.where(there, (rim - reach) * jnp.minimum(rx, ry), -1.0)
  return plane, depth.at[0].set(1.0)


def _front(inside: Bool[Array, "l n"]) -> Int[Array, " n"]:
  """Index of the last (front-most) layer that is inside; the background always is."""
  layers = inside.shape[0]
  return layers - 1 - jnp.argmax(inside[::-1], axis=0)


def _sample(textures, periods, layer, plane):
  """Bilinear, periodic samples of each point's own layer: [N, 3]."""
  size = textures.shape[1]
  coords = jnp.take_along_axis(plane, layer[None, :, None], axis=0)[0]
  coords = coords / periods[layer][:, None] * size
  base = jnp.floor(coords)
  wx, wy = jnp.split(coords - base, 2, axis=-1)
  x0, y0 = (base[:, i].astype(jnp.int32) % size for i in range(2))
  x1, y1 = (x0 + 1) % size, (y0 + 1) % size
  # One flat index: a gather of three neighbouring floats is much cheaper than one with three axes.
  texels = textures.reshape(-1, 3)
  row0, row1 = (layer * size + y0) * size, (layer * size + y1) * size
  top = texels[row0 + x0] * (1 - wx) + texels[row0 + x1] * wx
  bottom = texels[row1 + x0] * (1 - wx) + texels[row1 + x1] * wx
  return top * (1 - wy) + bottom * wy


def _shade(scene, t, points, colours, front, pixel):
  """Cast shadows on whatever lies behind the caster, then light."""
  dx, dy, strength = scene["shadow"]
  _, depth = _ask(scene, t, points - jnp.stack([dx, dy]))
  layers = jnp.arange(depth.shape[0])[:, None]
  soft = jnp.clip(0.5 + depth / (8 * pixel), 0.0, 1.0)
  dark = jnp.max(jnp.where(layers > jnp.maximum(front, 0), soft, 0.0), axis=0)
  light = scene["light"][t]
  gradient = points @ light[4:6]
  colours = colours * (1 - strength * dark)[:, None]
  return colours * (1 + light[:3] + gradient[:, None]) + light[3]


def _blur(image: Float[Array, "h w 3"], sigma):
  """Five-tap separable Gaussian, sigma in pixels (up to about 1)."""
  taps = jnp.exp(-0.5 * (jnp.arange(-2, 3) / jnp.maximum(sigma, 1e-3)) ** 2)
  taps = taps / taps.sum()
  h, w = image.shape[:2]
  wide = jnp.pad(image, ((2, 2), (0, 0), (0, 0)), mode="edge")
  image = sum(taps[i] * wide[i : i + h] for i in range(5))
  wide = jnp.pad(image, ((0, 0), (2, 2), (0, 0)), mode="edge")
  return sum(taps[i] * wide[:, i : i + w] for i in range(5))


def _frame(scene, textures, t, size_hw: tuple[int, int]) -> Float[Array, "h w 3"]:
  h, w = size_hw
  pixel = 1.0 / min(h, w)
  points = _to_plane(geometry.pixel_centres(h, w).reshape(-1, 2), size_hw)
  plane, depth = _ask(scene, t, points)
  # Edges are smoothed over a pixel: the front-most layer that touches the pixel is laid over the
  # front-most one behind it that holds its centre.
  front = _front(depth > -0.5 * pixel)
  below = jnp.arange(depth.shape[0])[:, None] < front
  behind = _front((depth > 0) & below)
  alpha = jnp.take_along_axis(depth, front[None], axis=0)[0] / pixel + 0.5
  alpha = jnp.where(front == 0, 1.0, jnp.clip(alpha, 0.0, 1.0))[:, None]
  periods = scene["texture"][:, 1]
  colours = _sample(textures, periods, front, plane) * alpha
  colours = colours + _sample(textures, periods, behind, plane) * (1 - alpha)
  image = _shade(scene, t, points, colours, front, pixel).reshape(h, w, 3)
  image = _blur(image, scene["lens"][0] * min(h, w))
  key = jax.random.fold_in(jax.random.key(scene["noise_seed"], impl="threefry2x32"), t)
  grain = jax.random.uniform(key, (h, w, 3), minval=-1.7, maxval=1.7)
  return jnp.clip(image + scene["lens"][1] * grain, 0.0, 1.0)


def _to_plane(points_xy, size_hw):
  """Pixels (x, y) to image sides from the centre."""
  h, w = size_hw
  return (points_xy - jnp.array([w / 2, h / 2])) / min(h, w)


def _to_pixels(points, size_hw):
  h, w = size_hw
  return points * min(h, w) + jnp.array([w / 2, h / 2])


def _trace(scene, start, points_xy, size_hw):
  """Tracks of points from frame `start` to all frames: xy [N, T, 2], visible [N, T], layer [N]."""
  points = _to_plane(points_xy, size_hw)
  plane, depth = _ask(scene, start, points)
  layer = _front(depth > 0)
  target = jnp.take_along_axis(plane, layer[None, :, None], axis=0)[0]

  def at(t):
    deform = scene["deform"][t][layer]

    def sharpen(_, flat):
      return target - _bend(flat[:, None], deform)[:, 0]

    flat = jax.lax.fori_loop(0, _INVERSION_ROUNDS, sharpen, target)
    pose = scene["pose"][t][layer]
    image = jnp.einsum("nij,nj->ni", pose[:, :, :2], flat) + pose[:, :, 2]
    place = image[:, :2] / image[:, 2:]
    seen = _front(_ask(scene, t, place)[1] > 0) == layer
    xy = _to_pixels(place, size_hw)
    inside = jnp.all((xy >= 0) & (xy < jnp.array([size_hw[1], size_hw[0]])), axis=-1)
    return xy, seen & inside

  xy, visible = jax.lax.map(at, jnp.arange(scene["pose"].shape[0]))
  return jnp.swapaxes(xy, 0, 1), visible.T, layer


@partial(jax.jit, static_argnames=("size_hw", "texture_size", "truth"))
def render(
  scenes: dict, *, size_hw: tuple[int, int], texture_size: int, truth: bool = False
) -> FramePair:
  """Draws the first and the last frame of a batch of scenes.

  Args:
    scenes: `procedural.draw_scene` results, stacked along a batch axis; "photos" uint8
      [B, P, texture_size, texture_size, 3] may stand beside them as textures.
    size_hw: of the frames, pixels.
    texture_size: texels a side of every layer's texture.
    truth: also give flow, visibility and segments of frame 1.
  """

  def pair(scene):
    textures = _textures(scene, texture_size)
    ends = (0, scene["pose"].shape[0] - 1)
    frames = jnp.stack([_frame(scene, textures, t, size_hw) for t in ends])
    return FramePair(frames, *_truth(scene, size_hw)) if truth else FramePair(frames)

  return jax.vmap(pair)(scenes)


def _truth(scene, size_hw):
  """Flow, visibility and segments of frame 1, see `FramePair`."""
  h, w = size_hw
  here = geometry.pixel_centres(h, w).reshape(-1, 2)
  xy, visible, layer = _trace(scene, 0, here, size_hw)
  flow = (xy[:, -1] - here).reshape(h, w, 2)
  return flow, visible[:, -1].reshape(h, w), layer.reshape(h, w)


def render_batch(
  batch: dict,
  *,
  size_hw: tuple[int, int],
  texture_size: int = 0,
  supersample: int = 1,
  truth: bool = False,
) -> FramePair:
  """A loader's batch, on the device, as pairs; to be jitted.

  Args:
    batch: "scene/<name>" or "frames" uint8 [B, 2, H, W, 3], and maybe "labels/<name>" beside them.
    size_hw: of the pairs; frames already have it.
    texture_size: as in `render`; 0 takes the shorter side of what is drawn, which photographs have
      too.
    supersample: scenes are drawn so many times larger and shrunk.
    truth: as in `render`, at `size_hw`; of frames none is known.
  """
  if "frames" in batch:
    frames = batch["frames"].astype(jnp.float32) / 255
    labels = {n.removeprefix("labels/"): v for n, v in batch.items() if n.startswith("labels/")}
    return FramePair(frames, labels=PointLabels(**labels) if labels else None)
  scenes = {n.removeprefix("scene/"): v for n, v in batch.items() if n.startswith("scene/")}
  large_hw = (supersample * size_hw[0], supersample * size_hw[1])
  texels = procedural.texture_side(texture_size, size_hw=size_hw, supersample=supersample)
  pair = render(scenes, size_hw=large_hw, texture_size=texels, truth=truth and supersample == 1)
  if supersample == 1:
    return pair
  frames = geometry.resize(pair.frames, size_hw, antialias=True)
  if not truth:
    return FramePair(frames)
  # What is seen at a small pixel's centre, which is no large pixel's.
  return FramePair(frames, *jax.vmap(partial(_truth, size_hw=size_hw))(scenes))


@partial(jax.jit, static_argnames=("size_hw", "texture_size"))
def render_video(
  scene: dict, *, size_hw: tuple[int, int], texture_size: int
) -> Float[Array, "t h w 3"]:
  """Draws every frame of one scene, RGB in [0, 1]."""
  textures = _textures(scene, texture_size)
  times = jnp.arange(scene["pose"].shape[0])
  return jax.lax.map(lambda t: _frame(scene, textures, t, size_hw), times)


@partial(jax.jit, static_argnames=("size_hw",))
def trace(
  scene: dict,
  start: int | Int[Array, ""],
  points_xy: Float[Array, "n 2"],
  *,
  size_hw: tuple[int, int],
) -> Tracks:
  """The exact tracks of points (x, y), pixels, that are seen at frame `start` of one scene."""
  xy, visible, _ = _trace(scene, start, points_xy, size_hw)
  return Tracks(xy, visible, jnp.ones(visible.shape))
