"""Fetches a file over HTTP: in pieces that add up, checked against what was fetched before.

What arrives is written to FILE.part, so a later call goes on where an interrupted one stopped. The
checksum of a whole file is recorded beside it at its first use, as FILE.sha256, and compared at
every later one.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import logging
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cwm_jax import whole_files
from cwm_jax.types import InputError

Progress = Callable[[int, int | None], None]  # (bytes so far, bytes in all where known)
_LOG = logging.getLogger(__name__)
_PIECE = 1 << 20
_TIMEOUT_S = 30
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


def fetch(
  address: str,
  path: Path,
  *,
  size: int | None = None,
  sha256: str | None = None,
  progress: Progress | None = None,
) -> str:
  """Makes sure that a file is there, whole and unchanged.

  Where another process is fetching it, waits, and goes on with what that one leaves.

  Args:
    address: http or https.
    path: where it lies or is put; folders are made.
    size, sha256: what the file is known to be, of the checksum perhaps only its beginning; None
      where that is not known.
    progress: called as bytes arrive.

  Returns:
    The file's checksum, SHA-256 as hexadecimal digits.

  Raises:
    InputError: it cannot be fetched, or is another file than was expected; the sentence says what
      to do.
  """
  if not path.is_file():
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      with _locked_part(path) as part:
        # Whoever held the lock may have finished the file meanwhile.
        try:
          if not path.is_file():
            _download(address, path, part, progress)
            os.replace(part.name, path)
        finally:
          if path.is_file() or not os.path.getsize(part.name):
            for ending in (".part", ".part.tag"):
              _beside(path, ending).unlink(missing_ok=True)
    except OSError as error:
      raise InputError(f"cannot write {path}: {error.strerror or error}") from None
  return _verify(path, size=size, sha256=sha256)


def recorded(path: Path) -> str | None:
  """The checksum that was recorded when the file was first used; None where it never was."""
  try:
    text = _beside(path, ".sha256").read_text().strip()
  except (OSError, UnicodeDecodeError):
    return None
  return text if re.fullmatch("[0-9a-f]{64}", text) else None


def print_progress(name: str) -> Progress:
  """A `Progress` that tells standard error how far it is, on one line of a terminal."""
  last = [0.0]

  def tell(done: int, total: int | None) -> None:
    every = 0.2 if sys.stderr.isatty() else 10.0
    finished = done == total
    if finished or time.monotonic() - last[0] >= every:
      last[0] = time.monotonic()
      share = f" of {total / 1e6:,.0f}" if total else ""
      end = "\r" if sys.stderr.isatty() and not finished else "\n"
      print(f"{name}: {done / 1e6:,.0f}{share} MB", end=end, file=sys.stderr, flush=True)

  return tell


def _download(address: str, path: Path, part: BinaryIO, progress: Progress | None) -> None:
  tag = _beside(path, ".part.tag")
  start = os.fstat(part.fileno()).st_size
  try:
    response = _open(address, start, tag)
    if start and response is None:  # what lies here fits no more: begin anew
      part.truncate(0)
      response = _open(address, start := 0, tag)
  except urllib.error.HTTPError as error:
    raise InputError(
      f"{address} answers {error.code} {error.reason}; fetch it elsewhere and put it at {path}"
    ) from None
  except (OSError, http.client.HTTPException) as error:
    raise InputError(
      f"{address} cannot be reached ({_reason(error)}); fetch it elsewhere and put it at {path}"
    ) from None
  with response:
    match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status != 206:
      part.truncate(0)
      start = 0
    length = response.headers.get("Content-Length", "")
    total = int(match[2]) if match else start + int(length) if length.isdecimal() else None
    tag.write_text(json.dumps(response.headers.get("ETag", "")))
    done = start
    try:
      while piece := response.read(_PIECE):
        part.write(piece)
        done += len(piece)
        if progress is not None:
          progress(done, total)
    except (OSError, http.client.HTTPException) as error:
      if isinstance(error, http.client.IncompleteRead):
        part.write(error.partial)
        done += len(error.partial)
      part.flush()
      raise InputError(_interrupted(address, done, _reason(error))) from None
  part.flush()
  if total is not None and done != total:
    raise InputError(_interrupted(address, done, f"{total - done:,} bytes are missing"))


def _open(address: str, start: int, tag: Path) -> http.client.HTTPResponse | None:
  """The answer from byte `start` on; None where the server has no such part of the same file."""
  headers = {"User-Agent": "cwm_jax", "Accept-Encoding": "identity"}
  if start:
    headers["Range"] = f"bytes={start}-"
    if known := _known_tag(tag):
      headers["If-Range"] = known
  try:
    response = urllib.request.urlopen(
      urllib.request.Request(address, headers=headers), timeout=_TIMEOUT_S
    )
  except urllib.error.HTTPError as error:
    if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
      return None
    raise
  match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
  if response.status == 206 and (match is None or int(match[1]) != start):
    response.close()
    return None
  return response


def _known_tag(tag: Path) -> str:
  try:
    known = json.loads(tag.read_text())
  except (OSError, ValueError):
    return ""
  return known if isinstance(known, str) and not known.startswith("W/") else ""


def _verify(path: Path, *, size: int | None, sha256: str | None) -> str:
  """Compares a file with what is known of it; records its checksum where nothing was."""
  try:
    found_size = path.stat().st_size
    if size is not None and found_size != size:
      raise InputError(
        f"{path} has {found_size:,} bytes, not {size:,}; delete it to have it fetched anew"
      )
    found = whole_files.sha256(path)
    known = sha256 or recorded(path)
    if known is not None and not found.startswith(known):
      raise InputError(
        f"{path} is not the file it should be: its SHA-256 begins {found[:12]}, not {known[:12]}; "
        "delete it to have it fetched anew"
      )
    if recorded(path) != found:
      # Another process may read it now.
      with whole_files.writing(_beside(path, ".sha256")) as partial:
        partial.write_text(found + "\n")
  except OSError as error:
    raise InputError(f"cannot use {path}: {error.strerror or error}") from None
  return found


@contextlib.contextmanager
def _locked_part(path: Path) -> Iterator[BinaryIO]:
  """FILE.part, open for appending, once no other process has it."""
  while True:
    with open(_beside(path, ".part"), "ab") as part:
      try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        _LOG.warning("another process is fetching %s; waiting for it", path)
        fcntl.flock(part, fcntl.LOCK_EX)
      # Whoever held it may have made the whole file of it, or thrown it away where nothing came.
      if path.is_file() or _is_named(part):
        yield part
        return


def _is_named(part: BinaryIO) -> bool:
  """Whether an open file still lies under its name."""
  try:
    return os.path.samestat(os.fstat(part.fileno()), os.stat(part.name))
  except FileNotFoundError:
    return False


def _beside(path: Path, ending: str) -> Path:
  return path.with_name(path.name + ending)


def _reason(error: Exception) -> str:
  reason = getattr(error, "reason", None) or error
  return str(getattr(reason, "strerror", None) or reason or type(error).__name__).strip()


def _interrupted(address: str, done: int, reason: str) -> str:
  return f"{address} stopped after {done / 1e6:,.1f} MB ({reason}); run this again to go on there"
