"""The folders that environment variables name, and what happens where they are not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest


def named_by(variable: str) -> Path:
  """The folder that an environment variable names."""
  value = os.environ.get(variable, "")
  if value and Path(value).is_dir():
    return Path(value)
  skip(f"set {variable} to an existing folder to run this test (it is {value!r})")


class Extract(type(Path())):
  """A folder that holds a part of a set of stored reference values: see `skip`."""

  def __truediv__(self, name):
    path = Path(str(self), name)
    if not path.exists():
      skip(f"set CWM_GOLDENS to a whole set to run this test; the extract lacks {name}")
    return path


def skip(reason: str) -> NoReturn:
  """Skips the test, or fails it where CI=true: there, nothing is left out in silence."""
  if os.environ.get("CI", "").lower() in ("1", "true"):
    pytest.fail(reason)
  pytest.skip(reason)
