"""Two files of benchmark rows: what became better, what worse.

Run by `launch/bench compare OLD NEW`, where each file holds the JSON lines of one or more benches.
Rows are the same measurement when all that is said of them besides numbers measured is the same,
versions apart. Exit code 1 when a measure got worse by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# What a number's name says of it; others are shown and not judged.
_HIGHER = (
  *("per_second", "utilisation", "ratio", "efficiency", "same_destinations", "identical"),
  *("delta_avg", "share_within_1_px", "fewer_marked", "fewer_in_all"),
)
_LOWER = (
  *("seconds", "seconds_per_pair", "seconds_per_point", "mib", "gib", "_s", "compilations"),
  *("average_distance", "median_distance", "median_px", "percentile_98_px", "apart_px"),
  *("passes", "passes_per_point", "marked_a_point", "clean_a_pair"),
)
# Found out in a run though no fractions, and asked for though one.
_FOUND = ("skipped", "kills", "kills_in_a_save", "steps_saved", "fixed_as_good", "bound_by")
_ASKED = ("votes",)


class Change(NamedTuple):
  """One number of one row: what it is of, its name, and both values."""

  what: str
  name: str
  old: float
  new: float

  def worse_by(self) -> float:
    """The share by which it got worse; below 0 where it got better, 0 where that is not known."""
    sign = _sign(self.name)
    if not sign or self.old == self.new:
      return 0.0
    if not self.old:
      return float("inf") if sign * (self.new - self.old) < 0 else float("-inf")
    return sign * (self.old - self.new) / abs(self.old)


def _sign(name: str) -> int:
  """1 where higher is better, -1 where lower is, else 0."""
  if name.startswith("baseline"):
    return 0
  # Rates first: they too end in "second".
  if any(name.endswith(end) for end in _HIGHER):
    return 1
  return -1 if any(name.endswith(end) for end in _LOWER) else 0


def read(path: Path) -> dict[str, dict[str, Any]]:
  """{what was measured: row}; of rows that are the same measurement, the last one.

  Raises:
    ValueError: a line is not a row.
  """
  rows = {}
  for number, line in enumerate(path.read_text().splitlines(), start=1):
    try:
      row = json.loads(line)
      rows[_identity(row)] = row
    except (ValueError, KeyError, AttributeError):
      raise ValueError(f"{path}, line {number} is not a row of a benchmark") from None
  return rows


def _identity(row: dict[str, Any]) -> str:
  """The measure first, then all that is no measured number."""
  rest = {
    name: value
    for name, value in sorted(row.items())
    if name not in ("measure", "versions", "baseline")
    and not _measured(name, value)
    and value is not None
  }
  told = " ".join(f"{name}={json.dumps(value)}" for name, value in rest.items())
  return f"{row['measure']} {told}"


def _measured(name: str, value: Any) -> bool:
  """Whether a run finds it out; what is asked for are words, whole numbers, lists of these."""
  if name in _ASKED:
    return False
  values = value if isinstance(value, list) else [value]
  fractions = any(isinstance(one, float) for one in values)
  return fractions or name in _FOUND or _sign(name) != 0


def changes(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> Iterator[Change]:
  """Numbers that both files have."""
  for what in old.keys() & new.keys():
    for name, before in old[what].items():
      after = new[what].get(name)
      if _measured(name, before) and all(isinstance(v, int | float) for v in (before, after)):
        yield Change(what, name, float(before), float(after))


def main() -> int:
  """Prints what became better or worse; exit code 1 where something got worse."""
  parser = argparse.ArgumentParser(
    prog="launch/bench compare", description=__doc__.split("\n\n")[0]
  )
  parser.add_argument("old", type=Path)
  parser.add_argument("new", type=Path)
  parser.add_argument("--tolerance", type=float, default=0.1, help="share that may be noise")
  options = parser.parse_args()
  try:
    old, new = read(options.old), read(options.new)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  failed = False
  shown = ""
  for change in sorted(changes(old, new)):
    if change.what != shown:
      shown = change.what
      print(shown)
    worse = change.worse_by()
    verdict = "WORSE" if worse > options.tolerance else ""
    verdict = "better" if worse < -options.tolerance else verdict
    failed |= verdict == "WORSE"
    print(f"  {change.name:28} {change.old:12.5g} -> {change.new:12.5g}  {verdict}".rstrip())
  for missing, where in ((old.keys() - new.keys(), "old"), (new.keys() - old.keys(), "new")):
    for what in sorted(missing):
      print(f"only in the {where} file: {what}")
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
