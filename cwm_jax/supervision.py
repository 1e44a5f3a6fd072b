"""A process that does its work in a child, and says in a sentence what ended it from below.

Nothing here imports JAX, which must not be loaded before the child is forked.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

# Exit code of a run that goes on from its last checkpoint when it is started again.
START_AGAIN = 4
# Of one of a cluster's processes that SIGTERM had save and leave before its end, also where another
# one got the signal: to whoever starts such jobs, 0 would mean that it is done.
LEFT_EARLY = 5


def supervise(work: Callable[[], None]) -> int:
  """Does `work` in a child process and says in a sentence when it is ended from below.

  JAX aborts a process whose connection to process 0 is lost, and drivers may crash one; no Python
  of that process runs any more. Must be called before JAX is imported.

  Returns:
    The exit code: `work`'s own, or START_AGAIN when a signal ended it.
  """
  # Whoever is told to leave before both are ready is told then.
  told = (signal.SIGTERM, signal.SIGINT)
  signal.pthread_sigmask(signal.SIG_BLOCK, told)
  parent, child = os.getpid(), os.fork()
  if not child:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, told)
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    work()
    return 0
  for number in told:
    signal.signal(number, lambda number, _: os.kill(child, number))
  signal.pthread_sigmask(signal.SIG_UNBLOCK, told)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if code >= 0:
    return code
  name = signal.Signals(-code).name
  why = ", as when process 0 or the way to it is lost" if name == "SIGABRT" else ""
  print(
    f"error: ended by {name}{why}; leaving, so that all processes can be started again: they go "
    "on from the last checkpoint",
    file=sys.stderr,
    flush=True,
  )
  return START_AGAIN


def end_with_parent(parent: int) -> None:
  """Ends this process when the one that started it is killed outright; for a thread."""
  while os.getppid() == parent:
    time.sleep(1.0)
  os._exit(1)
