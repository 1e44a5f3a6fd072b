"""Metric rows, pictures, and what is left of them when a run goes back to a checkpoint."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2

from cwm_jax import writers


def read_rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_one_row_however_often_it_is_written(tmp_path):
  writer = writers.create(tmp_path)
  writer.write_scalars(1, {"loss": np.float32(0.5)})
  writer.write_scalars(2, {"loss": 0.25})
  writer.write_scalars(2, {"eval/median": float("nan")})
  writer.close()
  assert read_rows(tmp_path / writers.JSONL) == [
    {"step": 1, "loss": 0.5},
    {"step": 2, "loss": 0.25, "eval/median": None},
  ]


def test_rows_beyond_the_resumed_step_and_cut_rows_are_dropped(tmp_path):
  path = tmp_path / writers.JSONL
  path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"st')
  writer = writers.create(tmp_path, resume_step=2)
  writer.write_scalars(3, {"loss": 0.5})
  writer.close()
  assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 3), (2, 2), (3, 0.5)]


def test_rows_of_steps_that_are_done_stay_beyond_the_resumed_step(tmp_path):
  path = tmp_path / writers.JSONL
  path.write_text("".join(f'{{"step": {step}, "loss": 9}}\n' for step in (1, 2, 3, 4, 5)))
  writer = writers.create(tmp_path, resume_step=1, done={3, 5})
  writer.write_scalars(2, {"loss": 0.5})
  writer.close()
  assert [(row["step"], row["loss"]) for row in read_rows(path)] == [
    (1, 9), (3, 9), (5, 9), (2, 0.5),
  ]  # fmt: skip


def test_other_processes_write_no_files(tmp_path):
  writer = writers.create(tmp_path, just_logging=True)
  writer.write_scalars(1, {"loss": 0.5})
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_scalars_and_images_reach_tensorboard(tmp_path):
  writer = writers.create(tmp_path)
  writer.write_scalars(7, {"loss": 0.5})
  writer.write_images(7, {"batch": np.zeros((2, 4, 4, 3), np.float32)})
  writer.close()
  [path] = tmp_path.glob("events*")
  values = {
    (event.step, value.tag.split("/")[0])
    for event in _events(path.read_bytes())
    for value in event.summary.value
  }
  assert {(7, "loss"), (7, "batch")} <= values


def _events(data: bytes):
  """The events of a record file: length, its check, payload, its check."""
  at = 0
  while at < len(data):
    length = int.from_bytes(data[at : at + 8], "little")
    yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
    at += length + 16


def test_pictures_are_stacked_into_one_file(tmp_path):
  writer = writers.create(tmp_path)
  images = np.stack([np.zeros((4, 6, 3)), np.ones((4, 6, 3))])
  writers.write_pictures(writer, tmp_path, 12, {"batch": images})
  writer.close()
  sheet = np.asarray(Image.open(tmp_path / "pictures" / "batch_00000012.png"))
  assert sheet.shape == (8, 6, 3)
  assert sheet[:4].max() == 0 and sheet[4:].min() == 255


def test_the_history_of_a_picture_shows_its_first_example_at_each_step_up_to_now(tmp_path):
  writer = writers.create(tmp_path)
  for step in (100, 200, 300):
    level = np.full((2, 4, 6, 3), step / 400)
    level[1] = 0.0
    writers.write_pictures(writer, tmp_path, step, {"mark": level})
    # A run that was killed had gone further; its pictures are still there.
    writers.write_history(writer, tmp_path, min(step, 200), "mark", 4)
  writer.close()
  strip = np.asarray(Image.open(tmp_path / "pictures" / "mark-over-training.png"))
  assert strip.shape == (8, 6, 3)
  assert (strip[:4] == 64).all() and (strip[4:] == 128).all()
