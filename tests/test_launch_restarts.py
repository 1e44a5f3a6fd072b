"""Who is started again by the launch scripts and who is told to leave, with stand-in programs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import launch_scripts
import pytest
import yaml

LAUNCH = launch_scripts.LAUNCH
JOB = ("configs/some.py", "/runs/my w")


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
  """The scripts' environment with a folder's programs before all others."""
  path = f"{folder}{os.pathsep}{os.environ['PATH']}" if folder else os.environ["PATH"]
  return launch_scripts.environment(**{"PAUSE_S": "0", **variables, "PATH": path})


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
  "codes, starts, ended",
  [([4, 137, 5, 0], 4, 0), ([1], 1, 1), ([2], 1, 2), ([3], 1, 3), ([4] * 9, 4, 4)],
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
  "codes, code",
  [([0, 0], 0), ([0, 4], 4), ([137, 4], 137), ([4, 2], 2), ([3, 4, 137], 3), ([4, 1], 1)],
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
@pytest.mark.parametrize("code, ended", [(5, 0), (143, 143)])
@pytest.mark.parametrize("script, processes", [("gpu", 1), ("multiprocess", 2)])
def test_a_script_that_is_told_to_leave_waits_until_all_have_saved_and_starts_none_again(
  installed, script, processes, code, ended, number
):
  log = installed / "log"
  program(installed / ".venv" / "bin" / "python", training(log, code))
  asked = ["bash", str(installed / "launch" / script), *JOB]
  told = tell(asked, log, starts=processes, number=number, env=environment())
  assert told == (ended, ["start"] * processes + ["saved"] * processes)


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
  "code, queued",
  # 5: the processes alone were told to leave, as when the job is preempted.
  [(0, False), (1, False), (2, False), (3, False), (4, True), (5, True), (137, True)],
)
def test_slurm_queues_a_job_again_unless_it_is_done_or_wrong(tmp_path, slurm, code, queued):
  program(tmp_path / "srun", f"exit {code}")
  script, env = slurm
  done = run(script, env=env)
  assert done.returncode == code, done.stderr
  assert ("queued requeue 17" in done.stdout) == queued


def test_slurm_queues_a_job_only_so_many_times(tmp_path, slurm):
  program(tmp_path / "srun", "exit 4")
  script, env = slurm
  queued = [
    "queued requeue 17" in run(script, env={**env, "SLURM_RESTART_COUNT": count}).stdout
    for count in ("98", "99")
  ]
  assert queued == [True, False]


@pytest.mark.parametrize("code, then", [(5, ["queued", "requeue", "17"]), (0, [])])
def test_slurm_has_a_job_save_before_its_time_is_up_and_then_queues_it_again(
  tmp_path, slurm, code, then
):
  log, step = tmp_path / "log", tmp_path / "step.pid"
  program(tmp_path / "step", f"echo $$ > {step}\n{training(log, code)}")
  # At SIGTERM srun itself kills its processes.
  program(
    tmp_path / "srun",
    f"trap 'kill -KILL $!; echo killed >> {log}; exit 137' TERM\n{tmp_path}/step &\nwait $!",
  )
  told = '[ "$*" = "--signal=TERM 17" ] && kill -TERM'
  # It returns after what it told has ended.
  program(tmp_path / "scancel", f"{told} $(cat {step}); sleep 1")
  script, env = slurm
  assert tell(script, log, number=signal.SIGUSR1, env=env) == (code, ["start", "saved", *then])


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
  assert {"--config=configs/some.py", "--workdir=/runs/my w", "--config.a=b c"} <= set(given)


@pytest.mark.parametrize("code", [0, 5])
def test_a_pod_that_is_evicted_saves_and_counts_as_done_only_where_it_is(tmp_path, pod, code):
  log = tmp_path / "log"
  program(tmp_path / "python", training(log, code))
  asked, env = pod
  assert tell(asked, log, env=env) == (code, ["start", "saved"])


@pytest.mark.parametrize(
  "conditions, did",
  [
    ("", ["apply"]),
    ("StartupPolicyCompleted", ["apply"]),
    ("Completed", ["delete", "apply"]),
    ("Suspended Failed", ["delete", "apply"]),
  ],
)
def test_a_job_set_that_has_ended_makes_place_for_the_same_command(tmp_path, conditions, did):
  log = tmp_path / "log"
  program(
    tmp_path / "kubectl",
    f'[ "$1" = get ] && exec echo "{conditions}"\necho "$1" >> {log}\n[ "$1" = delete ] || cat',
  )
  done = run(["bash", str(LAUNCH / "kubernetes"), *JOB], env=environment(tmp_path))
  assert done.returncode == 0, done.stderr
  assert words(log) == did
  assert yaml.safe_load(done.stdout)["kind"] == "JobSet"


# Stands in for gcloud: the slice stands from `create` until `delete`, or until a training takes it
# away. A line of `plan` is what comes of a training: exit codes of hosts, `drop` where a connection
# is lost, `taken` where the slice is, `away` where the service then does not answer once, `hang`
# where it goes on.
GCLOUD = """
cd {folder}
case "$*" in
  *describe*)
    if [ -f away ]; then
      rm away
      echo "ERROR: Unable to reach the service" >&2
      exit 1
    fi
    echo "WARNING: there is a newer version" >&2
    [ -f state ] || {{ echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }}
    exec cat state
    ;;
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
        away) touch away ;;
        hang) exec sleep 30 ;;
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
    (["5 5", "0 0"], 0, "create start start delete"),
    # Nobody knows of a while whether it does.
    (["drop away", "0 0 away"], 0, "create start start delete"),
    (["4 4"] * 9, 4, "create start start start delete"),
    # What is wrong stays wrong, also where the others left for it or were cut off.
    (["2 4"], 2, "create start delete"),
    (["3 drop"], 3, "create start delete"),
    (["4 1"], 1, "create start delete"),
  ],
)
def test_tpu_trains_again_or_on_another_slice_and_gives_each_slice_back(
  tmp_path, cloud, plan, code, did
):
  asked, env = cloud(*plan)
  done = run(asked, env=env)
  assert done.returncode == code, done.stderr
  assert " ".join(words(tmp_path / "log")) == did


def test_tpu_shows_what_the_hosts_say_and_empties_no_log_for_it(tmp_path, cloud):
  asked, env = cloud("4 4", "0 0")
  log = tmp_path / "errors"
  with log.open("w") as file:
    file.write("before\n")
    file.flush()
    done = subprocess.run(asked, env=env, stderr=file, stdout=subprocess.DEVNULL, timeout=60)
  assert done.returncode == 0
  said = log.read_text().splitlines()
  assert said[0] == "before" and [line for line in said if "exit" in line] == [
    *["exit-code=4"] * 2,
    "exit code 4; starting again (1)",
    *["exit-code=0"] * 2,
  ]


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
