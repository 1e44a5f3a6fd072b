"""Files as wholes: written so that they are there whole or as they were, and their checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
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
  """Writes JSON, indented.

  Raises:
    OSError: the path cannot be written.
  """
  with writing(path) as partial:
    partial.write_text(json.dumps(content, indent=1) + "\n")


def sha256(path: str | os.PathLike[str]) -> str:
  """A file's SHA-256, hexadecimal.

  Raises:
    OSError: the path cannot be read.
  """
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
