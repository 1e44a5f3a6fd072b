"""How a command is described, and the options that several commands have."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from cwm_jax import argument_values as values

_WIDTH = 80


def add_command(
  commands: Any, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
  """Adds a command; its examples are shown as they are written."""
  return commands.add_parser(
    name,
    help=summary,
    description=textwrap.fill(description, _WIDTH),
    epilog=f"examples:\n{examples}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def add_reading(
  parser: argparse.ArgumentParser, *, masks: int = 10, adaptive: bool = False, marked: bool = True
) -> None:
  """Adds the options of every command that asks a predictor.

  Args:
    masks: the default.
    adaptive: whether the command can let each point choose its masks.
    marked: whether the command marks points and reads where they went; else there is no mark and no
      read-out to choose.
  """
  parser.add_argument(
    "--weights",
    metavar="FILE",
    help="weights file, or a release's name such as opt-cwm-512 (default: the one that is shipped)",
  )
  if marked:
    parser.add_argument(
      "--mark",
      metavar="FILE",
      help="a mark that a joint training learned (default: the one that the weights recommend)",
    )
  parser.add_argument(
    "--masks",
    type=values.masks if adaptive else values.positive,
    default=masks,
    metavar="N",
    help=f"masks averaged; more is slower and better (default: {masks})"
    + (
      "; 'adaptive': each point chooses, and stops when its answer is settled" if adaptive else ""
    ),
  )
  if marked:
    parser.add_argument(
      "--readout",
      choices=("argmax", "soft", "window"),
      default="window",
      help="how the response is read; window goes below a pixel (default: window)",
    )
  else:
    parser.set_defaults(mark=None, readout="window")
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the masks (default: 0)")


def add_out(parser: argparse.ArgumentParser, out: str) -> None:
  """Adds where things are written, by default `out`, and how the outcome is printed."""
  parser.add_argument(
    "--out",
    type=values.folder,
    default=out,
    metavar="DIR",
    help=f"folder for what is written (default: {out})",
  )
  add_json(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
  """Adds --set, for commands that make a config."""
  parser.add_argument(
    "--set",
    dest="settings",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="any key of configs/base.py; may be given several times",
  )


def add_json(parser: argparse.ArgumentParser) -> None:
  """Adds --json."""
  parser.add_argument(
    "--json", dest="as_json", action="store_true", help="print JSON instead of text"
  )
