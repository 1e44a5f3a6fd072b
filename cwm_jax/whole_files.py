"""Files as wholes: written so that they are there whole or as they were, and their checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
  """A block that writes to the path it is given, which is `path` once the block has ended well.

  Raises:
    OSError: the path cannot be written.
  """
  # Processes, and threads that save at Ctrl-C, may write the same file at a time.
  partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
  try:
    yield partial
    # A power cut must not leave a name without what belongs there.
    with open(partial, "rb") as file:
      os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    # On a disk that has turned read-only there is nothing to tidy.
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
  """Writes JSON, indented; see `to_json`.

  Raises:
    OSError: the path cannot be written.
  """
  with writing(path) as partial:
    partial.write_text(to_json(content, indent=1) + "\n")


def to_json(content: Any, *, indent: int | None = None) -> str:
  """JSON that every reader takes: it has no NaN and no infinity, so these are null."""
  return json.dumps(_with_null(content), indent=indent, allow_nan=False)


def with_nan(numbers: Any) -> Any:
  """Numbers read from `to_json`, in mappings at any depth: what is null there is NaN again."""
  if isinstance(numbers, Mapping):
    return {name: with_nan(inner) for name, inner in numbers.items()}
  return math.nan if numbers is None else numbers


def _with_null(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {name: _with_null(inner) for name, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_with_null(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: str | os.PathLike[str]) -> str:
  """A file's SHA-256, hexadecimal.

  Raises:
    OSError: the path cannot be read.
  """
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
