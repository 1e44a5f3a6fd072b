"""One process of one device, two of two or four of one: the same numbers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import segment_questions
import tiny_job
from tapvid_clips import write_clip

from cwm_jax import evaluate, viz
from cwm_jax.configs import eval_tapvid
from cwm_jax.data import flowfiles
from cwm_jax.evals import named, segments, trackers

SCRIPT = """
import json, sys
import jax

rank, count, devices, port, workdir, settings = sys.argv[1:]
rank, count, settings = int(rank), int(count), json.loads(settings)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=rank)
assert jax.process_count() == count and jax.local_device_count() == int(devices)
from cwm_jax import evaluate
from cwm_jax.evals import named
from cwm_jax.configs import eval_tapvid
from cwm_jax.evals import segments, trackers
import segment_questions

class Toy(trackers.PairTracker):
  # Says that everything moves right, by a number that lies on the device that built it.

  def __init__(self):
    super().__init__()
    self._step = jax.numpy.ones(()) * 2

  def flow(self, frame1, frame2, points):
    step = self._step + 1
    used.update(step.devices())
    return trackers.ZeroMotion().flow(frame1, frame2, points + [float(step), 0])

  def ask(self, fn, frame1, frame2, point_xy):
    asked.append(point_xy)
    return jax.numpy.asarray(frame1).mean(axis=-1) - 128 * (self._step - 1)

used, asked = set(), []
named.Tracker.load = lambda path, **settings: Toy()
config = eval_tapvid.get_config()
for key in ("trackers", "protocols"):
  settings[key] = tuple(settings[key])
config.evaluate.update(settings)
numbers = evaluate.run(config, f"{workdir}/{rank}")
questions = segment_questions.make(5)
one = named.build("mm2", config.evaluate)[0]
numbers["segments"] = {"mm2": dict(segments.SegmentsEvaluator(one, questions, radius=0.2).run())}
# What is done is not done again, even where a process cannot see the first one's files.
assert set(evaluate.run(config, f"{workdir}/{rank}")["tapvid/first"]) == {"mm2", "zero"}
# There are clips for each of this process's devices.
assert used == set(jax.local_devices())
assert len(asked) == len(range(rank, 5, count))
print("NUMBERS" + json.dumps(numbers))
"""


@pytest.fixture
def settings(tmp_path):
  """Eight clips, one of them broken, and five pairs; the `evaluate` section that names them."""
  for i in range(8):
    write_clip(tmp_path / "clips" / f"clip{i}", frames=3 + i % 2, hw=(24, 32), points=2, seed=i)
  (tmp_path / "clips" / "clip3" / "video" / "001.png").unlink()
  rng = np.random.default_rng(0)
  for i in range(5):
    pair = tmp_path / "pairs" / f"pair{i}"
    pair.mkdir(parents=True)
    for frame in ("frame10.png", "frame11.png"):
      viz.write_png(pair / frame, rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    flow_xy = rng.normal(size=(24, 32, 2)).astype(np.float32)
    flowfiles.write_flo(pair / "flow10.flo", flow_xy)
  clips = str(tmp_path / "clips")
  return dict(tapvid=clips, trackers=("mm2", "zero"), protocols=("first",), overlays=1,
              flow_pairs=str(tmp_path / "pairs"))  # fmt: skip


class _Toy(trackers.PairTracker):
  def flow(self, frame1, frame2, points):
    return trackers.ZeroMotion().flow(frame1, frame2, points + [3.0, 0.0])

  def ask(self, fn, frame1, frame2, point_xy):
    return frame1.mean(axis=-1) - 128


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_several_processes_find_what_one_finds(count, devices, tmp_path, settings, monkeypatch):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  arguments = [str(count), str(devices), port, str(tmp_path), json.dumps(settings)]
  environment = tiny_job.environment(XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
  ways = dict(cwd=tiny_job.ROOT, env=environment, text=True)
  ways |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  together = [
    subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), *arguments], **ways)
    for rank in range(count)
  ]
  try:
    said = [process.communicate(timeout=240) for process in together]
  finally:
    for process in together:
      process.kill()
  found = []
  for process, (out, err) in zip(together, said):
    assert process.returncode == 0, err[-3000:]
    found.append(json.loads(out.partition("NUMBERS")[2]))
  config = eval_tapvid.get_config()
  config.evaluate.update(settings)
  monkeypatch.setattr(named.Tracker, "load", lambda path, **_: _Toy())
  alone = evaluate.run(config, tmp_path / "alone")
  asked = segments.SegmentsEvaluator(_Toy(), segment_questions.make(5), radius=0.2)
  alone["segments"] = {"mm2": dict(asked.run())}
  for numbers in found:
    assert numbers.keys() == alone.keys()
    for data_set, rows in alone.items():
      for tracker, want in rows.items():
        got = numbers[data_set][tracker]
        for name in set(want) - {"seconds"}:
          np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=f"{data_set} {name}")
    clips = numbers["tapvid/first"]["mm2"]
    assert clips["num_clips"] == 7 and clips["num_skipped"] == 1
    assert numbers["segments"]["mm2"]["num_points"] == 5
  # Each kept its own clips, and the first one alone reports.
  kept = [
    {path.stem for path in (tmp_path / str(rank) / "answers" / "first" / "mm2").glob("*.npz")}
    for rank in range(count)
  ]
  assert kept == [{f"clip{i}" for i in range(rank, 8, count) if i != 3} for rank in range(count)]
  assert "(mean)" in (tmp_path / "0" / "tapvid" / "first" / "mm2" / "clips.txt").read_text()
  assert not (tmp_path / "1" / "tapvid").exists()
