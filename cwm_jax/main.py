"""Job entry: `python -m cwm_jax.main --config configs/pretrain_tiny.py --workdir DIR`.

Exit codes: 0 done or left cleanly; 1 a traceback, for good; 2 something given cannot be used; 3 the
loss is not finite; 4 a checkpoint could not be written or another process was lost, and the same
command, given again, goes on from the last checkpoint; 5, with --distributed only, SIGTERM had the
job save and leave before its end, and it goes on likewise.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import traceback

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from cwm_jax import workdirs
from cwm_jax.types import InputError, SaveError, first_line

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "File of configs/, optionally file:argument; keys by --config.key=value.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the other processes of this job, found by Slurm, MPI, Kubernetes or a TPU's own means, or:",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many there are.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "This one's number, from 0.", lower_bound=0)
_LOST_AFTER = flags.DEFINE_float(
  "lost_after", 40.0, "Seconds of another process's silence after which this one leaves.", 1.0
)


def main() -> None:
  """Runs the job and exits."""
  app.run(_run, flags_parser=_parse)


def _run(_) -> None:
  # The libraries' own lines at INFO would bury the progress line; --verbosity=0 shows them.
  if not any(argument.startswith("--verbosity") for argument in sys.argv):
    absl_logging.set_verbosity(absl_logging.WARNING)
  # What fails in a thread that writes metrics is raised again in the loop, and told by `_do`.
  absl_logging.get_absl_logger().addFilter(
    lambda record: not record.pathname.endswith(os.path.join("clu", "asynclib.py"))
  )
  logger = logging.getLogger("cwm_jax")
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
  logger.addHandler(handler)
  logger.propagate = False
  logger.setLevel(logging.INFO)
  if _DISTRIBUTED.value:
    from cwm_jax import supervision

    sys.exit(supervision.supervise(_do))
  _do()


def _do() -> None:
  """Works; whatever ends it is one sentence and an exit code."""
  watch = None
  try:
    from cwm_jax import sharding

    config = _CONFIG.value
    # Before joining, at which JAX takes stock of its devices.
    sharding.play_devices(config.cpu_devices)
    watch = _join() if _DISTRIBUTED.value else None
    told = _work(config, _WORKDIR.value)
  except InputError as error:
    _leave(watch, str(error), 2)
  except Exception as error:
    code = _known(error)
    if code is not None:
      _leave(watch, str(error), code)
    if watch is None:
      raise
    # A collective fails when the other end dies: then it is the other one that is to be named.
    watch.blame()
    traceback.print_exc()
    _leave(watch, f"{type(error).__name__}, see above", 1)
  if watch is not None:
    watch.close()
    if told:
      from cwm_jax import supervision

      sys.exit(supervision.LEFT_EARLY)


def _known(error: Exception) -> int | None:
  """The exit code of an error that is a sentence; None for others."""
  from cwm_jax import supervision, train

  if isinstance(error, train.NonFiniteError):
    return 3
  return supervision.START_AGAIN if isinstance(error, SaveError) else None


def _leave(watch, sentence: str, code: int) -> None:
  """Says the sentence and exits; the other processes of the job are told, for they leave too."""
  if watch is None:
    _fail(sentence, code)
  print(f"error: {sentence}", file=sys.stderr, flush=True)
  watch.failed(sentence, code)
  # Process 0 keeps the store that the others read this in. And JAX would wait for them at exit.
  time.sleep(_LOST_AFTER.value / 4 if watch.process == 0 else 0)
  os._exit(code)


def _join():
  """Joins the other processes, and watches them from then on."""
  import jax

  from cwm_jax import processes

  try:
    jax.distributed.initialize(
      coordinator_address=_COORDINATOR.value,
      num_processes=_PROCESSES.value,
      process_id=_PROCESS.value,
      # Ours speaks first, in a sentence.
      heartbeat_timeout_seconds=int(_LOST_AFTER.value * 2),
    )
  except (ValueError, RuntimeError) as error:
    reason = first_line(error)
    raise InputError(
      f"--distributed: the other processes cannot be joined ({reason}); JAX finds them by Slurm, "
      "MPI, Kubernetes or a TPU's own means, or by --coordinator, --processes and --process"
    ) from error
  # JAX's notifier of preemption takes SIGTERM for itself; jobs that save at it say so themselves.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  return processes.watch_others(lost_after=_LOST_AFTER.value)


def _work(config, workdir: str) -> bool:
  """Does the config's job; returns whether SIGTERM ended it early, the same in every process."""
  import jax

  from cwm_jax import compilation_cache

  compilation_cache.keep_programs()
  if jax.process_index() > 0:
    logging.getLogger("cwm_jax").setLevel(logging.WARNING)
  if config.job == "train":
    from cwm_jax import train

    return train.run(config, workdir).told
  elif config.job == "evaluate":
    from cwm_jax import evaluate

    evaluate.run(config, workdir)
  elif config.job == "label":
    from cwm_jax import label

    return not label.run(config, workdir)["complete"]
  elif config.job == "prepare":
    from cwm_jax import prepare

    prepare.run(config, workdir)
  elif config.job == "study":
    from cwm_jax import study

    study.run(config, workdir)
  else:
    jobs = "train, evaluate, label, prepare, study"
    raise InputError(f"config.job is {config.job!r}; the jobs are: {jobs}")
  return False


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; anything wrong with them is one sentence and exit code 2."""
  try:
    left = flags.FLAGS(argv)
    if len(left) > 1:
      raise InputError(f"unexpected argument {left[1]!r}: keys are set by --config.key=value")
    for name in ("config", "workdir"):
      if flags.FLAGS[name].value is None:
        raise InputError(f"--{name} is needed")
    workdirs.local(_WORKDIR.value)
    # A file that could not be loaded complains when it is first used: use it here.
    flags.FLAGS["config"].value.job  # noqa: B018
    return left
  except InputError as error:
    _fail(str(error), 2)
  except (AttributeError, KeyError) as error:
    _fail(_about_key(argv, error), 2)
  except OSError:
    named = re.search(r"--config[= ](\S+)", " ".join(argv))
    _fail(f"--config: there is no file {named[1].partition(':')[0] if named else ''}", 2)
  except (flags.Error, TypeError, ValueError, ImportError) as error:
    # What a config file raises comes as a traceback, its sentence last.
    lines = str(error).strip().splitlines()
    raised = "Traceback (most recent call last):" in lines
    _fail(lines[-1].partition(": ")[2] or lines[-1] if raised else lines[0], 2)


def _about_key(argv: list[str], error: Exception) -> str:
  """Which --config.key is unknown, and the known key nearest to it."""
  text = str(error)
  unknown = re.search(r"'(\w+)", text)
  nearest = re.search(r'Did you mean "(\w+)"', text)
  given = re.findall(r"--config\.([\w.]+)", " ".join(argv))
  named = next((key for key in given if unknown and unknown[1] in key.split(".")), None)
  if named is None:
    return text.strip("'\"")
  return f"the config has no key {named!r}" + (f": did you mean {nearest[1]!r}?" if nearest else "")


def _fail(sentence: str, code: int) -> None:
  print(f"error: {sentence}", file=sys.stderr)
  sys.exit(code)


if __name__ == "__main__":
  main()
