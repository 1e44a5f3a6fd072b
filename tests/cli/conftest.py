"""A weights file, a clip and frames for the commands."""

from __future__ import annotations

import command_line
import pytest

from cwm_jax import viz
from cwm_jax.pretrained import weights


@pytest.fixture(scope="session")
def weights_path(tmp_path_factory):
  config = {"model": command_line.MODEL}
  path = tmp_path_factory.mktemp("weights") / "random.safetensors"
  return weights.save(
    path, command_line.random_params(config), config, extra={"scores": {"median": 1.25}}
  )


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory):
  return viz.write_mp4(tmp_path_factory.mktemp("clip") / "clip.mp4", command_line.frames(), fps=10)


@pytest.fixture(scope="session")
def frame_paths(tmp_path_factory):
  folder = tmp_path_factory.mktemp("frames")
  return [
    viz.write_png(folder / f"{i}.png", frame) for i, frame in enumerate(command_line.frames())
  ]


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("videos")
  for i in range(2):
    viz.write_mp4(folder / f"{i}.mp4", command_line.frames(8, 40, 56), fps=10)
  return folder
