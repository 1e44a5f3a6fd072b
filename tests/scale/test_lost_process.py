"""A process of a job dies, falls silent or is told to leave: the others leave too, in time."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_job

from cwm_jax import processes, supervision

LOST_AFTER = 8.0


@contextlib.contextmanager
def two_at_work(workdir, *arguments):
  """Two processes of one endless training, after its first step."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  both = [
    subprocess.Popen(
      tiny_job.command(
        *(f"--workdir={workdir}", "--distributed", f"--coordinator={address}"),
        *("--processes=2", f"--process={process}", f"--lost_after={LOST_AFTER}", *arguments),
        config=":endless",
      ),
      cwd=tiny_job.ROOT,
      env=tiny_job.environment(JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo", XLA_FLAGS=tiny_job.QUICK),
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in (0, 1)
  ]
  try:
    deadline = time.monotonic() + 240
    while not (workdir / "metrics.jsonl").exists():
      assert time.monotonic() < deadline and all(process.poll() is None for process in both)
      time.sleep(0.2)
    yield both
  finally:
    for process in both:
      process.kill()


def child_of(process):
  """The process that works; its parent, which was started, says what ends it."""
  return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def left_for(process, said):
  """The sentence with which a process left, to be started again."""
  assert process.returncode == supervision.START_AGAIN, said[-2000:]
  assert "Traceback" not in said
  [told] = [line for line in said.splitlines() if line.startswith("error: ")]
  assert "they go on from the last checkpoint" in told
  return told


def test_a_host_falls_silent_and_the_one_that_keeps_the_job_dies_each_is_a_sentence(tmp_path):
  with two_at_work(tmp_path) as both:
    # Stopped, not killed: its connections stay open, as those of a host without power do.
    child = child_of(both[1])
    os.kill(child, signal.SIGSTOP)
    began = time.monotonic()
    said = both[0].communicate(timeout=90)[1]
    assert time.monotonic() - began < 4 * LOST_AFTER
    os.kill(child, signal.SIGCONT)
    # It wakes to find process 0 gone, and JAX ends it from below.
    said_by_other = both[1].communicate(timeout=90)[1]
  assert "process 1 " in left_for(both[0], said)
  assert "process 0 " in left_for(both[1], said_by_other)


def test_where_a_process_is_killed_the_failing_collective_names_it(tmp_path):
  for attempt in range(5):
    with two_at_work(tmp_path / str(attempt)) as both:
      os.kill(child_of(both[1]), signal.SIGKILL)
      # Its connections end with it: the other's step fails at once, long before its silence is
      # told.
      said, said_by_other = (process.communicate(timeout=90)[1] for process in both)
    assert "ended by SIGKILL" in left_for(both[1], said_by_other)
    told = left_for(both[0], said)
    # Now and then Gloo meets the loss in a thread of its own and aborts, which names nobody.
    if "ended by SIGABRT" not in told:
      break
  assert "process 1 of 2 has not been heard of" in told


def test_sigterm_to_one_of_two_has_both_save_the_same_step_and_say_that_they_left_early(tmp_path):
  with two_at_work(tmp_path, "--config.cpu_devices=2") as both:
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=90)[1] for process in both]
  codes = [process.returncode for process in both]
  assert codes == [supervision.LEFT_EARLY] * 2, "".join(s[-2000:] for s in said)
  # Each plays the devices that the config asks for.
  assert " 4 devices" in said[0]
  [saved] = (tmp_path / "checkpoints").iterdir()
  assert int(saved.name) == tiny_job.rows(tmp_path)[-1]["step"]
  assert f"left at step {saved.name} of 1000000: another process leaves" in said[0]


# Joins a job of one process, and is told to end.
JOINED = """
import os, signal, sys, time
from absl import flags
from cwm_jax import main

flags.FLAGS(sys.argv)
main._join()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""


def test_sigterm_ends_a_process_that_has_joined_and_whose_job_saves_by_itself():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  done = tiny_job.run_script(JOINED, f"--coordinator={address}", "--processes=1", "--process=0")
  assert done.returncode == -signal.SIGTERM, done.stderr[-2000:]


class Store:
  """What JAX's store does, in a dictionary; while `broken`, it does not answer."""

  def __init__(self):
    self.kept, self.broken = {}, False

  def key_value_set(self, key, value, *, allow_overwrite):
    assert allow_overwrite
    if self.broken:
      raise RuntimeError("UNAVAILABLE")
    self.kept[key] = value

  def key_value_dir_get(self, prefix):
    if self.broken:
      raise RuntimeError("UNAVAILABLE")
    return [(key, value) for key, value in self.kept.items() if key.startswith(prefix + "/")]


@pytest.fixture
def left(monkeypatch):
  """Exit codes of processes that left; (codes, an event that is set when one did)."""
  codes, event = [], threading.Event()
  monkeypatch.setattr(processes.os, "_exit", lambda code: (codes.append(code), event.set()))
  return codes, event


@pytest.fixture
def pair(monkeypatch):
  """Makes the watches of two processes; they end before a patched `os._exit` is the real one."""
  made = []

  def make(store, *, lost_after):
    made.extend(processes.Watch(store, process=i, count=2, lost_after=lost_after) for i in (0, 1))
    return made

  yield make
  for watch in made:
    watch._ended.set()
    for thread in watch._threads:
      thread.join()


@pytest.mark.parametrize("code, theirs", [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_a_process_that_fails_tells_the_others_why_and_whether_for_good(
  left, pair, capsys, code, theirs
):
  one, other = pair(Store(), lost_after=6.0)
  other.failed("the disk is full", code)
  assert left[1].wait(5)
  one.close()
  assert left[0] == [theirs]
  assert capsys.readouterr().err == "error: process 1 of 2 left: the disk is full\n"


def test_a_process_that_is_done_is_not_missed_and_one_that_works_on_stays(left, pair):
  one, other = pair(Store(), lost_after=2.0)
  other.close()
  # It would be missed after 2.4 s.
  assert not left[1].wait(3.0)
  one.close()


def test_a_process_that_asks_whom_to_blame_waits_until_the_watch_has_left(monkeypatch, pair):
  codes = []

  def leave_slowly(code):
    time.sleep(0.5)
    codes.append(code)

  monkeypatch.setattr(processes.os, "_exit", leave_slowly)
  one, other = pair(Store(), lost_after=3.0)
  other._ended.set()  # silent from now on
  one.blame()
  assert codes == [supervision.START_AGAIN]


def test_a_store_that_no_longer_answers_means_that_process_0_is_lost(left, pair, capsys):
  store = Store()
  one, other = pair(store, lost_after=0.6)
  one.close()
  time.sleep(0.2)
  store.broken = True
  assert left[1].wait(5)
  other.close()
  assert "process 0 of 2 has not been heard of" in capsys.readouterr().err


@pytest.mark.parametrize(
  "ending, code, told",
  [
    ("sys.exit(3)", 3, ""),
    ("os.abort()", supervision.START_AGAIN, "ended by SIGABRT, as when process 0"),
    ("os.kill(os.getpid(), signal.SIGKILL)", supervision.START_AGAIN, "ended by SIGKILL;"),
    ("print(os.getppid())", 0, ""),
  ],
)
def test_work_in_a_child_ends_with_its_code_or_with_a_sentence(ending, code, told):
  script = (
    "import os, signal, sys\nfrom cwm_jax import supervision\n"
    f"sys.exit(supervision.supervise(lambda: {ending}))"
  )
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
  assert done.returncode == code
  assert told in done.stderr and "Traceback" not in done.stderr


def test_sigterm_to_the_parent_reaches_the_child():
  script = (
    "import signal, sys, time\nfrom cwm_jax import supervision\n"
    "def work():\n"
    "  signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    "  print('ready', flush=True)\n  time.sleep(60)\n"
    "sys.exit(supervision.supervise(work))"
  )
  process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
  process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == 7
