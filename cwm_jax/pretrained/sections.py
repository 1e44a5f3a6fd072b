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


def predicts_colours(config: Mapping[str, Any]) -> bool:
  """Whether a predictor's file holds one whose predictions are normalised colours.

  One that was trained with pretrain.target "normalised" predicts each patch without its brightness
  and contrast.
  """
  return (section(config, "pretrain") or {}).get("target") != "normalised"
