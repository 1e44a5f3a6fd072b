"""Strict merging: parameters fit a model by name and shape, or the difference is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cwm_jax.types import InputError

_SHOWN = 4  # names listed on each side before "and n more"
_LONGEST = 100  # characters of one name that are shown


class NamesError(InputError):
  """Names or shapes of two tables do not agree; the sentence is short, the lists are whole.

  Attributes:
    sides: "missing", "unexpected" and "of another shape" -> names; those that are not empty.
  """

  def __init__(self, sentence: str, sides: dict[str, list[str]]):
    super().__init__(sentence)
    self.sides = sides


def check_names(
  found: dict[str, tuple[int, ...]],
  expected: dict[str, tuple[int, ...]],
  *,
  where: str,
  excuse_missing: str = "",
  excuse_extra: str = "",
) -> None:
  """Compares two tables of name -> shape.

  Args:
    found: what the file or checkpoint holds.
    expected: what the model has.
    where: names the origin of `found` in the message.
    excuse_missing: regex; expected names it matches from their start may be absent.
    excuse_extra: regex; found names it matches from their start may be left over.

  Raises:
    NamesError: names on either side are unmatched, or shapes differ; both sides are listed.
  """
  missing = [n for n in expected if n not in found and not _excused(excuse_missing, n)]
  extra = [n for n in found if n not in expected and not _excused(excuse_extra, n)]
  differ = [
    f"{n} {tuple(found[n])} for {tuple(expected[n])}"
    for n in expected
    if n in found and tuple(found[n]) != tuple(expected[n])
  ]
  sides = {"missing": missing, "unexpected": extra, "of another shape": differ}
  sides = {label: names for label, names in sides.items() if names}
  if sides:
    told = "; ".join(f"{label}: {_listed(names)}" for label, names in sides.items())
    raise NamesError(f"{where} does not fit the model ({told})", sides)


def merge(
  params: dict[str, Any],
  loaded: dict[str, Any],
  *,
  where: str,
  excuse_missing: str = "",
  excuse_extra: str = "",
) -> dict[str, Any]:
  """Takes every value of `params` that `loaded` also has from `loaded`.

  Args:
    params: flat dict name -> array, the model's own (its shapes rule).
    loaded: flat dict name -> array, to be merged in.
    where, excuse_missing, excuse_extra: as `check_names`.

  Returns:
    A flat dict with the names of `params`.

  Raises:
    NamesError: as `check_names`.
  """
  check_names(
    {name: value.shape for name, value in loaded.items()},
    {name: value.shape for name, value in params.items()},
    where=where,
    excuse_missing=excuse_missing,
    excuse_extra=excuse_extra,
  )
  return {name: loaded.get(name, value) for name, value in params.items()}


def axis_of(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int, *, where: str) -> int:
  """How long an axis of a named shape is.

  Raises:
    InputError: the shape has no such axis.
  """
  if axis >= len(shapes[name]):
    raise InputError(f"{where}: what becomes {name!r} has shape {shapes[name]}, too few axes")
  return shapes[name][axis]


def _excused(pattern: str, name: str) -> bool:
  return bool(pattern) and re.match(pattern, name) is not None


def _listed(names: list[str]) -> str:
  rest = len(names) - _SHOWN
  return ", ".join(name[:_LONGEST] for name in names[:_SHOWN]) + (
    f" and {rest} more" if rest > 0 else ""
  )


def agreeing_release(
  told: Mapping[str, Any],
  releases: Mapping[str, Mapping[str, Any]],
  release: str | None,
  *,
  where: str,
) -> dict[str, Any] | None:
  """The settings of the release that a file's shapes agree with; None where none does.

  Args:
    told: settings that the shapes fix.
    releases: name -> settings.
    release: the one it must be; None takes the first that agrees.
    where: names the file in the message.

  Raises:
    InputError: the shapes are not those of `release`.
  """
  for name in releases if release is None else [release]:
    if told.items() <= releases[name].items():
      return dict(releases[name])
  if release is None:
    return None
  named = releases[release]
  key = next(key for key in told if told[key] != named[key])
  raise InputError(f"{where} is not {release}: its {key} is {told[key]}, not {named[key]}")
