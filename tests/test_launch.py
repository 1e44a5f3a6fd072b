"""The launch scripts: what each would run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import tiny_job
import yaml

LAUNCH = tiny_job.ROOT / "launch"
KEY = "--config.data.sources.video.paths=/a b"


def dry(script, *arguments, **variables):
  """The lines that a script prints instead of running them."""
  asked = ["bash", str(LAUNCH / script), "--dry-run", *arguments]
  done = subprocess.run(
    asked, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def job(script, **variables):
  return dry(script, "configs/some.py:large", "/runs/w", KEY, **variables)


@pytest.mark.parametrize("script", ["gpu", "multiprocess", "slurm", "kubernetes", "tpu"])
def test_without_a_config_and_a_workdir_a_script_says_how_to_call_it(script):
  done = subprocess.run(
    ["bash", str(LAUNCH / script), "--dry-run", "configs/some.py"], capture_output=True, text=True
  )
  assert done.returncode == 2
  assert f"launch/{script} [--dry-run] CONFIG WORKDIR" in done.stderr


def test_gpu_runs_one_process_with_flags_that_hide_communication():
  flags, command = job("gpu", FSDP="4", XLA_FLAGS="--xla_mine=1").splitlines()
  assert "latency_hiding_scheduler=true" in flags and flags.endswith("--xla_mine=1")
  words = shlex.split(command)
  assert words[1:3] == ["-m", "cwm_jax.main"]
  assert {"--config=configs/some.py:large", "--workdir=/runs/w", KEY} <= set(words)
  assert "--config.mesh.fsdp=4" in words and "--distributed" not in words


def test_every_gpu_flag_is_one_that_the_compiler_knows():
  flags = job("gpu", XLA_FLAGS="").splitlines()[0].removeprefix("XLA_FLAGS=")
  # An unknown flag would end the process at once.
  done = tiny_job.run_script("import jax; print(len(jax.devices()))", XLA_FLAGS=flags)
  assert done.returncode == 0, done.stderr[-500:]


def test_multiprocess_starts_so_many_processes_that_find_each_other():
  lines = [shlex.split(line) for line in job("multiprocess", PROCESSES="3").splitlines()]
  assert [line[-2] for line in lines] == ["--process=0", "--process=1", "--process=2"]
  shared = {"--distributed", "--coordinator=127.0.0.1:8476", "--processes=3", KEY}
  assert all(shared <= set(line) for line in lines)


def test_slurm_queues_a_script_that_runs_one_process_a_node():
  text = job("slurm", NODES="4", GPUS="2", PARTITION="big")
  script, _, last = text.rstrip().rpartition("\n")
  assert shlex.split(last) == ["sbatch", "/runs/w/job.sbatch"]
  assert "#SBATCH --nodes=4" in script and "#SBATCH --partition=big" in script
  assert "JAX_LOCAL_DEVICE_IDS=0,1\n" in script
  assert "srun --kill-on-bad-exit=0 --wait=120 " in script


def test_kubernetes_is_a_job_set_whose_pods_know_their_numbers():
  made = yaml.safe_load(job("kubernetes", HOSTS="4"))
  assert made["kind"] == "JobSet"
  work = made["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert work["parallelism"] == work["completions"] == 4
  [rule] = work["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [2, 3]
  [container] = work["template"]["spec"]["containers"]
  assert {"--distributed", "--coordinator=cwm-host-0-0.cwm:8476", "--processes=4", KEY} <= set(
    container["args"]
  )
  assert {v["name"]: bool(v["value"]) for v in container["env"]} == {
    "XLA_FLAGS": True,
    "LIBTPU_INIT_ARGS": False,
  }


def test_tpu_asks_for_a_slice_installs_trains_and_gives_it_back():
  lines = [shlex.split(line) for line in job("tpu", TYPE="v5litepod-16").splitlines()]
  create, pack, copy, install, _, train, delete = lines
  assert {"queued-resources", "create", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)
  assert pack[0] == "tar" and "scp" in copy and "--worker=all" in copy
  assert "pip install" in install[-2]
  command = train[-2].removeprefix("--command=")
  assert "--distributed" in shlex.split(command) and KEY in shlex.split(command)
  assert {"queued-resources", "delete", "--force"} <= set(delete)
  assert "--spot" not in job("tpu", SPOT="0")


def test_plan_tells_a_wrong_config_in_a_sentence():
  asked = [sys.executable, str(LAUNCH / "plan.py"), "no/such.py"]
  done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stderr) == (2, "error: there is no file no/such.py\n")


def compare(tmp_path, old, new, *options):
  for name, rows in (("old", old), ("new", new)):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
  asked = [sys.executable, str(LAUNCH / "bench_compare.py"), tmp_path / "old", tmp_path / "new"]
  return subprocess.run([*asked, *options], capture_output=True, text=True, timeout=60)


ROW = dict(measure="train", batch=16, pairs_per_second=30.0, peak_mib=700.0, compilations=40)


def test_compare_tells_what_became_worse_beyond_the_tolerance(tmp_path):
  slower = dict(ROW, pairs_per_second=26.0, peak_mib=300.0, compilations=41)
  done = compare(tmp_path, [ROW], [slower])
  assert done.returncode == 1
  verdicts = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()[1:]}
  assert verdicts == {"pairs_per_second": "WORSE", "peak_mib": "better", "compilations": "41"}
  assert compare(tmp_path, [ROW], [slower], "--tolerance", "0.2").returncode == 0


def test_compare_keeps_measurements_of_other_settings_apart(tmp_path):
  done = compare(tmp_path, [ROW], [dict(ROW, batch=32, pairs_per_second=1.0)])
  assert done.returncode == 0
  assert "only in the old file: train batch=16" in done.stdout
  assert "only in the new file: train batch=32" in done.stdout


def test_compare_tells_a_file_that_holds_no_rows_in_a_sentence(tmp_path):
  done = compare(tmp_path, ["nothing"], [ROW])
  assert (done.returncode, done.stderr) == (
    2,
    f"error: {tmp_path / 'old'}, line 1 is not a row of a benchmark\n",
  )
