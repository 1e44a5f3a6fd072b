"""Every file of configs/ is a job that can be begun: its keys are the base's, its model builds."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import jax
import pytest

from cwm_jax import checkpoint, schedule, study_marks, tasks
from cwm_jax.configs import (
  base,
  joint_paper,
  joint_tiny,
  opt_cwm,
  pretrain_paper,
  pretrain_sizes,
  pretrain_tiny,
)
from cwm_jax.pretrained import weights
from cwm_jax.types import InputError

FILES = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.py"))
ARGUMENTS = {
  "pretrain_tiny": list(pretrain_tiny.CURRICULA),
  "pretrain_sizes": list(pretrain_sizes.SIZES),
  "joint_tiny": ["", "large", "runlocal"],
  **dict.fromkeys(
    ["study_interventions", "joint_paper", "pretrain_gpu", "pretrain_paper", "eval_scenes"],
    ["", "runlocal"],
  ),
  **dict.fromkeys(["label", "distill_tiny", "supervised_tiny"], ["", "runlocal"]),
}
CONFIGS = [
  (name, argument)
  for name in FILES
  if name not in ("__init__", "base")
  for argument in (ARGUMENTS[name] if name in ARGUMENTS else [""])
]


def load(name: str, argument: str):
  get_config = importlib.import_module(f"cwm_jax.configs.{name}").get_config
  return get_config(argument) if argument else get_config()


def parameters(model) -> int:
  """How many parameters the pretraining task of a model section has."""
  config = base.get_config()
  config.model.update(model)
  shapes = jax.eval_shape(tasks.build(config).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name, argument", CONFIGS)
def test_a_config_changes_keys_of_the_base_and_makes_up_none(name, argument):
  assert _flat(load(name, argument).to_dict()) == _flat(base.get_config().to_dict())


@pytest.mark.parametrize("name, argument", [c for c in CONFIGS if c[0].startswith("pretrain")])
def test_a_training_config_builds_its_task(name, argument):
  config = load(name, argument)
  # Whether this machine has cuDNN is not the config's affair.
  config.model.attention_impl = ""
  task = tasks.build(config)
  assert task.image_hw == tuple(config.model.image_hw)
  schedule.to_steps(config.total, batch_size=config.data.batch_size, epoch_examples=1000)


def test_the_release_s_joint_training_builds_its_task_of_the_release_s_parts():
  task = tasks.build(load("joint_paper", "runlocal"))
  assert task.flow_predictor.setting == "release" and task.average == task.protocol == "release"
  whole = load("joint_paper", "")
  assert whole.optim.b2 == 0.999 and whole.data.sources.video.gap_ms == 500.0
  assert schedule.to_steps(whole.total, batch_size=32, epoch_examples=10_000) == 125_000
  # A mark grows with the predictor only by the key that its header names.
  assert whole.perturber.scale == opt_cwm.MARK_SCALES["opt-cwm-256"]
  grown = opt_cwm.MARK_SCALES["opt-cwm-512"]
  assert f"such as opt-cwm-512, `--config.perturber.scale={grown}`" in joint_paper.__doc__


def test_a_joint_training_is_asked_about_its_flow_before_its_end_and_the_study_s_are_not():
  tiny, study = (load(name, "") for name in ("joint_tiny", "study_interventions"))
  total, every, saved = (
    schedule.to_steps(text, batch_size=tiny.data.batch_size)
    for text in (tiny.total, tiny.log.eval_every, study.log.eval_every)
  )
  assert 0 < every <= total // 2 and tiny.log.eval_scenes > 0
  assert saved == study.log.eval_scenes == 0
  # Which leaves a study's trainings those of before.
  notes = [study_marks.settings(config, weights_sha256="") for config in (tiny, study)]
  assert study_marks.changed(*notes) == []


def test_the_student_s_upper_line_differs_in_who_tells_it_and_in_nothing_else():
  student, upper = (_values(load(name, "")) for name in ("distill_tiny", "supervised_tiny"))
  assert {key for key in student if student[key] != upper[key]} == {
    "task",
    "data.sources.labels.weight",
    "data.sources.scenes.weight",
  }


def test_the_shipped_student_is_what_its_config_makes():
  card = weights.read_header(weights.shipped("student-tiny")).config
  here = json.loads(json.dumps(load("distill_tiny", "").to_dict()))
  for section in ("flow_network", "distill", "optim", "total", "seed"):
    assert here[section] == card[section], section
  made = load("label", "").label
  assert made.min_confidence == card["label"]["min_confidence"]


@pytest.mark.parametrize("name", ["distill_tiny", "supervised_tiny"])
@pytest.mark.parametrize("argument", ["", "runlocal"])
def test_a_student_s_config_builds_its_task(name, argument):
  config = load(name, argument)
  task = tasks.build(config)
  assert task.image_hw == tuple(config.flow_network.image_hw)


def test_sizes_go_from_a_tiny_one_to_vit_l():
  sizes = pretrain_sizes.SIZES
  counts = {size: parameters(load("pretrain_sizes", size).model) for size in sizes}
  assert list(counts.values()) == sorted(counts.values())
  assert counts["tiny"] < 2e6
  # A ViT-L's blocks alone are 24 x 12 x 1024 ** 2 weights.
  assert counts["large"] > 24 * 12 * 1024**2


def test_the_paper_s_batch_is_1024_pairs_150_ms_apart_for_800_epochs():
  config = pretrain_paper.get_config()
  steps = schedule.to_steps(
    config.total, batch_size=config.data.batch_size, epoch_examples=config.data.batch_size
  )
  assert (steps, config.data.batch_size) == (800, 1024)
  weights = {name: source.weight for name, source in config.data.sources.items()}
  assert [name for name, weight in weights.items() if weight] == ["video"]
  assert config.data.sources.video.gap_ms == 150.0
  # Joint training's frames lie further apart.
  assert joint_tiny.get_config().data.sources.video.gap_ms == 500.0
  # ViT-B: 12 blocks of width 768, in the encoder and again in the decoder.
  assert parameters(config.model) > 2 * 12 * 12 * 768**2


def test_marks_for_large_images_are_refused_with_the_shipped_predictor_of_small_ones():
  with pytest.raises(InputError, match="a mark of size 2 .* scale of 2\\) is too small"):
    tasks.build(load("joint_tiny", "large"))


@pytest.mark.parametrize("name, argument", [("pretrain_tiny", "matsch"), ("pretrain_sizes", "xxl")])
def test_an_unknown_argument_is_answered_with_the_known_ones(name, argument):
  with pytest.raises(ValueError, match="choose one of .*"):
    load(name, argument)


def _values(config) -> dict:
  return checkpoint.flat(config.to_dict())


def _flat(tree: dict, prefix: str = "") -> list[str]:
  names = []
  for key, value in tree.items():
    names += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
  return names
