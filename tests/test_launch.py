"""The launch scripts: what each would run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import launch_scripts
import pytest
import tiny_job
import yaml

LAUNCH = launch_scripts.LAUNCH
WORKDIR = "/runs/my w"
KEY = "--config.data.sources.video.paths=/a b"


def dry(script, *arguments, **variables):
  """The lines that a script prints instead of running them."""
  asked = ["bash", str(LAUNCH / script), "--dry-run", *arguments]
  done = subprocess.run(
    asked,
    env=launch_scripts.environment(**variables),
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def job(script, **variables):
  return dry(script, "configs/some.py:large", WORKDIR, KEY, **variables)


@pytest.mark.parametrize("script", ["gpu", "multiprocess", "slurm", "kubernetes", "tpu"])
def test_without_a_config_and_a_workdir_a_script_says_how_to_call_it(script):
  done = subprocess.run(
    ["bash", str(LAUNCH / script), "--dry-run", "configs/some.py"], capture_output=True, text=True
  )
  assert done.returncode == 2
  assert f"launch/{script} [--dry-run] CONFIG WORKDIR" in done.stderr


@pytest.mark.parametrize("script", ["gpu", "slurm", "tpu"])
def test_a_bucket_is_refused_as_a_workdir_before_anything_is_started(script):
  asked = ["bash", str(LAUNCH / script), "--dry-run", "configs/some.py", "gs://bucket/run"]
  done = subprocess.run(asked, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, "")
  [line] = done.stderr.splitlines()
  assert "gs://bucket/run" in line and "gcsfuse" in line and "MOUNT" in line


@pytest.mark.parametrize("first", [[], ["--config.study.scenes=5"], ["--dry-run", "w"]])
def test_a_study_without_a_workdir_says_how_to_call_it(tmp_path, first):
  done, asked = study(tmp_path, *first)
  assert (done.returncode, asked) == (2, [])
  assert done.stderr.startswith("usage: bash launch/study WORKDIR [--config.key=value")


def test_a_study_has_its_workdir_the_clips_and_keys(tmp_path):
  done, asked = study(
    tmp_path, "my w", "--config.study.scenes=5", CWM_DATA="/d", ARGUMENT="runlocal"
  )
  assert done.returncode == 0, done.stderr
  assert asked[:2] == ["-m", "cwm_jax.main"] and asked[-1] == "--config.study.scenes=5"
  assert "study_interventions.py:runlocal" in asked[3] and asked[4:6] == ["--workdir", "my w"]
  assert asked[6] == "--config.study.tapvid=/d/tapvid_davis"
  # Without data there are no clips.
  assert "--config.study.tapvid=" in study(tmp_path, "w", CWM_DATA="", ARGUMENT="")[1]


def study(root, *arguments, **variables):
  """How launch/study ended, and what it asks a stand-in of Python."""
  (root / "launch").mkdir(exist_ok=True)
  (root / "launch" / "study").write_text((LAUNCH / "study").read_text())
  # Nothing is to be installed.
  (root / "launch" / "setup").write_text(
    'cd "$(dirname "${BASH_SOURCE[0]}")/.."\ninstall() { :; }\n'
  )
  python = root / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True, exist_ok=True)
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$ASKED"\n')
  python.chmod(0o755)
  asked = root / "asked"
  done = subprocess.run(
    ["bash", str(root / "launch" / "study"), *arguments],
    env=launch_scripts.environment(**variables, ASKED=str(asked)),
    capture_output=True,
    text=True,
    timeout=60,
  )
  return done, asked.read_text().splitlines() if asked.exists() else []


def test_gpu_runs_one_process_with_flags_that_hide_communication():
  flags, command = job("gpu", FSDP="4", XLA_FLAGS="--xla_mine=1").splitlines()
  assert "latency_hiding_scheduler=true" in flags and flags.endswith("--xla_mine=1")
  words = shlex.split(command)
  assert words[1:3] == ["-m", "cwm_jax.main"]
  assert {"--config=configs/some.py:large", f"--workdir={WORKDIR}", KEY} <= set(words)
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


def test_multiprocess_gives_each_process_a_gpu_of_its_own():
  def visible(**variables):
    lines = job("multiprocess", JAX_PLATFORMS="cuda", **variables).splitlines()
    return [shlex.split(line)[:2] for line in lines]

  assert visible(CUDA_VISIBLE_DEVICES="") == [
    ["env", f"CUDA_VISIBLE_DEVICES={gpu}"] for gpu in (0, 1)
  ]
  given = visible(CUDA_VISIBLE_DEVICES="5,7")
  assert given == [["env", f"CUDA_VISIBLE_DEVICES={gpu}"] for gpu in (5, 7)]


def test_slurm_queues_a_script_that_runs_one_process_a_node():
  text = job("slurm", NODES="4", GPUS="2", PARTITION="big")
  script, _, last = text.rstrip().rpartition("\n")
  assert shlex.split(last) == ["sbatch", f"{WORKDIR}/job.sbatch"]
  assert "#SBATCH --nodes=4" in script and "#SBATCH --partition=big" in script
  assert "JAX_LOCAL_DEVICE_IDS=0,1\n" in script
  [srun] = [line for line in script.splitlines() if line.startswith("srun ")]
  # It has no CPUs of a task from the job, though the job asks for them.
  assert {"--cpus-per-task=64", "--kill-on-bad-exit=0", "--wait=120"} <= set(srun.split())
  [log] = [line for line in script.splitlines() if "--output" in line]
  assert shlex.split(log)[-1] == f"#SBATCH --output={WORKDIR}/slurm-%j.log".split(" ", 1)[1]


def test_slurm_lets_a_second_job_on_a_workdir_wait_for_the_first():
  def name(workdir):
    lines = dry("slurm", "configs/some.py", workdir).splitlines()
    assert "#SBATCH --dependency=singleton" in lines
    [line] = [line for line in lines if "--job-name" in line]
    return line.partition("=")[2]

  assert name("/runs/a/my w") == name("/runs/./a/my w") != name("/runs/b/my w")
  assert name("/runs/a/my w").startswith("cwm-my_w-")


def test_kubernetes_is_a_job_set_whose_pods_know_their_numbers():
  made = yaml.safe_load(job("kubernetes", HOSTS="4"))
  assert made["kind"] == "JobSet"
  work = made["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert work["parallelism"] == work["completions"] == 4
  [rule] = work["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [1, 2, 3]
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


def test_plan_sets_keys_that_are_words_numbers_and_none(monkeypatch, capsys):
  monkeypatch.syspath_prepend(LAUNCH)
  for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
    monkeypatch.setenv(name, os.environ.get(name, ""))
  import plan

  monkeypatch.delitem(sys.modules, "plan")
  monkeypatch.setattr(
    plan,
    "predict",
    lambda config, *_: dict(
      dtype=config.model.dtype, batch=config.data.batch_size, start=config.init_from
    ),
  )
  words = ["model.dtype=bfloat16", "data.batch_size=256", "init_from="]
  config = str(tiny_job.ROOT / "configs" / "pretrain_tiny.py")
  monkeypatch.setattr(sys, "argv", ["plan", config, "--set", *words])
  assert plan.main() == 0
  row = dict(dtype="bfloat16", batch=256, start="")
  assert json.loads(capsys.readouterr().out) == row


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


# Stand in for a Python; each notes what it is asked. `whole` lies beside the others.
SAYS = '#!/bin/sh\necho "$*" >> asked\n'
WHOLE, NOTHING = SAYS, SAYS + "exit 1\n"
LACKS_PIP = SAYS + '[ "$2" = ensurepip ] && exec cp whole .venv/bin/python\n'
OUTSIDE = SAYS + '[ "$2" != venv ] || { mkdir -p .venv/bin; exec cp whole .venv/bin/python; }\n'


@pytest.mark.parametrize(
  "left, mended",
  [
    (None, "-m venv --clear .venv"),
    (NOTHING, "-m venv --clear .venv"),
    (LACKS_PIP, "-m ensurepip"),
    (WHOLE, None),
  ],
  ids=["none", "neither pip nor ensurepip", "no pip", "whole"],
)
def test_setup_mends_an_environment_that_a_first_try_left_without_pip(tmp_path, left, mended):
  (tmp_path / "launch").mkdir()
  (tmp_path / "launch" / "setup").write_text((LAUNCH / "setup").read_text())
  for name in ("launch/constraints.txt", "pyproject.toml"):
    (tmp_path / name).touch()
  pythons = {"whole": WHOLE, "outside": OUTSIDE}
  if left is not None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    pythons[".venv/bin/python"] = left
  for name, script in pythons.items():
    (tmp_path / name).write_text(script)
    (tmp_path / name).chmod(0o755)

  def install(extras=""):
    (tmp_path / "asked").unlink(missing_ok=True)
    script = f'set -euo pipefail; source launch/setup; install "{extras}"'
    env = os.environ | {"PYTHON": "./outside"}
    done = subprocess.run(
      ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []

  asked = install()
  assert asked[-1].startswith("-m pip install ")
  made = [line for line in asked if line.startswith("-m venv") or line.endswith("ensurepip")]
  assert made[-1:] == ([mended] if mended else [])
  # The second time nothing is asked of anybody. What one extra brought is not what another brings.
  assert install() == []
  for extras in ("[dev]", "[cuda13]"):
    assert f".{extras} " in install(extras)[-1] and install(extras) == install() == []
