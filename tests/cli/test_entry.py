"""The entry point: usage, help, Ctrl-C, how soon it answers."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from cwm_jax import arguments, cli, prepare_command
from cwm_jax.types import SaveError


@pytest.mark.parametrize(
  "argv, told",
  [
    ([], "required: COMMAND"),
    (["trakc", "a.mp4"], "invalid choice: 'trakc'"),
    (["track", "a.mp4", "--grid", "0"], "'0' is not a whole number from 1 up"),
    (["track", "a.mp4", "--masks", "many"], "'many' is not a whole number from 1 up"),
    (["track", "a.mp4", "--grid", "4", "--points", "p.csv"], "not allowed with"),
    (["flow", "a.png"], "required: B"),
    # Nothing is marked and read out: what moves is a patch.
    (["segments", "a.png", "--mark", "m.safetensors"], "unrecognized arguments: --mark"),
    (["segments", "a.png", "--readout", "soft"], "unrecognized arguments: --readout"),
  ],
)
def test_a_wrong_command_line_ends_with_usage_and_exit_code_2(capsys, argv, told):
  with pytest.raises(SystemExit) as left:
    cli.main(argv)
  assert left.value.code == 2 and told in capsys.readouterr().err


_COMMANDS = re.findall(r"^    (\w+) ", arguments.parser().format_help(), re.MULTILINE)


def test_help_shows_every_command_with_an_example_and_the_exit_codes(capsys):
  with pytest.raises(SystemExit) as left:
    cli.main(["--help"])
  out = capsys.readouterr().out
  assert left.value.code == 0
  listed = re.search(r"\{(.*?)\}", " ".join(arguments.parser().format_usage().split()))
  assert listed is None and len(_COMMANDS) >= 13
  for command in _COMMANDS:
    assert f"\n  cwm-jax {command}" in out
  codes = out.partition("Exit codes: ")[2]
  assert re.findall(r"(\d+) \w", codes) == ["0", "1", "2", "3", "4", "130"]


@pytest.mark.parametrize("command", _COMMANDS)
def test_a_commands_help_has_examples_that_can_be_parsed(capsys, command):
  with pytest.raises(SystemExit) as left:
    cli.main([command, "--help"])
  examples = re.findall(r"^  (cwm-jax .*)$", capsys.readouterr().out, re.MULTILINE)
  assert left.value.code == 0
  assert sum(example.startswith(f"cwm-jax {command}") for example in examples) >= 2
  for example in examples:
    words = shlex.split(re.split(r"   +", example)[0])
    assert arguments.parser().parse_args(words[1:]).run.startswith("cwm_jax.")


def test_what_could_not_be_written_is_one_sentence_and_exit_code_4(capsys, monkeypatch):
  def full(**_):
    raise SaveError("shard 3 could not be written:\n make room")

  monkeypatch.setattr(prepare_command, "run", full)
  assert cli.main(["prepare", "videos"]) == 4
  assert capsys.readouterr().err == "error: shard 3 could not be written: make room\n"


def test_ctrl_c_leaves_with_130_and_no_traceback(clip_path, weights_path, tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-m", "cwm_jax.cli", "track", clip_path, "--weights", weights_path]
    + ["--grid", "40", "--masks", "500", "--out", tmp_path / "o"],
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  deadline = time.monotonic() + 120
  # The folder is made just before the tracker is loaded: from then on there is work to interrupt.
  while not (tmp_path / "o").exists() and time.monotonic() < deadline:
    time.sleep(0.1)
  time.sleep(1.0)
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=120)
  assert process.returncode == 130
  assert stderr.strip().splitlines()[-1] == "interrupted" and "Traceback" not in stderr


def test_the_commands_start_at_once_when_only_asked_for_help():
  def seconds(*arguments):
    """The processor's, of three runs: the clock's depend on what else the machine does."""
    spent = 0.0
    for _ in range(3):
      process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
      _, status, used = os.wait4(process.pid, 0)
      process.returncode = os.waitstatus_to_exitcode(status)
      assert process.returncode == 0
      spent += used.ru_utime + used.ru_stime
    return spent

  # JAX alone would make it nearly thirty times.
  assert seconds("-m", "cwm_jax.cli", "--help") < 10 * seconds("-c", "pass")
