"""Procedural scenes: layered worlds in motion, drawn in NumPy from one integer seed a scene.

A scene is a dict of small arrays. `rendering.render` turns it into pictures and exact truth on the
device. Layer 0 is the background, seen by a moving camera; layers 1.. are objects, the last one in
front. Lengths are shares of the image's shorter side; positions are (x, y) from its centre, y down.
Only `Generator.random` is used, whose stream NumPy keeps, so a seed means the same scene for good.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from cwm_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Preset:
  """What may happen in a scene. Ranges are (low, high); motion is from the first frame to the last.

  motion: displacement of camera and objects; with `motion_log` its logarithm is uniform.
  snap: round displacements to 1 / snap of the image (0: any displacement).
  jitter: move by up to so much more along each axis, after rounding.
  slope: spectral slope of textures, amplitude ~ 1 / f ** slope (0 is white noise).
  natural: probability that a layer is made of edges, stripes, checkers or text-like detail too.
  texel: image sides that one period of a texture covers.
  objects: how many movers. radius: their size. turn: radians. zoom: relative change of scale.
  tilt: perspective terms of the camera. deform: how far objects bend.
  light: change of gain, colour and gradient. shadow: strength. blur: share of the side. noise: RGB.
  """

  motion: tuple[float, float] = (4 / 256, 64 / 256)
  motion_log: bool = True
  snap: int = 0
  jitter: float = 0.0
  slope: tuple[float, float] = (0.4, 1.6)
  natural: float = 0.7
  texel: tuple[float, float] = (1.0, 2.0)
  objects: tuple[int, int] = (1, 8)
  radius: tuple[float, float] = (0.08, 0.25)
  turn: float = 0.25
  zoom: float = 0.12
  tilt: float = 0.08
  deform: float = 0.15
  light: float = 0.12
  shadow: float = 0.5
  blur: float = 0.004
  noise: float = 0.02


_STILL = dict(turn=0.0, zoom=0.0, tilt=0.0, deform=0.0, light=0.0, shadow=0.0, blur=0.0, noise=0.0)
_NOISE = dict(slope=(0.0, 0.6), natural=0.0, texel=(1.0, 1.0))
_UNIFORM = dict(motion=(0.0, 0.22), motion_log=False)

PRESETS = {
  # Nothing can be interpolated and everything moves by whole patches: matching is all that pays.
  "patch_shifts": Preset(**_STILL, **_NOISE, **_UNIFORM, snap=8, objects=(0, 0)),
  # At 32 x 32 pixels these are whole pixels: what moves is not yet blurred by resampling.
  "pixel_shifts": Preset(**_STILL, **_NOISE, **_UNIFORM, snap=32, objects=(0, 0)),
  "shifts": Preset(**_STILL, **_NOISE, **_UNIFORM, objects=(0, 0)),
  # Neighbouring patches look alike: a match that is off by part of a patch pays too.
  "smooth_shifts": Preset(**_STILL, **_UNIFORM, slope=(0.5, 1.2), natural=0.0, objects=(0, 0)),
  "sprites": Preset(**_STILL, **_NOISE, **_UNIFORM, objects=(1, 4), radius=(0.12, 0.3)),
  "movers": Preset(
    **_STILL, **_UNIFORM, slope=(0.5, 1.2), natural=0.0, objects=(1, 3), radius=(0.15, 0.3)
  ),
  "views": Preset(
    **_UNIFORM, objects=(0, 0), natural=0.5, turn=0.1, zoom=0.05, tilt=0.0, light=0.06, noise=0.01
  ),
  "near_views": Preset(
    motion=(0.0, 0.13),
    motion_log=False,
    objects=(0, 0),
    natural=0.5,
    turn=0.1,
    zoom=0.05,
    tilt=0.0,
    light=0.06,
    noise=0.01,
  ),
  "near_movers": Preset(
    **_STILL,
    motion=(0.0, 0.13),
    motion_log=False,
    slope=(0.5, 1.2),
    natural=0.0,
    objects=(1, 4),
    radius=(0.12, 0.25),
  ),
  "worlds": Preset(),
  # Frozen: this preset and the committed seeds are the test set `scenes-test-v1`.
  "scenes-test-v1": Preset(objects=(3, 6), radius=(0.1, 0.22), light=0.15),
  # A clip for people to look at.
  "demo": Preset(
    motion=(30 / 256, 60 / 256), objects=(3, 4), radius=(0.13, 0.22), slope=(0.6, 1.2), noise=0.01
  ),
}

# From whole patches to any displacement by degrees: at 32 x 32 pixels, level k strays by k / 2
# pixels from whole patches of 4, so that level 4 leaves no gaps.
PRESETS |= {
  f"strays_{level}": Preset(
    **_STILL, **_UNIFORM, snap=8, jitter=level / 64, slope=(0.3, 1.0), natural=0.0, objects=(0, 0)
  )
  for level in (1, 2, 3, 4)
}


def scenes_test_v1() -> tuple[list[int], Preset]:
  """Seeds and preset of the frozen test set: 500 scenes, drawn at 256 with 256 texels a layer."""
  text = resources.files("cwm_jax.data").joinpath("scenes_test_v1.txt").read_text()
  return [int(line) for line in text.split()], PRESETS["scenes-test-v1"]


def texture_side(texture_size: int, *, size_hw: tuple[int, int], supersample: int) -> int:
  """Texels a side of a layer's texture, of photographs too: all who draw scenes ask here.

  Args:
    texture_size: as configured; 0 takes the shorter side of what is drawn.
    size_hw: of the pairs, pixels.
    supersample: scenes are drawn so many times larger and shrunk.
  """
  return texture_size or supersample * min(size_hw)


def preset_at(
  index: int, curriculum: Sequence[Sequence[Any]], *, fade: int = 0, seed: int = 0
) -> Preset:
  """The preset of the index-th scene of a run.

  Args:
    index: scenes seen before this one.
    curriculum: (first index, preset name) or (first index, ((name, weight), ...)), ascending.
    fade: length over which a stage takes over from the one before, scene by scene.
    seed: the scene's own seed; decides which stage and which preset it gets.

  Raises:
    InputError: an unknown preset name, or a curriculum that does not begin at 0 or is out of order.
  """
  starts = [int(start) for start, _ in curriculum]
  if not starts or starts[0] != 0 or starts != sorted(starts):
    raise InputError(f"a curriculum begins at 0 and ascends; this one has starts {starts}")
  coin, choice = np.random.default_rng([seed, 1]).random(2)
  stage = max(i for i, start in enumerate(starts) if start <= index)
  if stage and fade and coin > (index - starts[stage] + 1) / fade:
    stage -= 1
  mixture = curriculum[stage][1]
  weights = {mixture: 1.0} if isinstance(mixture, str) else dict(mixture)
  for name in weights:
    if name not in PRESETS:
      raise InputError(f"unknown scene preset {name!r}; choose from {', '.join(PRESETS)}")
  edges = np.cumsum(list(weights.values()))
  return PRESETS[list(weights)[int(np.searchsorted(edges, choice * edges[-1], side="right"))]]


class _Draw:
  """Uniform draws and what is made of them."""

  def __init__(self, seed: int):
    self._random = np.random.default_rng([seed, 0]).random

  def uniform(self, low: float, high: float) -> float:
    return low + (high - low) * float(self._random())

  def signed(self, size: float) -> float:
    return self.uniform(-size, size)

  def integer(self, low: int, high: int) -> int:
    """Whole number from low to high, both included."""
    return low + int(self._random() * (high - low + 1))

  def chance(self, probability: float) -> bool:
    return float(self._random()) < probability

  def displacement(self, preset: Preset) -> np.ndarray:
    low, high = preset.motion
    if preset.motion_log:
      length = math.exp(self.uniform(math.log(low), math.log(high)))
      angle = self.uniform(0, 2 * math.pi)
      step = np.array([length * math.cos(angle), length * math.sin(angle)])
    else:
      step = np.array([self.signed(high), self.signed(high)])
    if preset.snap:
      step = np.round(step * preset.snap) / preset.snap
    if preset.jitter:
      step = step + np.array([self.signed(preset.jitter), self.signed(preset.jitter)])
    return step


def draw_scene(
  seed: int, preset: Preset, *, num_frames: int = 2, max_objects: int = 8
) -> dict[str, np.ndarray]:
  """Draws one scene.

  Returns:
    With L = max_objects + 1 layers and T frames:
      texture_seed uint32 [L], texture float32 [L, 10], colour float32 [L, 3, 4], photo bool [L],
      pose and pose_inv float32 [T, L, 3, 3] (layer plane to image and back, homogeneous),
      shape float32 [L, 6], deform float32 [T, L, 5], shadow float32 [3], light float32 [T, 6],
      lens float32 [2] (blur, noise), noise_seed uint32 [].
  """
  draw = _Draw(seed)
  layers = max_objects + 1
  count = min(draw.integer(*preset.objects), max_objects)
  tau = np.linspace(0.0, 1.0, num_frames)
  scene = {
    "texture_seed": np.array([draw.integer(0, 2**32 - 1) for _ in range(layers)], np.uint32),
    "noise_seed": np.array(draw.integer(0, 2**32 - 1), np.uint32),
    "texture": np.stack([_draw_texture(draw, preset) for _ in range(layers)]),
    "colour": np.stack([_draw_colour(draw) for _ in range(layers)]),
    "photo": np.array([draw.chance(0.6) for _ in range(layers)]),
  }
  pose = np.tile(np.eye(3), (num_frames, layers, 1, 1))
  shape = np.zeros((layers, 6))
  deform = np.zeros((num_frames, layers, 5))
  pose[:, 0] = _draw_camera(draw, preset, tau)
  for k in range(1, count + 1):
    shape[k], pose[:, k], deform[:, k] = _draw_object(draw, preset, tau)
  scene["pose"], scene["pose_inv"] = pose, np.linalg.inv(pose)
  scene["shape"], scene["deform"] = shape, deform
  strength = draw.uniform(0, preset.shadow) * draw.chance(0.7)
  scene["shadow"] = np.array([draw.signed(0.06), draw.uniform(0.01, 0.07), strength])
  # Light at the first and at the last frame: gain of R, G, B, bias, gradient along x and y.
  change = preset.light * np.array([1, 1, 1, 0.3, 1, 1])
  common = np.array([draw.signed(1.0)] * 3 + [0.0] * 3) * change
  first, last = (np.array([draw.signed(1.0) for _ in range(6)]) * change * 0.5 for _ in range(2))
  scene["light"] = first + tau[:, None] * (last - first + common)
  scene["lens"] = np.array([draw.uniform(0, preset.blur), draw.uniform(0, preset.noise)])
  return {
    name: value.astype(np.float32) if value.dtype == np.float64 else value
    for name, value in scene.items()
  }


def _draw_texture(draw: _Draw, preset: Preset) -> np.ndarray:
  """slope, period, posterise, levels, stripes, cycles x, cycles y, checkers, text, cells."""
  natural = draw.chance(preset.natural)
  kind = draw.integer(0, 4) if natural else 4
  amount = draw.uniform(0.4, 1.0)
  angle, cycles = draw.uniform(0, math.pi), draw.uniform(4, 20)
  return np.array(
    [
      draw.uniform(*preset.slope),
      draw.uniform(*preset.texel),
      amount if kind == 0 else 0.0,
      draw.uniform(0.6, 2.0),
      amount if kind == 1 else 0.0,
      # Whole cycles a period, so that the texture closes on itself.
      round(cycles * math.cos(angle)),
      round(cycles * math.sin(angle)),
      amount if kind == 2 else 0.0,
      amount if kind == 3 else 0.0,
      draw.integer(3, 10),
    ]
  )


def _draw_colour(draw: _Draw) -> np.ndarray:
  """[3, 4] from (luma, chroma, chroma, 1) to RGB: light varies most, then warm-cold, then green."""
  luma = draw.uniform(0.1, 0.28)
  warm, green = draw.uniform(0.0, 0.08), draw.uniform(0.0, 0.04)
  grey = draw.uniform(0.3, 0.7)
  tint = [grey + draw.signed(0.15) for _ in range(3)]
  weights = [luma * draw.uniform(0.8, 1.2) for _ in range(3)]
  rows = zip(weights, (warm, 0.0, -warm), (green, -2 * green, green), tint)
  return np.array([list(row) for row in rows])


def _path(draw: _Draw, preset: Preset, tau: np.ndarray) -> np.ndarray:
  """Displacement [T, 2] along a gently curved path that ends at a drawn displacement."""
  end = draw.displacement(preset)
  bend = np.array([-end[1], end[0]]) * draw.signed(0.3)
  return tau[:, None] * end + np.sin(np.pi * tau)[:, None] * bend


def _draw_camera(draw: _Draw, preset: Preset, tau: np.ndarray) -> np.ndarray:
  shift = _path(draw, preset, tau)
  turn, zoom = draw.signed(preset.turn) * 0.4, draw.signed(preset.zoom)
  shear = draw.signed(preset.zoom) * 0.3
  tilt = draw.signed(preset.tilt), draw.signed(preset.tilt)
  poses = []
  for t, (dx, dy) in zip(tau, shift):
    c, s, z = math.cos(turn * t), math.sin(turn * t), math.exp(zoom * t)
    affine = np.array([[z * c, -z * s + shear * t, dx], [z * s, z * c, dy], [0, 0, 1]])
    perspective = np.array([[1, 0, 0], [0, 1, 0], [tilt[0] * t, tilt[1] * t, 1]])
    poses.append(affine @ perspective)
  return np.stack(poses)


def _draw_object(draw: _Draw, preset: Preset, tau: np.ndarray):
  radius = draw.uniform(*preset.radius)
  aspect = math.exp(draw.signed(0.5))
  wiggle = draw.uniform(0, 0.2) * draw.chance(0.6)
  shape = np.array(
    [
      radius * aspect**0.5,
      radius / aspect**0.5,
      math.exp(draw.uniform(math.log(1.5), math.log(8))),  # diamond-like, round, box-like
      wiggle,
      draw.integer(2, 6),
      draw.uniform(0, 2 * math.pi),
    ]
  )
  path = _path(draw, preset, tau)
  # A mover should still be seen at the end: start on the side that it moves away from.
  start = np.array([draw.signed(0.42), draw.signed(0.42)])
  centre = np.clip(start, -0.42 - np.minimum(path[-1], 0), 0.42 - np.maximum(path[-1], 0)) + path
  angle, turn, zoom = (
    draw.uniform(0, 2 * math.pi),
    draw.signed(preset.turn),
    draw.signed(preset.zoom),
  )
  poses = []
  for t, (x, y) in zip(tau, centre):
    c, s, z = math.cos(angle + turn * t), math.sin(angle + turn * t), math.exp(zoom * t)
    poses.append([[z * c, -z * s, x], [z * s, z * c, y], [0, 0, 1]])
  # Bending shifts by up to `deform` of the radius; its slope stays below 1/2, so it can be undone.
  bend = draw.signed(preset.deform) * radius * draw.chance(0.5)
  cycles = 0.5 / (2 * radius)
  waves = [cycles, cycles, draw.uniform(0, 2 * math.pi), draw.uniform(0, 2 * math.pi)]
  deform = np.array([[bend * t, *waves] for t in tau])
  return shape, np.array(poses), deform
