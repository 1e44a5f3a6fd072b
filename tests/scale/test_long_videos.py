"""A long video takes no more memory than a short one: frames are decoded, answered, forgotten."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import command_line
import numpy as np
import pytest

from cwm_jax import viz
from cwm_jax.pretrained import weights

_MEASURED = """
import resource, sys
from cwm_jax import cli
code = cli.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, code)
"""


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory):
  config = {"model": command_line.MODEL}
  path = tmp_path_factory.mktemp("weights") / "random.safetensors"
  return weights.save(path, command_line.random_params(config), config)


def _peak_bytes(folder, weights_path, count):
  """Of `cwm-jax track` on a video of so many frames, overlay included."""
  few = command_line.frames(8, 480, 640)
  frames = itertools.islice(itertools.cycle(few), count)
  video = viz.write_mp4(folder / f"{count}.mp4", frames, fps=25)
  out = folder / str(count)
  argv = ["track", video, "--grid", "2", "--masks", "1", "--weights", weights_path, "--out", out]
  done = subprocess.run(
    [sys.executable, "-c", _MEASURED, *argv],
    capture_output=True,
    text=True,
    check=True,
    # Hundreds of questions: what is computed counts for more here than what is compiled.
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
  )
  assert np.load(out / "tracks.npz")["tracks_xy"].shape == (4, count, 2)
  assert (out / "overlay.mp4").exists()
  peak, code = done.stdout.split()[-2:]
  assert code == "0"
  return 1024 * int(peak)


def test_ten_times_the_frames_take_at_most_a_third_more_memory(tmp_path, weights_path):
  """Frames of 0.9 MB: 270 that were kept would take 250 MB more, and their overlays as much."""
  short, long = (_peak_bytes(tmp_path, weights_path, count) for count in (30, 300))
  print(f"peak memory: {short / 2**20:.0f} MiB at 30 frames, {long / 2**20:.0f} at 300")
  assert long <= 1.3 * short
