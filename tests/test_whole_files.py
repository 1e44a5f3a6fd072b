"""JSON for any reader: what is not a number is null, and comes back."""

from __future__ import annotations

import json
import math

import numpy as np

from cwm_jax import commands, whole_files


def _refuse(constant):
  raise ValueError(f"{constant} is not JSON")


def test_what_is_no_number_is_null_in_a_file_and_nan_again(tmp_path):
  numbers = {"a": {"known": 0.5, "unknown": math.nan, "endless": [np.float64("inf"), 1]}}
  whole_files.write_json(tmp_path / "a.json", numbers)
  found = json.loads((tmp_path / "a.json").read_text(), parse_constant=_refuse)
  assert found == {"a": {"known": 0.5, "unknown": None, "endless": [None, 1]}}
  again = whole_files.with_nan({"b": found["a"]})
  assert again["b"]["known"] == 0.5 and math.isnan(again["b"]["unknown"])


def test_a_commands_json_and_text_can_be_printed_whatever_they_hold(capsys):
  commands.report({"ratio": math.nan, "path": "a\udcff"}, "", as_json=True)
  printed = capsys.readouterr().out
  assert json.loads(printed, parse_constant=_refuse) == {"ratio": None, "path": "a\udcff"}
  commands.report({}, "written  a\udcff.npz", as_json=False)
  assert capsys.readouterr().out == "written  a\\udcff.npz\n"
