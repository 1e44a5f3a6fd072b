"""The folder a job writes to: no URL, writable, one for all its processes, of one job at a time.

Jobs work in a block of `working`. Nothing heavy is imported here: command lines ask for `local`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cwm_jax.types import InputError, SaveError

log = logging.getLogger(__name__)

_LOCK = "lock"
# A full disk, a used-up quota, a file system that turned read-only or broke.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# Seconds between a holder's signs of life, and after how many without one it is taken for dead.
_BEAT_S, _DEAD_S = 5.0, 60.0
# Seconds that a file of one host may take to appear on another.
_APPEARS_S = 5.0


@contextlib.contextmanager
def working(workdir: str | os.PathLike[str], *, shared: bool = True) -> Iterator[Path]:
  """A block in which one job, in all its processes, writes to a folder, which is made if absent.

  Args:
    shared: whether processes need each other's files; without, each may have a folder of its own.

  Yields:
    The folder's absolute path.

  Raises:
    InputError: it is a URL, cannot be written, is in use, or is another one in some process.
    SaveError: in the block the disk became full, read-only or broke.
  """
  import jax

  folder = check_writable(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(telling(folder))
    # All processes of a job write there; the first one stands for them.
    if jax.process_index() == 0:
      stack.enter_context(held(folder))
    if shared:
      check_shared(folder)
    yield folder


def local(folder: str | os.PathLike[str]) -> Path:
  """A folder's absolute path. Raises InputError where it is a URL, which is no folder here."""
  text = os.fspath(folder)
  # A Path has lost one of the two slashes. One letter is a drive.
  if re.match(r"[A-Za-z][\w+.-]+:/", text):
    raise InputError(
      f"{text} is a URL, not a folder: mount the bucket on every host, say by gcsfuse (launch/tpu "
      "does so with MOUNT), and give the folder where it is mounted"
    )
  return Path(text).absolute()


def check_writable(workdir: str | os.PathLike[str]) -> Path:
  """Makes the folder if it is not there.

  Returns:
    Its absolute path.

  Raises:
    InputError: it is a URL, or cannot be made or written to.
  """
  folder = local(workdir)
  try:
    make(folder)
  except OSError as error:
    raise InputError(f"workdir {workdir} cannot be written: {error.strerror}") from None
  return folder


def make(folder: Path) -> None:
  """Makes a folder if it is not there. Raises OSError where it cannot be made or written to."""
  probe = folder / f".writable.{os.getpid()}"
  folder.mkdir(parents=True, exist_ok=True)
  probe.touch()
  probe.unlink(missing_ok=True)  # two hosts may share a process id


@contextlib.contextmanager
def telling(folder: Path) -> Iterator[None]:
  """A block in which a disk that is full, read-only or broken is told by a SaveError.

  Raises:
    SaveError: it is the folder's, as far as the error names a file.
  """
  try:
    yield
  except (OSError, InputError) as told:
    # Weights and pictures that cannot be written have a sentence of their own, and name the file.
    error = told if isinstance(told, OSError) else told.__cause__
    if not isinstance(error, OSError) or error.errno not in _UNWRITABLE:
      raise
    ours = _lies_in(folder, error.filename) if error.filename else error is told
    if not ours:
      raise
    raise SaveError(
      f"workdir {folder} can no longer be written ({error.strerror}): make room or mend the disk, "
      "and start again with the same command"
    ) from error


def _lies_in(folder: Path, name: str | bytes | int) -> bool:
  return isinstance(name, int) or Path(os.fsdecode(name)).absolute().is_relative_to(folder)


def check_shared(folder: Path) -> None:
  """Compares the folder with that of process 0; all processes must ask at the same point.

  Raises:
    InputError: in every process, where one of them sees another folder under this path.
  """
  import jax

  from cwm_jax import processes

  if jax.process_count() == 1:
    return
  first = jax.process_index() == 0
  # A name that nobody has asked for: file systems of a network remember what was not there.
  mark = folder / f".seen.{secrets.token_hex(8)}"
  if first:
    mark.touch()
  mark = folder / processes.of_first_process(mark.name.encode()).decode()
  sees = processes.everyone(b"yes" if _appears(mark) else b"")
  if first:
    mark.unlink(missing_ok=True)
  blind = ", ".join(str(process) for process, seen in enumerate(sees) if not seen)
  if blind:
    raise InputError(
      f"process {blind} of {len(sees)} does not see the workdir of process 0, {folder}: give all "
      "one folder, mounted on every host"
    )


def _appears(path: Path) -> bool:
  """Whether a file of another host is there, or comes to be in time."""
  until = time.monotonic() + _APPEARS_S
  while not path.exists():
    if time.monotonic() > until:
      return False
    time.sleep(0.2)
  return True


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
  """A block in which no other job holds the folder, as far as its file system knows of locks.

  A lock ends with the process that took it, except on a server whose client lost power. A holder
  therefore gives signs of life, too, and a lock without them is passed over.

  Raises:
    InputError: another job holds it; the sentence says which. Or its lock cannot be written.
  """
  path, ended = folder / _LOCK, threading.Event()

  def beat() -> None:
    while not ended.wait(_BEAT_S):
      # That the disk failed is told by whoever saves.
      with contextlib.suppress(OSError):
        os.utime(path)

  try:
    file = open(path, "a", encoding="utf-8")
  except OSError as error:
    raise InputError(f"{path} cannot be written: {error.strerror}") from None
  with file:
    _take(file, path)
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}")
    file.flush()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
      yield
    finally:
      ended.set()
      thread.join()


def _take(file: IO[str], path: Path) -> None:
  """Locks the file; returns without where there are no locks, or its holder seems to be dead."""
  last, beats, heard = None, 0, time.monotonic()
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return
    except BlockingIOError:
      pass
    except OSError as error:
      log.debug("%s cannot be locked: %s", path, error)
      return
    # Opened anew: a network's file system then asks the server for the time, and not its memory.
    with open(path, encoding="utf-8") as now:
      holder, sign = now.read().strip(), os.fstat(now.fileno()).st_mtime_ns
    if sign != last:
      beats, last, heard = beats + 1, sign, time.monotonic()
    # The first one seen may be of long ago; the second, the last of one that was ending.
    if beats > 2:
      raise InputError(
        f"{path.parent} is in use by another job, {holder}: end that one, or give another folder"
      )
    if time.monotonic() - heard > _DEAD_S:
      log.warning("%s is locked by %s, which gives no sign of life: going on", path.parent, holder)
      return
    time.sleep(_BEAT_S / 10)
