"""Progress for people only, and finished work that is kept."""

from __future__ import annotations

import io

import pytest

from cwm_jax import terminal
from cwm_jax.types import InputError


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_is_silent_where_nobody_looks(capsys):
  assert list(terminal.progress(range(5), total=5, unit="frames")) == list(range(5))
  assert capsys.readouterr() == ("", "")


def test_progress_at_a_terminal_is_one_line_that_is_wiped_at_the_end(monkeypatch):
  screen = _Terminal()
  monkeypatch.setattr("sys.stderr", screen)
  monkeypatch.setattr(terminal, "_EVERY_S", 0.0)
  assert list(terminal.progress(range(3), total=3, unit="frames")) == [0, 1, 2]
  shown = screen.getvalue().split("\r\033[K")
  assert [line.split(",")[0] for line in shown] == [
    "",
    *(f"{i} of 3 frames" for i in (1, 2, 3)),
    "",
  ]


@pytest.mark.parametrize(
  "count, total, line",
  [
    (120, 480, "120 of 480 frames, 4.0 a second, 1:30 left"),
    (120, None, "120 frames, 4.0 a second"),
    # A file may hold more than it claims.
    (120, 100, "120 frames, 4.0 a second"),
  ],
)
def test_the_line_tells_what_is_known(count, total, line):
  assert terminal.progress_line(count, total, 30.0, "frames") == line


def test_what_is_finished_is_told_in_the_sentence_of_what_went_wrong():
  with pytest.raises(InputError, match="^the file is damaged; two are kept$"):
    with terminal.keeping(lambda: "two are kept"):
      raise InputError("the file is damaged")
  with pytest.raises(InputError, match="^the file is damaged$"):
    with terminal.keeping(lambda: ""):
      raise InputError("the file is damaged")


def test_an_interruption_saves_all_that_is_under_way_once(capsys):
  saved = []

  def save(name):
    return lambda: saved.append(name) or f"{name} is kept"

  with pytest.raises(KeyboardInterrupt):
    with terminal.keeping(save("outer")), terminal.keeping(save("inner")):
      raise KeyboardInterrupt
  assert saved == ["inner", "outer"]
  assert capsys.readouterr().err.split() == ["inner", "is", "kept", "outer", "is", "kept"]
  terminal.save_all()
  assert saved == ["inner", "outer"]


def test_work_that_ended_well_is_not_saved_again():
  saved = []
  with terminal.keeping(lambda: saved.append(1) or "kept"):
    pass
  terminal.save_all()
  assert saved == []
