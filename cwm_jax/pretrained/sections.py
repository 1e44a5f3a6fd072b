"""Sections of a config that came with a file, which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
  """The section, or None where the file has none of that name."""
  found = config.get(name)
  return found if isinstance(found, Mapping) else None


def kind_of(config: Mapping[str, Any], name: str) -> Any:
  """What the section says its `kind` is; None where it does not, or is not there."""
  return (section(config, name) or {}).get("kind")
