"""What a test needs and does not have skips it, and fails it where CI=true."""

from __future__ import annotations

import given_folders
import pytest


@pytest.mark.parametrize(
  "ci, outcome", [("", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_folders_and_parts_of_sets_that_are_not_there_fail_the_tests_of_ci_only(
  monkeypatch, tmp_path, ci, outcome
):
  monkeypatch.setenv("CI", ci)
  monkeypatch.delenv("CWM_DATA", raising=False)
  with pytest.raises(outcome, match="set CWM_DATA to an existing folder"):
    given_folders.named_by("CWM_DATA")
  (tmp_path / "there").touch()
  extract = given_folders.Extract(tmp_path)
  assert extract / "there" == tmp_path / "there"
  with pytest.raises(outcome, match="the extract lacks absent"):
    extract / "absent"
