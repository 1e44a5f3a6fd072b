"""Learning flow from points: what counts, what is evaluated, and a run from labels to a tracker."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import label_job
import numpy as np
import pytest
import tiny_job

from cwm_jax import conversion, label, tasks, train
from cwm_jax.configs import distill_tiny
from cwm_jax.flow_tracker import FlowNetworkTracker
from cwm_jax.tasks import distill, held_out_flow
from cwm_jax.tracker import Tracker
from cwm_jax.types import FlowEstimate, FramePair, InputError, PointLabels

SIDE = 16


class Everywhere(nn.Module):
  """Says one flow, its only parameter, of every pixel."""

  @nn.compact
  def __call__(self, frames, *, every=False):
    said = self.param("flow", nn.initializers.zeros, (2,))
    flow_xy = jnp.broadcast_to(said, (*frames.shape[:1], *frames.shape[2:4], 2))
    return FlowEstimate(flow_xy[None] if every else flow_xy)


def make(**changes) -> distill.Distill:
  settings = dict(
    network=Everywhere(),
    image_hw=(SIDE, SIDE),
    wants="labels",
    loss_kind="l1",
    gamma=0.8,
    augmentation=None,
    min_confidence=0.5,
    max_round_trip=4.0,
    num_points=64,
    held_out=held_out_flow.HeldOutFlow(
      network=Everywhere(), image_hw=(SIDE, SIDE), presets=("shifts",), num_scenes=3,
      before_seed=1000, max_objects=1, texture_size=0, supersample=2,
    ),
  )  # fmt: skip
  return distill.Distill(**settings | changes)


def labelled() -> FramePair:
  """A pair with four points, of which the first alone passes all filters."""
  labels = PointLabels(
    points_xy=jnp.full((1, 4, 2), 8.5),
    flow_xy=jnp.array([[[3.0, 1.0], [50.0, 0.0], [60.0, 0.0], [70.0, 0.0]]]),
    confidence=jnp.array([[0.9, 0.4, 0.9, 0.9]]),
    visible=jnp.array([[True, True, False, True]]),
    round_trip=jnp.array([[1.0, 1.0, 1.0, 9.0]]),
  )
  return FramePair(jnp.zeros((1, 2, SIDE, SIDE, 3)), labels=labels)


def keys(count: int):
  return jax.random.split(jax.random.key(0), count)


def test_labels_that_are_hidden_unsure_or_do_not_come_back_do_not_count():
  task = make()
  params = {"flow": jnp.array([1.0, 2.0])}
  loss, metrics = task.loss(params, labelled(), keys(1))
  assert float(loss) == pytest.approx(1.5)
  assert float(metrics["kept"]) == 0.25
  assert float(metrics["error"]) == pytest.approx(5**0.5, rel=1e-5)
  assert float(metrics["still_error"]) == pytest.approx(10**0.5, rel=1e-5)
  grads = jax.grad(lambda p: task.loss(p, labelled(), keys(1))[0])(params)
  np.testing.assert_allclose(grads["flow"], [-0.5, 0.5], atol=1e-6)


def test_supervised_the_truth_of_visible_pixels_is_what_counts():
  flow = jnp.full((1, SIDE, SIDE, 2), 100.0).at[:, :, :4].set(jnp.array([2.0, 0.0]))
  visible = jnp.zeros((1, SIDE, SIDE), bool).at[:, :, :4].set(True)
  pair = FramePair(jnp.zeros((1, 2, SIDE, SIDE, 3)), flow_xy=flow, visible=visible)
  loss, metrics = make(wants="truth").loss({"flow": jnp.array([2.0, 0.5])}, pair, keys(1))
  assert float(loss) == pytest.approx(0.25)
  assert 0.1 < float(metrics["kept"]) < 0.4


def test_on_held_out_scenes_a_network_that_says_no_motion_is_as_good_as_no_motion():
  told = dict(make().evals({"flow": jnp.zeros(2)}))
  assert told["shifts/average"] == pytest.approx(told["shifts/still_average"], rel=1e-5)
  assert told["shifts/median_share"] == pytest.approx(1.0)
  # At 256 x 256 scenes move by up to 0.22 of the side along each axis.
  assert 5 < told["shifts/still_average"] < 80


@pytest.mark.parametrize(
  "changes, told",
  [
    ({"loss_kind": "l2"}, "choose one of laplace, l1"),
    ({"gamma": 0.0}, "distill.gamma is 0.0"),
    ({"wants": "truth", "num_points": 0}, "distill.points is 0"),
  ],
)
def test_settings_that_cannot_be_are_a_sentence(changes, told):
  with pytest.raises(InputError, match=told):
    make(**changes)


def tiny(task: str):
  """A RAFT of a few channels."""
  c = tiny_job.get_config()
  c.task, c.total = task, "2 steps"
  c.flow_network.update(
    distill_tiny.STUDENT
    | dict(kind="raft", gru="square", image_hw=(SIDE, SIDE), stem_width=4, widths=(4, 4, 8),
           context_norm="instance", feature_width=4, hidden_width=4, context_width=4,
           corr_widths=(4,), flow_widths=(4, 4), motion_width=6, head_width=4, radius=1, levels=1,
           iterations=1)
  )  # fmt: skip
  c.label.image_hw = (SIDE, SIDE)
  c.distill.update(loss="l1", points=8)
  c.data.batch_size = 2
  c.optim.update(schedule="one_cycle", warmup="1 steps")
  return c


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
  """Labels of a tracker that says that nothing moves."""
  folder = tmp_path_factory.mktemp("labels")
  label.run(label_job.get_config(), folder)
  return folder


def test_from_labels_to_a_tracker(labels, tmp_path):
  config = tiny("distill")
  config.data.sources.scenes.weight = 0.0
  config.data.sources.labels.update(weight=1.0, paths=str(labels))
  config.label.min_confidence = 0.0
  config.log.eval_scenes = 2
  train.train(config, tmp_path / "run")
  first, last = tiny_job.rows(tmp_path / "run")
  assert first["step"] == 1 and last["step"] == 2
  assert first["kept"] > 0.5 and np.isfinite(last["eval/shifts/median"])
  assert (tmp_path / "run" / "pictures" / "flow_00000002.png").is_file()
  conversion.run(
    source=str(tmp_path / "run"), out=str(tmp_path / "student.safetensors"), dtype="float32",
    over=None, keep_base=False, like=None, heads=None, as_json=True,
  )  # fmt: skip
  tracker = Tracker.load(tmp_path / "student.safetensors")
  assert isinstance(tracker, FlowNetworkTracker)
  frames = np.zeros((2, 24, 40, 3), np.uint8)
  flow_xy, _ = tracker.dense_flow(*frames, stride=8)
  assert flow_xy.shape == (3, 5, 2) and np.isfinite(flow_xy).all()


def test_supervised_training_takes_scenes_and_not_labels(labels, tmp_path):
  config = tiny("supervised")
  config.log.eval_scenes = 0
  train.train(config, tmp_path)
  assert 0 < tiny_job.rows(tmp_path)[-1]["kept"] <= 1
  config.data.sources.labels.update(weight=1.0, paths=str(labels))
  with pytest.raises(InputError, match="learns from data.sources.scenes; set the weight of labels"):
    tasks.build(config)


def test_a_mixture_of_laplacians_needs_a_network_that_says_one():
  config = tiny("supervised")
  config.distill.loss = "laplace"
  with pytest.raises(InputError, match="what only sea_raft says"):
    tasks.build(config)
