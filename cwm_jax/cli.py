"""`cwm-jax`, the people's entry: track a video, read flow, look into weights, see the demo.

Exit codes: 0 done, 1 `doctor` found something missing, 2 something given cannot be used (one
sentence says what), 3 a training's loss is not finite, 4 what was made could not be written, 130
interrupted.
Everything heavy is imported inside the command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

from cwm_jax import arguments
from cwm_jax.types import InputError, SaveError


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line and returns its exit code.

  Args:
    argv: arguments without the program's name; None takes the process's own.
  """
  if argv is None:
    _leave_at_ctrl_c()
  try:
    options = vars(arguments.parser().parse_args(argv))
    module, _, function = options.pop("run").partition(":")
    if "masks" in options:
      from cwm_jax.inputs import Reading

      options["reading"] = Reading(**{name: options.pop(name) for name in Reading._fields})
    return getattr(importlib.import_module(module), function)(**options) or 0
  except InputError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except SaveError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 4
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:
    # Whoever read our output has left. Python would complain when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except OSError as error:
    print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    return 2


def _leave_at_ctrl_c() -> None:
  """Makes Ctrl-C end the process at once with exit code 130.

  Python would raise KeyboardInterrupt, which waits for a long computation on the device to end and
  is lost where it strikes a garbage-collection callback. A thread that the signal itself wakes does
  neither. What is finished of the work under way is saved first.
  """
  woken, wake = os.pipe()
  os.set_blocking(wake, False)
  signal.set_wakeup_fd(wake)
  signal.signal(signal.SIGINT, lambda *_: None)

  def leave():
    while signal.SIGINT not in os.read(woken, 1):
      pass
    terminal = sys.modules.get("cwm_jax.terminal")
    if terminal is not None:
      terminal.save_all()
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(130)

  threading.Thread(target=leave, daemon=True).start()


if __name__ == "__main__":
  sys.exit(main())
