"""The launch scripts, in an environment that holds none of their settings."""

from __future__ import annotations

import os
import re

import tiny_job

LAUNCH = tiny_job.ROOT / "launch"


def environment(**variables: str) -> dict[str, str]:
  """This process's environment with these variables; others that set a script are left out."""
  scripts = (path.read_text() for path in LAUNCH.iterdir() if path.is_file() and not path.suffix)
  settings = {
    name for text in scripts for name in re.findall(r"^([A-Z_]+)=\$\{\1:-", text, re.MULTILINE)
  }
  kept = {name: value for name, value in os.environ.items() if name not in settings}
  return {**kept, **variables}
