"""Who is started again by the launch scripts and who is told to leave, with stand-in programs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny_job
import yaml

LAUNCH = tiny_job.ROOT / "launch"
JOB = ("configs/some.py", "/runs/w")


def program(path, text):
  """An executable that stands in for a real one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/bash\n{text}\n")
  path.chmod(0o755)
  return path


def training(log, code=0):
  """The text of a training that works until it is told to leave, and then takes a while to save."""
  return (
    f"trap 'sleep 0.3; echo saved >> {log}; exit {code}' TERM\n"
    f"echo start >> {log}\n"
    "for _ in {1..400}; do sleep 0.05; done"
  )


def ends_with(log, *codes):
  """The text of a training that ends with one code after the other, from start to start."""
  return (
    f"echo start >> {log}\ncodes=({' '.join(map(str, codes))})\n"
    f"exit ${{codes[$(wc -l < {log}) - 1]}}"
  )


def words(log):
  return log.read_text().split() if log.exists() else []


def environment(folder=None, **variables):
  """This environment with a folder's programs before all others."""
  path = f"{folder}{os.pathsep}{os.environ['PATH']}" if folder else os.environ["PATH"]
  return {**os.environ, "PAUSE_S": "0", **variables, "PATH": path}


def run(asked, **ways):
  ways = {"env": environment(), **ways}
  return subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False, **ways)


def handles(process, number):
  """Whether a process does something of its own at a signal, such as a shell's trap."""
  lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
  [caught] = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
  return bool(int(caught, 16) >> (number - 1) & 1)


def tell(asked, log, *, starts=1, number=signal.SIGTERM, **ways):
  """Sends a signal to a shell alone once so many trainings work and it has set its trap.

  Returns:
    (its exit code, the words of the log when it had ended).
  """

  def as_in_a_terminal():
    # In the background of a shell without jobs SIGINT would be ignored, and could not be trapped.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

  process = subprocess.Popen(asked, stdout=subprocess.DEVNULL, preexec_fn=as_in_a_terminal, **ways)
  try:
    deadline = time.monotonic() + 30
    while words(log).count("start") < starts or not handles(process, number):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)
    process.send_signal(number)
    return process.wait(30), words(log)
  finally:
    process.kill()


@pytest.mark.parametrize(
  "codes, starts, ended", [([4, 137, 0], 3, 0), ([2], 1, 2), ([3], 1, 3), ([4] * 9, 4, 4)]
)
def test_what_goes_on_from_its_checkpoint_is_started_again_and_what_is_wrong_is_not(
  tmp_path, codes, starts, ended
):
  log = tmp_path / "log"
  job = program(tmp_path / "job", ends_with(log, *codes))
  done = run(["bash", "-c", f"source {LAUNCH}/run; again start {job}"], env=environment(TRIES="4"))
  assert done.returncode == ended, done.stderr
  assert words(log) == ["start"] * starts


@pytest.mark.parametrize(
  "codes, code", [([0, 0], 0), ([0, 4], 4), ([137, 4], 137), ([4, 2], 2), ([3, 4, 137], 3)]
)
def test_of_several_processes_the_one_at_fault_gives_the_job_its_exit_code(codes, code):
  text = (
    f'source {LAUNCH}/run; for c in {" ".join(map(str, codes))}; do start sh -c "exit $c"; done'
  )
  assert run(["bash", "-c", f"pids=() told=; {text}; finish"]).returncode == code


@pytest.fixture
def installed(tmp_path):
  """The launch scripts beside a training that is a stand-in, with nothing to install."""
  for name in ("run", "gpu", "multiprocess"):
    (tmp_path / "launch").mkdir(exist_ok=True)
    shutil.copy(LAUNCH / name, tmp_path / "launch")
  (tmp_path / "launch" / "setup").write_text("install() { :; }\n")
  return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("code", [0, 143])
@pytest.mark.parametrize("script, processes", [("gpu", 1), ("multiprocess", 2)])
def test_a_script_that_is_told_to_leave_waits_until_all_have_saved_and_starts_none_again(
  installed, script, processes, code, number
):
  log = installed / "log"
  program(installed / ".venv" / "bin" / "python", training(log, code))
  asked = ["bash", str(installed / "launch" / script), *JOB]
  told = tell(asked, log, starts=processes, number=number, env=environment())
  assert told == (code, ["start"] * processes + ["saved"] * processes)


def test_a_script_that_is_told_to_leave_between_two_starts_leaves(tmp_path):
  log = tmp_path / "log"
  job = program(tmp_path / "job", ends_with(log, *[4] * 9))
  asked = ["bash", "-c", f"source {LAUNCH}/run; again start {job}"]
  # The second start would be the last one, so that this ends whatever the script does.
  ways = dict(env=environment(PAUSE_S="20", TRIES="2"), start_new_session=True)
  with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True, **ways) as process:
    try:
      assert any("starting again" in line for line in process.stderr)
      # As a terminal and a service manager do: all of the group, the pause too.
      os.killpg(process.pid, signal.SIGTERM)
      assert process.wait(60) == 4
    finally:
      process.kill()
  assert words(log) == ["start"]


@pytest.fixture
def slurm(tmp_path):
  """The script that Slurm would run, and its environment; put `srun` into tmp_path."""
  done = run(["bash", str(LAUNCH / "slurm"), "--dry-run", *JOB])
  program(tmp_path / "scontrol", f'echo "queued $*" | tee -a {tmp_path}/log')
  script = done.stdout.rstrip().rpartition("\n")[0]
  return ["bash", "-c", script], environment(tmp_path, SLURM_JOB_ID="17")


@pytest.mark.parametrize(
  "code, queued", [(0, False), (2, False), (3, False), (4, True), (137, True)]
)
def test_slurm_queues_a_job_again_unless_it_is_done_or_wrong(tmp_path, slurm, code, queued):
  program(tmp_path / "srun", f"exit {code}")
  script, env = slurm
  done = run(script, env=env)
  assert done.returncode == code, done.stderr
  assert ("queued requeue 17" in done.stdout) == queued


def test_slurm_has_a_job_save_before_its_time_is_up_and_then_queues_it_again(tmp_path, slurm):
  log = tmp_path / "log"
  program(tmp_path / "srun", training(log))
  script, env = slurm
  assert tell(script, log, env=env) == (0, ["start", "saved", "queued", "requeue", "17"])


@pytest.fixture
def pod(tmp_path):
  """What a pod runs, and its environment; put `python` into tmp_path."""
  manifest = run(["bash", str(LAUNCH / "kubernetes"), "--dry-run", *JOB, "--config.a=b c"]).stdout
  job = yaml.safe_load(manifest)["spec"]["replicatedJobs"][0]["template"]["spec"]
  [container] = job["template"]["spec"]["containers"]
  env = environment(tmp_path, JOB_COMPLETION_INDEX="1")
  return [*container["command"], *container["args"]], env


@pytest.mark.parametrize("code", [0, 2, 4, 137])
def test_a_pod_ends_as_its_training_does_with_all_arguments_given(tmp_path, pod, code):
  program(tmp_path / "python", f'printf "%s\\n" "$@"\nexit {code}')
  asked, env = pod
  done = run(asked, env=env)
  assert done.returncode == code, done.stderr
  given = done.stdout.splitlines()
  assert given[:2] == ["-m", "cwm_jax.main"] and given[-1] == "--process=1"
  assert {"--config=configs/some.py", "--workdir=/runs/w", "--config.a=b c"} <= set(given)


@pytest.mark.parametrize("code, ended", [(0, 4), (3, 3)])
def test_a_pod_that_is_evicted_saves_and_does_not_count_as_done(tmp_path, pod, code, ended):
  log = tmp_path / "log"
  program(tmp_path / "python", training(log, code))
  asked, env = pod
  assert tell(asked, log, env=env) == (ended, ["start", "saved"])


# Stands in for gcloud: the slice stands from `create` until `delete`, or until a training takes it
# away. A line of `plan` is what comes of a training: exit codes of hosts, `drop` where a connection
# is lost, `taken` where the slice is, `hang` where it goes on.
GCLOUD = """
cd {folder}
case "$*" in
  *describe*) exec cat state ;;
  *create*) echo create >> log; echo ACTIVE > state ;;
  *delete*) echo delete >> log; rm -f state ;;
  *scp*) exit $(cat scp 2> /dev/null || echo 0) ;;
  *ssh*cwm_jax.main*)
    echo start >> log
    ended=0
    for word in $(sed -n "$(grep -c start log)p" plan); do
      case "$word" in
        drop) ended=255 ;;
        taken) ended=255; echo SUSPENDED > state ;;
        hang) exec sleep 2 ;;
        *) echo "exit-code=$word" ;;
      esac
    done
    exit "$ended"
    ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
  """A function that writes the plan; returns the command and its environment."""
  program(tmp_path / "gcloud", GCLOUD.format(folder=tmp_path))
  program(tmp_path / "tar", "")

  def planned(*lines):
    (tmp_path / "plan").write_text("\n".join(lines) + "\n")
    env = environment(tmp_path, POLL_S="0", STARTS="3", TRIES="4")
    return ["bash", str(LAUNCH / "tpu"), *JOB], env

  return planned


@pytest.mark.parametrize(
  "plan, code, did",
  [
    (["0 0"], 0, "create start delete"),
    # The slice is taken away: another one, whether or not a host still saved and said so.
    (["taken", "0 0"], 0, "create start delete create start delete"),
    (["0 taken", "0 0"], 0, "create start delete create start delete"),
    (["taken"] * 9, 1, " ".join(["create start delete"] * 4)),
    # It still stands: the training is started again on it, so many times.
    (["drop", "4 137", "0 0"], 0, "create start start start delete"),
    (["0 drop", "0 0"], 0, "create start start delete"),
    (["4 4"] * 9, 4, "create start start start delete"),
    # What is wrong stays wrong, also where the others left for it or were cut off.
    (["2 4"], 2, "create start delete"),
    (["3 drop"], 3, "create start delete"),
    (["1 0"], 1, "create start delete"),
  ],
)
def test_tpu_trains_again_or_on_another_slice_and_gives_each_slice_back(
  tmp_path, cloud, plan, code, did
):
  asked, env = cloud(*plan)
  done = run(asked, env=env)
  assert done.returncode == code, done.stderr
  assert " ".join(words(tmp_path / "log")) == did


def test_tpu_gives_a_slice_back_that_cannot_be_prepared_and_asks_for_another(tmp_path, cloud):
  (tmp_path / "scp").write_text("1")
  asked, env = cloud("0 0")
  assert run(asked, env=env).returncode == 1
  assert words(tmp_path / "log") == ["create", "delete"] * 4


def test_tpu_that_is_told_to_leave_gives_its_slice_back(tmp_path, cloud):
  asked, env = cloud("hang")
  code, did = tell(asked, tmp_path / "log", env=env)
  assert code != 0 and did == ["create", "start", "delete"]


def test_a_start_on_a_host_first_ends_the_training_that_a_dropped_connection_left(tmp_path):
  done = run(["bash", str(LAUNCH / "tpu"), "--dry-run", *JOB])
  [line] = [line for line in done.stdout.splitlines() if "cwm_jax.main" in line]
  command = shlex.split(line)[-2].removeprefix("--command=")
  log = tmp_path / "log"
  python = program(tmp_path / "cwm" / ".venv" / "bin" / "python", training(log))
  shell = subprocess.Popen(["bash", "-c", command], cwd=tmp_path, stdout=subprocess.DEVNULL)
  try:
    deadline = time.monotonic() + 30
    while not words(log) or not words(tmp_path / "cwm" / "job.pid"):
      assert shell.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)
  finally:
    shell.kill()
    shell.wait()
  program(python, f"echo start >> {log}\nexit 4")
  done = run(["bash", "-c", command], cwd=tmp_path)
  assert words(log) == ["start", "saved", "start"]
  assert done.stdout == "exit-code=4\n", done.stderr
  assert not (tmp_path / "cwm" / "job.pid").exists()
