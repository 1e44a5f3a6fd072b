"""Checkpoints: what is kept, what is read back, what happens when something is broken."""

from __future__ import annotations

import json
import logging

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import checkpoint
from cwm_jax.types import InputError, TrainState

CONFIG = {
  "total": "6 steps",
  "cpu_devices": 1,
  "model": {"patch": 4, "remat": "none"},
  "data": {"batch_size": 8, "num_workers": 0},
  "log": {"every": "1 steps"},
  "evaluate": {"scenes": 0},
}


def numbers():
  return iter(grain.MapDataset.range(100).to_iter_dataset())


def state_at(step, ema=False):
  params = {"a": {"kernel": jnp.full((2, 2), float(step))}}
  average = {"a": {"kernel": jnp.full((2, 2), step + 0.5)}} if ema else None
  return TrainState(jnp.asarray(step, jnp.int32), params, ({"mu": params},), average)


def abstract(state):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
  )


def save(workdir, steps, *, keep=2, keep_every=0, ema=False):
  checkpoints = checkpoint.Checkpoints(workdir, keep=keep, keep_every=keep_every)
  checkpoint.keep_config(workdir, CONFIG)
  iterator = numbers()
  for step in range(1, max(steps) + 1):
    next(iterator)
    if step in steps:
      checkpoints.save(step, state_at(step, ema), iterator)
  checkpoints.close()


def restore(workdir, ema=False):
  checkpoints = checkpoint.Checkpoints(workdir)
  iterator = numbers()
  state = checkpoints.restore(abstract(state_at(0, ema)), iterator)
  return checkpoints, state, iterator


def spoil(workdir, step):
  """Overwrites every file of a checkpoint's arrays."""
  for path in (workdir / "checkpoints" / str(step) / "state").rglob("*"):
    if path.is_file():
      path.write_bytes(b"spoilt")


def test_state_and_iterator_come_back_together(tmp_path):
  save(tmp_path, [2, 3], ema=True)
  checkpoints, state, iterator = restore(tmp_path, ema=True)
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, state, state_at(3, ema=True))
  assert next(iterator) == 3


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
  checkpoints, state, _ = restore(tmp_path)
  checkpoints.close()
  assert state is None


def test_the_newest_are_kept_and_every_so_many_for_good(tmp_path):
  save(tmp_path, range(1, 8), keep=2, keep_every=3)
  assert {int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")} == {3, 6, 7}


def test_a_spoilt_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, caplog):
  save(tmp_path, [2, 3])
  spoil(tmp_path, 3)
  with caplog.at_level(logging.WARNING, logger="cwm_jax"):
    checkpoints, state, iterator = restore(tmp_path)
  assert int(state.step) == 2 and next(iterator) == 2
  assert "step 3 cannot be read" in caplog.text
  # The run will come by step 3 again and must be able to save there.
  checkpoints.save(3, state_at(30), iterator)
  checkpoints.close()
  checkpoints, state, _ = restore(tmp_path)
  checkpoints.close()
  assert float(state.params["a"]["kernel"][0, 0]) == 30.0
  assert (tmp_path / "unreadable" / "3").is_dir()


def test_when_no_checkpoint_can_be_read_nothing_starts_from_scratch(tmp_path):
  save(tmp_path, [2, 3])
  spoil(tmp_path, 2)
  spoil(tmp_path, 3)
  with pytest.raises(InputError, match="none of the checkpoints"):
    restore(tmp_path)


def test_a_save_that_was_cut_short_is_not_a_checkpoint(tmp_path):
  save(tmp_path, [2])
  (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  checkpoints, state, _ = restore(tmp_path)
  assert checkpoints.steps == [2] and int(state.step) == 2
  checkpoints.close()


@pytest.mark.parametrize(
  "section, key, value",
  [("model", "patch", 8), ("data", "batch_size", 16), ("model", "patch", None)],
)
def test_a_change_of_what_is_learned_is_refused_by_name(tmp_path, section, key, value):
  save(tmp_path, [1])
  changed = {**CONFIG, section: {**CONFIG[section], key: value}}
  with pytest.raises(InputError, match=rf"{section}\.{key}"):
    checkpoint.keep_config(tmp_path, changed)
  assert checkpoint.read_config(tmp_path) == CONFIG


@pytest.mark.parametrize(
  "change",
  [
    {"total": "9 steps"},
    {"log": {"every": "5 steps"}},
    {"evaluate": {"scenes": 9}},
    {"evaluate": {}},
    {"data": {"batch_size": 8, "num_workers": 2}},
    {"model": {"patch": 4, "remat": "full"}},
    {"cpu_devices": 2},
  ],
)
def test_how_long_and_how_it_runs_may_change(tmp_path, change):
  save(tmp_path, [1])
  checkpoint.keep_config(tmp_path, {**CONFIG, **change})
  assert checkpoint.read_config(tmp_path) == {**CONFIG, **change}


@pytest.mark.parametrize("value, refused", [(1, False), (2, True)])
def test_a_key_that_the_run_was_begun_without_keeps_its_default_and_is_told(
  tmp_path, caplog, value, refused
):
  save(tmp_path, [1])
  defaults = {**CONFIG, "model": {**CONFIG["model"], "later": 1}}
  config = {**CONFIG, "model": {**CONFIG["model"], "later": value}}
  caplog.set_level("INFO")
  if refused:
    with pytest.raises(InputError, match=r"model\.later \(1 -> 2\)"):
      checkpoint.keep_config(tmp_path, config, defaults=defaults)
    return
  checkpoint.keep_config(tmp_path, config, defaults=defaults)
  assert checkpoint.read_config(tmp_path) == config
  assert "model.later" in caplog.text


def test_without_checkpoints_any_config_will_do(tmp_path):
  checkpoint.keep_config(tmp_path, CONFIG)
  checkpoint.keep_config(tmp_path, {"model": {"patch": 16}})
  assert checkpoint.read_config(tmp_path) == {"model": {"patch": 16}}


@pytest.mark.parametrize("ema, value", [(False, 3.0), (True, 3.5)])
def test_parameters_are_read_without_the_optimizer_the_average_first(tmp_path, ema, value):
  save(tmp_path, [2, 3], ema=ema)
  params, config = checkpoint.load_params(tmp_path)
  np.testing.assert_array_equal(params["a"]["kernel"], np.full((2, 2), value, np.float32))
  assert config == CONFIG


def test_parameters_of_a_folder_that_is_no_workdir_are_refused(tmp_path):
  with pytest.raises(InputError, match="is it a workdir"):
    checkpoint.load_params(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  with pytest.raises(InputError, match="no checkpoint"):
    checkpoint.load_params(tmp_path)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(InputError, match="cannot be written"):
    checkpoint.Checkpoints(tmp_path / "file" / "run")
