"""Tiny annotated clips in the folder form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_clip(
  folder: Path, *, frames: int = 7, hw: tuple[int, int] = (64, 128), points: int = 3, seed: int = 0
) -> np.ndarray:
  """Noise with points that move 4 px right a frame, the first of them hidden in two frames.

  Returns:
    points_xy float32 [N, T, 2].
  """
  rng = np.random.default_rng(seed)
  (folder / "video").mkdir(parents=True)
  for t in range(frames):
    pixels = rng.integers(0, 256, (*hw, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "video" / f"{t:03}.png")
  start = rng.uniform([2, 2], [hw[1] - 4 * frames, hw[0] - 2], (points, 2))
  points_xy = (start[:, None] + np.arange(frames)[:, None] * [4.0, 0.0]).astype(np.float32)
  occluded = np.zeros((points, frames), bool)
  occluded[0, :2] = True
  np.savez(folder / "points.npz", points_xy=points_xy, occluded=occluded, hw=np.array(hw))
  return points_xy
