"""The benches: what their rows say, at the smallest settings, and how two files of rows compare."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import command_line
import jax
import numpy as np
import pytest
import tiny_clips
import tiny_job
import tiny_model

from cwm_jax import progress
from cwm_jax.configs import base
from cwm_jax.pretrained import weights

LAUNCH = tiny_job.ROOT / "launch"
EVERY_ROW = {"measure", "baseline", "ratio", "flops_utilisation", "peak_mib", "compilations"} | {
  *("machine", "cores", "device", "devices", "versions")
}
ALONE = "reading and decoding alone"
PARTS = ("read_decode", "crop_resize", "handover", "copy", "render")


def bench(part, *arguments):
  """The rows that a bench prints."""
  done = subprocess.run(
    [sys.executable, str(LAUNCH / f"bench_{part}.py"), *map(str, arguments)],
    env=tiny_job.environment(XLA_FLAGS=tiny_job.QUICK),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return [json.loads(line) for line in done.stdout.splitlines()]


def check(row, *numbers):
  """What is asked of each row: all facts, and numbers that can be."""
  assert row.keys() >= EVERY_ROW | set(numbers)
  for name in (*numbers, "peak_mib"):
    assert isinstance(row[name], int | float) and row[name] > 0, name
  # The tests' processor has no peak that anyone knows. A process with JAX in it takes this much.
  assert row["flops_utilisation"] is None and row["peak_mib"] > 100
  assert isinstance(row["compilations"], int) and row["compilations"] >= 0
  assert (row["baseline"] is None) == (row["ratio"] is None)
  assert row["ratio"] is None or row["ratio"] > 0
  assert row["machine"] and row["device"] == jax.devices()[0].device_kind
  assert row["versions"]["jax"] == jax.__version__ and "python" in row["versions"]


@pytest.mark.parametrize(
  "sources",
  [
    {"scenes": "training of pretrain_tiny:runlocal"},
    {"video": "bare PyAV", **dict.fromkeys(("frames", "tfds", "labels"), ALONE)},
  ],
  ids=" and ".join,
)
def test_the_data_bench_says_what_bounds_each_source(sources, tmp_path):
  for number in range(2):
    tiny_clips.write_video(tmp_path / f"{number}.mp4", 12, 20 * number)
  small = ("--image", 16, "--stage", "runlocal", "--batch", 2, "--batches", 1, "--repetitions", 1)
  rows = bench("data", tmp_path, "--sources", *sources, *small)
  assert [row["source"] for row in rows] == list(sources)
  for row in rows:
    check(row, "pairs_per_second", "loader_pairs_per_second", "baseline_pairs_per_second")
    assert row["baseline"].startswith(sources[row["source"]]) and row["skipped"] == 0
    parts = {part: row[f"{part}_ms"] for part in PARTS}
    assert min(parts.values()) >= 0 and row["bound_by"] == max(parts, key=parts.get)
    assert parts["read_decode"] > 0 and parts["copy"] > 0 and parts["render"] > 0
    # Pairs of frames are brought to size; scenes and labels have it.
    assert (parts["crop_resize"] > 0) == (row["source"] in ("video", "frames", "tfds"))
    host = parts["read_decode"] + parts["crop_resize"] + parts["handover"]
    assert host >= 0.99 * 1000 / row["loader_pairs_per_second"]


def test_the_track_bench_compares_our_schedule_with_the_release_s():
  size = ("--image", 32, "--width", 16, "--depth", 1, "--heads", 2, "--video", 32, 48)
  rows = bench("track", *size, "--points", 2, "--masks", 1, "--repetitions", 1)
  assert [row["side"] for row in rows] == ["ours", "release schedule"]
  for row in rows:
    check(row, "points_per_second", "passes_per_point", "cpu_seconds_per_point", "compilations")
    assert row["baseline"] == "release schedule" and row["same_destinations"] == 1
  ours, theirs = rows
  rates = ours["points_per_second"] / theirs["points_per_second"]
  assert theirs["ratio"] == 1 and ours["ratio"] == pytest.approx(rates, rel=0.01)


# The other side of the train bench: a Python that has no torch, but says what is asked of one.
STAND_IN = f"""#!{sys.executable}
import json, sys
print(json.dumps(dict(versions="stand-in 1")), flush=True)
for line in sys.stdin:
  losses = [1.0] * json.loads(line)["steps"]
  print(json.dumps(dict(losses=losses, seconds=4.0, cpu=8.0)), flush=True)
"""


def test_the_train_bench_compares_our_step_with_another_side_s(tmp_path):
  python = tmp_path / "python"
  python.write_text(STAND_IN)
  python.chmod(0o755)
  small = ("--stage", "runlocal", "--batch", 2, "--steps", 2, "--repetitions", 1, "--devices", 2)
  (row,) = bench("train", *small, "--torch-python", python)
  check(row, "pairs_per_second", "gflop_per_second", "cpu_seconds_per_pair", "compilations")
  assert (row["devices"], row["baseline"], row["baseline_pairs_per_second"]) == (2, "stand-in 1", 1)
  assert row["ratio"] == pytest.approx(row["pairs_per_second"], rel=0.01)


def test_the_scaling_bench_compares_devices_with_one():
  rows = bench("scaling", "--virtual", 2, "--batch", 2, "--steps", 1, "--repetitions", 1)
  assert [row["used"] for row in rows] == [1, 2]
  for row in rows:
    check(row, "pairs_per_second", "efficiency", "compilations")
    assert row["baseline"] == "one device"
    assert row["efficiency"] == pytest.approx(row["ratio"] / row["used"], abs=0.002)
  assert rows[0]["ratio"] == 1


def test_the_student_bench_compares_a_flow_network_with_its_teacher(tmp_path):
  config = {"model": tiny_model.config()}
  params = command_line.random_params(config)
  teacher = weights.save(tmp_path / "teacher.safetensors", params, config)
  config = base.get_config()
  config.flow_network.update(tiny_model.flow_network())
  config = config.to_dict()
  params = command_line.random_params(config)
  student = weights.save(tmp_path / "student.safetensors", params, config)
  asked = ("--side", 16, "--points", 1, "--masks", 1, "--repetitions", 1)
  rows = bench("student", "--student", student, "--teacher", teacher, *asked)
  assert [row["measure"] for row in rows] == ["student", "teacher"]
  for row in rows:
    check(row, "pairs_per_second", "seconds_per_pair", "gflop_per_pair", "compilations")
    # Its memory is counted from that of a process that asks nobody.
    assert row["baseline"] == "teacher" and row["mib"] < row["peak_mib"]
  assert rows[1]["ratio"] == 1


def module(name, monkeypatch):
  """A module of launch/, imported anew."""
  monkeypatch.syspath_prepend(LAUNCH)
  monkeypatch.delitem(sys.modules, name, raising=False)
  return __import__(name)


def test_the_flow_bench_takes_a_network_s_own_iterations_and_times_raft_when_asked(monkeypatch):
  flow = module("bench_flow", monkeypatch)
  sea_raft = ["--sea-raft", "code", "--size-name"]
  own = {size: flow._options([*sea_raft, size]) for size in "SML"}
  assert {size: options.iterations for size, options in own.items()} == dict(S=4, M=4, L=12)
  assert flow._options([*sea_raft, "L", "--iterations", "7"]).iterations == 7
  assert own["S"].time and flow._options(["--time"]).time and not flow._options([]).time


@pytest.mark.parametrize("network", ["raft_large", "sea_raft_S"])
def test_the_flow_bench_tells_where_each_side_s_time_goes(network, monkeypatch):
  flow, clock = module("bench_flow", monkeypatch), [0.0]
  monkeypatch.setattr(flow.time, "perf_counter", lambda: clock[0])

  def side(context, features, iteration, reach):
    def run(count):
      assert count or network != "raft_large"  # torchvision's has nothing to give then
      clock[0] += context + (features + count * iteration if count else 0)
      return np.full((16, 24, 2), reach)

    return run

  sides = dict(ours=side(1.0, 4.0, 0.5, 3.0), torch=side(2.0, 3.0, 1.5, 3.25))
  asked = ["--sea-raft", "code"] if network == "sea_raft_S" else ["--time"]
  options = flow._options([*asked, "--repetitions", "1"])
  frames = np.zeros((2, 16, 24, 3), np.float32)
  row, ours, torch = flow.rows(network, sides, frames, options, "torch 1")
  assert (row["network"], row["apart_px"], row["iterations"]) == (network, 0.25, 4)
  assert (row["ours_seconds"], row["torch_seconds"]) == (7.0, 11.0)
  assert row["ratio"] == pytest.approx(11 / 7, abs=0.001) and row["baseline"] == "torch 1"
  parts = {"features_and_correlation": 5.0}
  if network == "sea_raft_S":
    parts = {"context": 1.0, "features_and_correlation": 4.0}
  assert ours.items() >= (parts | dict(iteration=0.5, times=4)).items()
  assert ours["bound_by"] == "features_and_correlation"
  assert (torch["bound_by"], torch["iteration"]) == ("iterations", 1.5)  # four of them
  options.time = False
  (untimed,) = flow.rows(network, sides, frames, options, "torch 1")
  assert untimed["apart_px"] == 0.25 and "ratio" not in untimed


def test_utilisation_is_the_share_of_the_peak_of_the_devices_that_worked(monkeypatch):
  facts = module("bench_facts", monkeypatch)
  assert facts.row("x", compilations=0, flop_per_second=1e12)["flops_utilisation"] is None
  monkeypatch.setattr(progress, "known_tflops", lambda kind: 2.0)
  row = facts.row("x", compilations=0, flop_per_second=1e12, on_devices=4)
  assert row["flops_utilisation"] == 0.125
  assert facts.row("x", compilations=0)["flops_utilisation"] is None  # no network at work


def test_peak_memory_is_the_device_s_where_it_tells_and_else_the_process_s(monkeypatch):
  facts = module("bench_facts", monkeypatch)
  own = facts.peak_mib()
  assert 100 < own < 100_000
  device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**20})
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert facts.peak_mib() == 3.0


FACTS = dict(machine="some", cores=2, device="cpu", devices=1, versions={"jax": "0.10.2"})
STUDENT = dict(measure="student", weights="w", average_distance=13.0, median_distance=5.0,
               delta_avg=0.4, mib=300, scenes=40, side=256, **FACTS)  # fmt: skip
POINTS = dict(measure="passes", study="points", method="fixed", masks=9, marked_a_point=9,
              average_distance=13.0, delta_avg=0.37, points=2000, **FACTS)  # fmt: skip
DENSE = dict(measure="passes", study="dense", method="many marks", marks=16, masks=10, votes=1.0,
             passes=650, average_distance=12.8, delta_avg=0.397, points=768, **FACTS)  # fmt: skip
SOAK = dict(measure="soak", kills=3, kills_in_a_save=1, steps_saved=[5, 10, 20], identical=True,
            steps=64, seconds_undisturbed=9.5, seed=0, **FACTS)  # fmt: skip
HALF = dict(measure="bf16", share_within_1_px=0.95, median_px=0.02, points=500, **FACTS)
DATA = dict(measure="data", source="video", pairs_per_second=80.0, copy_ms=0.2, bound_by="copy",
            ratio=0.9, image_hw=[256, 256], **FACTS)  # fmt: skip
TRACK = dict(measure="track", side="ours", ratio=2.0, passes_per_point=1.1, video=[32, 48], **FACTS)


def compare(tmp_path, monkeypatch, capsys, old, new):
  """(exit code, {number: verdict}, all lines)."""
  for name, rows in (("old", old), ("new", new)):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
  asked = ["bench", str(tmp_path / "old"), str(tmp_path / "new")]
  monkeypatch.setattr(sys, "argv", asked)
  code = module("bench_compare", monkeypatch).main()
  lines = capsys.readouterr().out.splitlines()
  words = [line.split() for line in lines if "->" in line]
  return code, {w[0]: w[-1] for w in words if w[-1] in ("WORSE", "better")}, lines


@pytest.mark.parametrize(
  "row, change",
  [
    (STUDENT, dict(average_distance=15.0)),
    (STUDENT, dict(median_distance=6.0)),
    (STUDENT, dict(delta_avg=0.3)),
    (POINTS, dict(average_distance=20.0)),
    (POINTS, dict(delta_avg=0.2)),
    (DENSE, dict(average_distance=20.0)),
    (DENSE, dict(passes=900)),
    (SOAK, dict(identical=False)),
    (HALF, dict(share_within_1_px=0.7)),
    (HALF, dict(median_px=0.5)),
    (DATA, dict(ratio=0.5)),
    (TRACK, dict(ratio=1.5)),
    (TRACK, dict(passes_per_point=2.0)),
  ],
  ids=lambda value: " ".join(value) if len(value) < 3 else value["measure"],
)
def test_compare_judges_what_each_bench_is_for(row, change, tmp_path, monkeypatch, capsys):
  (name,) = change
  files = ([row], [row | change])
  assert compare(tmp_path, monkeypatch, capsys, *files)[:2] == (1, {name: "WORSE"})
  assert compare(tmp_path, monkeypatch, capsys, *files[::-1])[:2] == (0, {name: "better"})


@pytest.mark.parametrize(
  "row, change",
  [
    (SOAK, dict(steps_saved=[0, 15, 15], kills_in_a_save=2)),
    (DATA, dict(bound_by="handover")),
    (DATA, dict(versions={"jax": "0.11.0"}, baseline="bare PyAV 19")),
  ],
  ids=["moments of kills", "what bounds", "versions"],
)
def test_compare_takes_rows_for_the_same_whatever_a_run_found(
  row, change, tmp_path, monkeypatch, capsys
):
  code, verdicts, lines = compare(tmp_path, monkeypatch, capsys, [row], [row | change])
  assert (code, verdicts) == (0, {})
  assert not [line for line in lines if line.startswith("only in")]


@pytest.mark.parametrize(
  "row, change",
  [
    (DENSE, dict(votes=0.0)),
    (DENSE, dict(masks=20)),
    (POINTS, dict(masks=10)),
    (DATA, dict(image_hw=[64, 64])),
    (SOAK, dict(machine="another")),
  ],
  ids=lambda value: " ".join(value) if len(value) < 3 else value["measure"],
)
def test_compare_keeps_rows_of_other_settings_apart(row, change, tmp_path, monkeypatch, capsys):
  code, verdicts, lines = compare(tmp_path, monkeypatch, capsys, [row], [row | change])
  assert (code, verdicts) == (0, {})
  assert [line.partition(":")[0] for line in lines] == [
    "only in the old file",
    "only in the new file",
  ]
