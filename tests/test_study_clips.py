"""The study on annotated clips: it goes on clip by clip, and knows the clips."""

from __future__ import annotations

import json

import joint_job
import pytest
import tapvid_clips

from cwm_jax import study
from cwm_jax.evals import tapvid
from cwm_jax.types import InputError


class PowerCutError(Exception):
  pass


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
  return joint_job.weights_file(tmp_path_factory.mktemp("predictor"))


def clips_job(predictor, tmp_path, **changes):
  if not (tmp_path / "clips").exists():
    for i in range(3):
      tapvid_clips.write_clip(tmp_path / "clips" / f"clip{i}", frames=3, hw=(16, 32), seed=i)
  config = joint_job.get_config(predictor)
  config.study.update(marks=("red",), masks=(1,), seeds=(0,), scenes=0)
  config.study.update(tapvid=str(tmp_path / "clips"), **changes)
  return config


@pytest.fixture
def asked(monkeypatch):
  """The clips that are asked about; add a None, and there is a power cut at the third question."""
  real, names = tapvid.tapvid_answers.ask, []

  def ask(*args, **settings):
    if None in names and len(names) == 3:
      raise PowerCutError
    names.append(args[1].name)
    return real(*args, **settings)

  monkeypatch.setattr(tapvid.tapvid_answers, "ask", ask)
  return names


def test_a_study_on_clips_goes_on_where_it_was_left_and_never_with_answers_of_another(
  predictor, tmp_path, asked
):
  workdir = tmp_path / "study"
  asked.append(None)
  with pytest.raises(PowerCutError):
    study.run(clips_job(predictor, tmp_path), workdir)
  assert asked == [None, "clip0", "clip1"]
  # Under another protocol two clips' answers are there that are not its own.
  asked.clear()
  (other,) = study.run(clips_job(predictor, tmp_path, protocol="first"), workdir).values()
  assert asked == ["clip0", "clip1", "clip2"]
  (alone,) = study.run(clips_job(predictor, tmp_path, protocol="first"), tmp_path / "2").values()
  assert other["average_distance"] == alone["average_distance"]
  with pytest.raises(InputError, match="other settings .protocol.; take another --workdir"):
    study.run(clips_job(predictor, tmp_path), workdir)


def test_an_interrupted_study_on_clips_asks_about_the_rest_only(predictor, tmp_path, asked):
  asked.append(None)
  with pytest.raises(PowerCutError):
    study.run(clips_job(predictor, tmp_path), tmp_path / "study")
  asked.clear()
  (found,) = study.run(clips_job(predictor, tmp_path), tmp_path / "study").values()
  assert asked == ["clip2"]
  asked.clear()
  (whole,) = study.run(clips_job(predictor, tmp_path), tmp_path / "whole").values()
  assert found["num_clips"] == 3 and found["average_distance"] == whole["average_distance"]


def test_clips_are_known_by_what_they_are_and_not_by_where_they_lie(predictor, tmp_path, asked):
  config, workdir = clips_job(predictor, tmp_path), tmp_path / "study"
  (cell,) = study.run(config, workdir)
  (tmp_path / "clips").rename(tmp_path / "moved")
  config.study.tapvid = str(tmp_path / "moved")
  stamp = cell.path(workdir).stat().st_mtime_ns
  study.run(config, workdir)
  assert cell.path(workdir).stat().st_mtime_ns == stamp
  # Cells of before told a path in place of the clips.
  kept = json.loads(cell.path(workdir).read_text())
  del kept["settings"]["clips"]
  before = kept["settings"] | {"tapvid": "elsewhere"}
  cell.path(workdir).write_text(json.dumps(kept | {"settings": before}))
  study.run(config, workdir)
  assert json.loads(cell.path(workdir).read_text())["settings"] == before
  # So do the answers of a cell that was left.
  cell.path(workdir).unlink()
  asked.clear()
  study.run(config, workdir)
  assert asked == []
  tapvid_clips.write_clip(tmp_path / "moved" / "clip3", frames=3, hw=(16, 32), seed=3)
  with pytest.raises(InputError, match="other settings .clips.; take another --workdir"):
    study.run(config, workdir)


@pytest.mark.parametrize(
  "more, again", [(0, ["clip1"]), (9, ["clip0", "clip1", "clip2"])], ids=["unread", "mended"]
)
def test_a_cell_that_lacks_a_clip_says_so_and_is_not_kept_as_whole(
  predictor, tmp_path, asked, more, again
):
  config, workdir = clips_job(predictor, tmp_path), tmp_path / "study"
  frame = tmp_path / "clips" / "clip1" / "video" / "001.png"
  whole = frame.read_bytes()
  # To the study a frame is another one if its file has another size.
  frame.write_bytes(bytes(len(whole) + more))
  (found,) = study.run(config, workdir).values()
  assert (found["num_clips"], found["num_skipped"]) == (2, 1)
  told = "red square at MM-1, seed 0, is of 2 of 3 clips: the others could not be read"
  assert told in (workdir / "study.md").read_text()
  frame.write_bytes(whole)
  asked.clear()
  (found,) = study.run(config, workdir).values()
  assert asked == again and (found["num_clips"], found["num_skipped"]) == (3, 0)
  assert "could not be read" not in (workdir / "study.md").read_text()
