"""The loop from end to end, in this process: what a run leaves behind, and how another begins."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_job
from PIL import Image

from cwm_jax import checkpoint, train
from cwm_jax.pretrained import weights
from cwm_jax.types import InputError


def job(**changes):
  config = tiny_job.get_config()
  config.update_from_flattened_dict(changes)
  return config


def _profiled(workdir):
  """What `launch/bench profile` says of a run."""
  script = tiny_job.ROOT / "launch" / "bench_profile.py"
  return subprocess.run([sys.executable, script, workdir], capture_output=True, text=True)


def _pictured_frames(workdir, step):
  """The frames on a picture of predictions, its left half."""
  with Image.open(workdir / "pictures" / f"prediction_{step:08d}.png") as sheet:
    return np.asarray(sheet)[:, : sheet.width // 2]


def test_a_run_that_traced_nothing_has_no_profile(tmp_path):
  done = _profiled(tmp_path)
  assert done.returncode == 2 and "no trace there" in done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of 3 steps that kept an average, evaluated and drew at its end: (workdir, state)."""
  workdir = tmp_path_factory.mktemp("finished")
  changes = {
    "total": "3 steps",
    "optim.ema_decay": 0.5,
    "log.eval_scenes": 2,
    "log.eval_masks": 1,
    "log.eval_every": "100 steps",
    "log.images_every": "2 steps",
    "log.peak_tflops": 1.0,
    "profile_steps": 1,
  }
  return workdir, train.train(job(**changes), workdir)


def test_a_run_leaves_rows_pictures_a_config_a_trace_and_its_last_state(finished):
  workdir, state = finished
  rows = tiny_job.rows(workdir)
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert {"loss", "copy_loss", "grad_norm", "learning_rate", "compilations"} <= rows[0].keys()
  assert rows[2]["flops_utilisation"] > 0
  assert "eval/shifts/median" in rows[2] and "eval/shifts/median" not in rows[1]
  pictures = sorted(path.name for path in (workdir / "pictures").iterdir())
  assert pictures == [
    "batch_00000000.png",
    "prediction-over-training.png",
    "prediction_00000002.png",
    "prediction_00000003.png",
  ]
  shares = json.loads(_profiled(workdir).stdout)["shares"]
  assert shares["matrix_products"] > 0 and sum(shares.values()) == pytest.approx(1, abs=0.01)
  params, config = checkpoint.load_params(workdir)
  assert config["model"]["encoder_width"] == 32
  jax.tree.map(np.testing.assert_array_equal, params, state.ema)


def test_a_finished_run_started_again_does_nothing(finished):
  workdir, state = finished
  before = (workdir / "metrics.jsonl").read_text()
  config = job(**{"total": "3 steps", "optim.ema_decay": 0.5})
  again = train.train(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, again, state)
  assert (workdir / "metrics.jsonl").read_text() == before


def test_a_run_starts_from_another_s_average_or_from_a_weights_file(finished, tmp_path):
  workdir, state = finished
  file = weights.save(tmp_path / "w.safetensors", state.ema, job().to_dict())
  for source in (workdir, file):
    fresh = jax.tree.map(lambda leaf: leaf * 0, state)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    begun = train.start_from(source, fresh, places)
    jax.tree.map(np.testing.assert_array_equal, begun.params, state.ema)
    jax.tree.map(np.testing.assert_array_equal, begun.ema, state.ema)
    assert int(begun.step) == 0


def test_weights_of_another_model_are_refused_with_both_sides_named(finished, tmp_path):
  _, state = finished
  other = dict(state.params, tail={"bias": np.zeros(3, np.float32)})
  del other["mask_token"]
  file = weights.save(tmp_path / "w.safetensors", other, job().to_dict())
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  with pytest.raises(InputError, match="(?s)missing: mask_token.*unexpected: tail/bias"):
    train.start_from(file, state, places)


def test_stop_after_leaves_early_with_a_checkpoint(finished, tmp_path):
  workdir, _ = finished
  for name in ("checkpoints", "config.json", "metrics.jsonl"):
    copy = shutil.copytree if (workdir / name).is_dir() else shutil.copy
    copy(workdir / name, tmp_path / name)
  changes = {"total": "3000 steps", "optim.ema_decay": 0.5, "stop_after": "2 steps"}
  state = train.train(job(**changes, **{"log.images_every": "4 steps"}), tmp_path)
  assert int(state.step) == 5
  # What is drawn over and over is the same pair in all of a run's lives.
  np.testing.assert_array_equal(
    _pictured_frames(tmp_path, step=4), _pictured_frames(workdir, step=2)
  )
  changes["stop_after"] = "0.001 seconds"
  state = train.train(job(**changes), tmp_path)
  assert int(state.step) == 5
  assert [row["step"] for row in tiny_job.rows(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
  "changes, told",
  [
    ({"total": "soon"}, r"config\.total.*'soon'"),
    ({"total": "3 epochs"}, "endless"),
    ({"checkpoint.every": "8 minutes"}, r"config\.checkpoint\.every"),
    ({"stop_after": "8 parsecs"}, r"config\.stop_after.*parsecs"),
    ({"data.batch_size": 9, "optim.accumulate": 2}, "multiple of optim.accumulate"),
    ({"data.sources.scenes.weight": 0.0}, "no data source"),
    ({"init_from": "/nowhere"}, "/nowhere"),
    ({"mesh.data": 3}, "number of devices"),
    ({"optim.freeze": "no_such_part"}, "no_such_part"),
  ],
)
def test_a_config_that_cannot_be_is_told_in_a_sentence(tmp_path, changes, told):
  with pytest.raises(InputError, match=told):
    train.train(job(**changes), tmp_path)
