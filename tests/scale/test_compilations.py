"""A whole evaluation asks few programs of the compiler, whatever clips and points there are."""

from __future__ import annotations

import json

import command_line
import pytest
import tapvid_clips
import tiny_job
import tiny_model

from cwm_jax.pretrained import weights

# All compilations of a process are counted: those of the smallest operation too.
EVALUATION = """
import json, sys
from cwm_jax import progress

counter = progress.CompilationCounter()
from cwm_jax import evaluate
from cwm_jax.configs import eval_tapvid

clips, path, out, argument, tracker, resolution = sys.argv[1:]
config = eval_tapvid.get_config(argument)
config.evaluate.update(
  tapvid=clips, weights=path, trackers=(tracker, "zero"), resolution=resolution, overlays=1
)
found = evaluate.run(config, out)
clips = [rows[tracker]["num_clips"] for rows in found.values()]
print("FOUND" + json.dumps([counter.count, clips]))
"""


@pytest.mark.parametrize(
  "argument, tracker, resolution",
  [
    pytest.param("", "mm2", "native", id="clips of every size, few masks"),
    pytest.param("", "mm10", "native", id="clips of every size, many masks"),
    # Zoom cuts windows out of the video itself; TAP-Vid's own size is one for all clips.
    pytest.param("release", "mm10", "48x64", id="the release's settings, one size"),
  ],
)
def test_an_evaluation_of_clips_of_all_lengths_and_numbers_of_points_compiles_six_programs_at_most(
  argument, tracker, resolution, tmp_path
):
  for number, (frames, hw, points) in enumerate(
    [(7, (64, 96), 1), (9, (80, 64), 4), (8, (48, 64), 18)]
  ):
    tapvid_clips.write_clip(
      tmp_path / "clips" / str(number), frames=frames, hw=hw, points=points, seed=number
    )
  model = {"model": tiny_model.config()}
  path = weights.save(tmp_path / "w.safetensors", command_line.random_params(model), model)
  asked = (tmp_path / "clips", path, tmp_path / "out", argument, tracker, resolution)
  done = tiny_job.run_script(EVALUATION, *map(str, asked), XLA_FLAGS=tiny_job.QUICK)
  assert done.returncode == 0, done.stderr[-2000:]
  count, clips = json.loads(done.stdout.partition("FOUND")[2])
  print(f"programs compiled: {count}")
  assert clips == [3, 3]  # both protocols, all clips
  assert 0 < count <= 6
