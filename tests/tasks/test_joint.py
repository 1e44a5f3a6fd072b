"""Joint training: what is learned, what is frozen, and along which way gradients go."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import joint_job
import numpy as np
import pytest
import tiny_job

from cwm_jax import cli, programs, sharding, study_marks, tasks, train
from cwm_jax.configs import study_interventions
from cwm_jax.models.perturber import Perturber
from cwm_jax.pretrained import mark_files, weights
from cwm_jax.tasks import joint_building
from cwm_jax.types import FramePair, InputError

DOUBLE = dict(image_hw=[32, 32])
TRAINED = dict(total="8 steps", optim__peak_lr=3e-3)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
  return joint_job.weights_file(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def trained(predictor, tmp_path_factory):
  """(workdir, rows, state) of a run with evaluation and pictures at its end."""
  workdir = tmp_path_factory.mktemp("joint")
  config = joint_job.get_config(predictor, **TRAINED, log__eval_scenes=8, log__eval_masks=1)
  state = train.train(config, workdir)
  return workdir, tiny_job.rows(workdir), state


def random_pair(batch=2, side=16):
  frames = np.random.default_rng(0).random((batch, 2, side, side, 3), np.float32)
  return FramePair(jnp.asarray(frames))


def furthest(found, other):
  """Between two trees of arrays, the largest difference."""
  differ = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), dict(found), dict(other))
  return max(jax.tree.leaves(differ))


def test_the_loss_falls_and_the_predictor_stays_what_it_was(predictor, trained):
  _, rows, state = trained
  ratio = [row["loss"] / row["copy_loss"] for row in rows]
  # Psi-flow begins as a copy of frame 1.
  assert ratio[0] == pytest.approx(1.0, rel=1e-5) and ratio[-1] < 0.99
  before, _ = weights.load(predictor)
  jax.tree.map(np.testing.assert_array_equal, state.params["predictor"], before)
  # An optimizer keeps no statistics of what is frozen.
  count = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
  learned = {name: state.params[name] for name in ("perturber", "flow_predictor")}
  assert count < 2.1 * sum(leaf.size for leaf in jax.tree.leaves(learned))


def test_a_run_reports_gradients_responses_the_bottleneck_and_the_learned_mark_s_error(trained):
  workdir, rows, _ = trained
  assert {"perturber_grad_norm", "flow_predictor_grad_norm", "spread_px", "peak"} <= rows[1].keys()
  # Psi-flow's head begins at zero: only then does a gradient reach the perturber.
  assert rows[0]["perturber_grad_norm"] == 0.0 < rows[1]["perturber_grad_norm"]
  last = rows[-1]
  for name in ("zeroed", "exchanged"):
    low, rise, high = (last[f"eval/bottleneck/{name}{end}"] for end in ("_low", "", "_high"))
    assert low < rise < high
  assert last["eval/bottleneck/loss"] > 0
  assert last["eval/shifts/average"] > 0 and last["eval/own_mark/shifts/average"] > 0
  assert last["eval/shifts/still_average"] == last["eval/own_mark/shifts/still_average"]
  assert [path.name for path in (workdir / "pictures").glob("joint_*")] == ["joint_00000008.png"]


def test_gradients_reach_the_perturber_and_psi_flow_and_never_the_predictor(predictor):
  task = tasks.build(joint_job.get_config(predictor))
  params = jax.jit(task.init)(jax.random.key(0))
  params["flow_predictor"]["head"]["kernel"] += 0.1
  pair, keys = random_pair(), jax.random.split(jax.random.key(1), 2)
  grads = jax.jit(jax.grad(lambda p: task.loss(p, pair, keys)[0]))(params)
  sizes = {
    name: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[name])) for name in grads
  }
  assert sizes["predictor"] == 0.0 and sizes["perturber"] > 0 and sizes["flow_predictor"] > 0


def test_queries_are_distinct_patches_and_lie_at_their_centre_or_anywhere(predictor):
  keys = jax.random.split(jax.random.key(3), 5)
  for query, inside in (("centre", {2.5}), ("anywhere", {0.5, 1.5, 2.5, 3.5})):
    config = joint_job.get_config(predictor, joint__query=query, joint__num_points=16)
    points = np.asarray(tasks.build(config).queries(keys))
    assert all(len({tuple(p) for p in pair // 4}) == 16 for pair in points)
    assert set((points % 4).ravel().tolist()) == inside


def test_masks_are_a_point_s_own_or_shared(predictor):
  keys = jax.random.split(jax.random.key(3), 2)
  for masks, count in (("point", 2), ("shared", 1)):
    task = tasks.build(joint_job.get_config(predictor, joint__masks=masks, joint__num_masks=3))
    drawn = np.asarray(task.draw_masks(keys))
    assert drawn.shape == (2, count, 3, 2, 4, 4)
    assert len(np.unique(drawn.reshape(-1, 32), axis=0)) == 2 * count * 3


@pytest.mark.parametrize(
  "key, value, told",
  [
    ("optim__freeze", "", "set optim.freeze to '\\^predictor/'"),
    ("optim__freeze", "predictor", "set optim.freeze to"),
    ("joint__query", "edge", "joint.query is 'edge'; choose one of centre, anywhere"),
    ("joint__masks", "none", "joint.masks is 'none'"),
    ("joint__num_points", 17, "there are 16 patches"),
    ("joint__num_masks", 0, "joint.num_masks is 0"),
    ("joint__protocol", "old", "the protocol is 'old'"),
    ("joint__dtype", "int4", "cannot be built: model.dtype"),
    ("joint__image_hw", (18, 18), "does not divide into patches"),
    ("perturber__init", "grey", "perturber.init is 'grey'; choose one of white, plain, file"),
    ("perturber__init", "file", "name it by perturber.file"),
    ("perturber__scale", 0, "perturber.scale is 0"),
    ("perturber__reach", 1.5, "perturber.reach is 1.5; give a share from 0 to 1"),
    ("perturber__reach", -0.5, "perturber.reach is -0.5"),
    ("joint__weights", "student-tiny", "holds a flow network; name by joint.weights a predictor"),
    ("perturber__size", 3, "a mark of size 3 .* scale of 1\\) is too small .*: 4 is the least"),
    ("flow_predictor__kind", "three_stream", "three_stream"),
  ],
)
def test_settings_that_cannot_be_are_told_in_a_sentence(predictor, key, value, told):
  with pytest.raises(InputError, match=told):
    tasks.build(joint_job.get_config(predictor, **{key: value}))


def test_psi_flow_begins_as_no_predictor_of_normalised_patches(predictor, tmp_path):
  params, stored = weights.load(predictor)
  stored["pretrain"] = {"target": "normalised"}
  path = weights.save(tmp_path / "normalised.safetensors", params, stored)
  tasks.build(joint_job.get_config(path))
  with pytest.raises(InputError, match="normalised.safetensors predicts patches without"):
    tasks.build(joint_job.get_config(path, flow_predictor__kind="moved"))


def test_the_study_s_settings_train_and_the_mark_is_the_average_of_what_was_learned(
  predictor, tmp_path, monkeypatch
):
  config = study_interventions.get_config()
  task = tasks.build(config)
  assert task.image_hw == (64, 64) and task.mark_size == 5
  # The same on a predictor that compiles in a moment.
  config.joint.update(weights=str(predictor), num_points=2)
  config.perturber.update(hidden_width=8, size=5)
  config.optim.warmup = "1 steps"
  task, mesh = tasks.build(config), sharding.make_mesh(**config.mesh)
  # A step gives up the memory of what it trains.
  begun, frozen = (jax.tree.leaves(task.given[name]) for name in ("flow_predictor", "predictor"))
  assert not any(np.shares_memory(a, b) for a, b in zip(begun, frozen, strict=True))
  made = programs.build(config, task, mesh, steps=lambda value, _: int(value.split()[0]))
  state = train.with_params(made.create(jax.random.key(0)), task.given, made.places)
  for _ in range(3):
    state, metrics = made.update(state, random_pair())
    assert metrics["perturber_grad_norm"] > 0  # from the first step on
  before, _ = weights.load(predictor)
  jax.tree.map(np.testing.assert_array_equal, state.params["predictor"], before)
  assert 0 < furthest(state.params["flow_predictor"], before) < 1e-2
  monkeypatch.setattr(train, "run", lambda *_: train.Outcome(state, 3, False))
  mark = study_marks.learned(config, tmp_path, "learned", 0, weights_sha256="")
  assert furthest(weights.load_perturber(mark), state.ema["perturber"]) == 0
  assert furthest(weights.load_perturber(mark), state.params["perturber"]) > 1e-5


def test_a_perturber_begins_white_plain_or_as_a_file_says(predictor, tmp_path):
  _, stored = joint_building.predictor_file(str(predictor))
  net = Perturber(hidden_width=6)
  params = jax.jit(net.init)(jax.random.key(9), jnp.zeros(16))["params"]
  path = mark_files.save(tmp_path / "mark.safetensors", params, model=stored["model"], size=5)
  changes = dict(perturber__init="file", perturber__file=str(path))
  task = tasks.build(joint_job.get_config(predictor, **changes))
  jax.tree.map(np.testing.assert_array_equal, task.given["perturber"], params)
  for kind in ("white", "plain"):
    task = tasks.build(joint_job.get_config(predictor, perturber__init=kind))
    assert task.perturber.init_kind == kind and set(task.given) == {"predictor"}


def test_a_mark_that_begins_from_a_file_has_the_file_s_geometry_and_is_saved_with_it(
  predictor, tmp_path, caplog
):
  _, stored = joint_building.predictor_file(str(predictor))
  net = Perturber(hidden_width=6)
  params = jax.jit(net.init)(jax.random.key(9), jnp.zeros(16))["params"]
  told = dict(size=7, scale=2, on_pixel=False, reach=0.25)
  path = mark_files.save(tmp_path / "mark.safetensors", params, model=stored["model"], **told)
  changes = dict(perturber__init="file", perturber__file=str(path))
  for weights_file, factor in ((predictor, 1), (joint_job.weights_file(tmp_path, **DOUBLE), 2)):
    config = joint_job.get_config(weights_file, **changes)
    want = told | {"scale": 2 * factor}
    caplog.clear()
    with caplog.at_level("INFO", "cwm_jax"):
      task = tasks.build(config)
    mark = task.mark(task.given).func
    assert {name: getattr(mark, name) for name in told} == want
    lines = [line for line in caplog.messages if "keeps what its file says" in line]
    assert len(lines) == 1
    assert f"size 7 (not 5), scale {2 * factor} (not 1), on_pixel False (not True)" in lines[0]
    again = joint_building.save_mark(tmp_path / "again.safetensors", {"perturber": params}, config)
    config = weights.read_header(again).config
    assert {name: config["mark"][name] for name in told} == want
    assert config["mark"]["hidden_width"] == 6 and config["model"]["image_hw"][0] == 16 * factor


def test_a_run_that_goes_on_after_two_steps_ends_as_one_that_was_not_interrupted(
  trained, predictor, tmp_path
):
  *_, whole = trained
  for stop_after, step in (("2 steps", 2), ("", 8)):
    config = joint_job.get_config(predictor, **TRAINED, stop_after=stop_after)
    state = train.train(config, tmp_path)
    assert int(state.step) == step
  jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_the_mark_that_was_learned_is_written_for_a_tracker(trained, predictor, tmp_path):
  workdir, _, state = trained
  config = joint_job.get_config(predictor)
  path = joint_building.save_mark(tmp_path / "mark.safetensors", state.params, config)
  _, stored = joint_building.predictor_file(str(predictor))
  read, _ = mark_files.read(path, model=stored["model"])
  jax.tree.map(np.testing.assert_array_equal, read, jax.device_get(state.params["perturber"]))
  converted = tmp_path / "converted.safetensors"
  assert cli.main(["convert", str(workdir), str(converted)]) == 0
  assert converted.read_bytes()[-1000:] == path.read_bytes()[-1000:]
  with pytest.raises(InputError, match="only a joint training learns a mark"):
    joint_building.save_mark(path, state.params, tiny_job.get_config())


@pytest.mark.parametrize("side, scale, size", [(64, 1, 5), (128, 2, 5), (128, 1, 10), (256, 1, 20)])
def test_a_mark_has_the_paper_s_share_of_the_image_whatever_its_scale(side, scale, size):
  section = joint_job.get_config("")["perturber"]
  section.update(size=0, scale=scale)
  assert joint_building.mark_size(section, (side, side)) == size


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_training_goes_on_at_twice_the_size_from_the_smaller_one_s_weights(positions, tmp_path):
  small = joint_job.weights_file(tmp_path, positions=positions, positions_hw=[4, 4])
  config = tiny_job.get_config()
  config.init_from, config.total = str(small), "1 steps"
  _, stored = joint_building.predictor_file(str(small))
  config.model.update({**stored["model"], "image_hw": (32, 32)})
  config.optim.warmup = "0 steps"
  state = train.train(config, tmp_path / "double")
  before, _ = weights.load(small)
  # One AdamW step from the smaller size's weights, and not from scratch.
  assert 0 < furthest(state.params, before) < 3e-3
