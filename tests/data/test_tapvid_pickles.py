"""TAP-Vid's pickles: each set's form, encoded frames, shards, and what is broken in them."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from cwm_jax.data import tapvid_pickles
from cwm_jax.types import InputError


def _entry(seed=0, *, frames=3, hw=(12, 20), points=2):
  rng = np.random.default_rng(seed)
  return {
    "video": rng.integers(0, 256, (frames, *hw, 3), dtype=np.uint8),
    "points": rng.uniform(0.1, 0.9, (points, frames, 2)).astype(np.float32),
    "occluded": rng.uniform(size=(points, frames)) < 0.3,
  }


def _jpeg(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="JPEG", quality=95)
  return buffer.getvalue()


def _write(path, content):
  path.write_bytes(pickle.dumps(content, protocol=4))
  return path


def test_davis_is_a_dict_by_name(tmp_path):
  content = {"dog": _entry(1), "bear": _entry(2)}
  clips = tapvid_pickles.open_clips(_write(tmp_path / "davis.pkl", content))
  assert clips.names == ["bear", "dog"]
  clip = clips.read(1)
  assert clip.name == "dog"
  np.testing.assert_array_equal(clip.video, content["dog"]["video"])
  np.testing.assert_array_equal(clip.occluded, content["dog"]["occluded"])
  # The frame's width and height count as 1 in the file; here they are 20 and 12 pixels.
  np.testing.assert_allclose(clip.points_xy, content["dog"]["points"] * [20, 12], rtol=1e-6)


def test_rgb_stacking_is_a_list(tmp_path):
  clips = tapvid_pickles.open_clips(_write(tmp_path / "stack.pkl", [_entry(1), _entry(2)]))
  assert clips.names == ["stack-0000", "stack-0001"]
  assert clips.read(1).video.shape == (3, 12, 20, 3)


@pytest.mark.parametrize("container", [list, np.array])
def test_kinetics_is_a_folder_of_shards_with_encoded_frames(tmp_path, container):
  shards = [[_entry(1), _entry(2)], [_entry(3)]]
  for number, entries in enumerate(shards):
    encoded = [{**e, "video": container([_jpeg(f) for f in e["video"]])} for e in entries]
    _write(tmp_path / f"{number:04}_of_0002.pkl", encoded)
  clips = tapvid_pickles.open_clips(tmp_path)
  assert clips.names == ["0000_of_0002-0000", "0000_of_0002-0001", "0001_of_0002-0000"]
  for index in (2, 0):
    want = (shards[0] + shards[1])[index]["video"]
    got = clips.read(index).video
    assert got.shape == want.shape and got.dtype == np.uint8
    # JPEG of noise is rough; another clip's frames would be off by 85 on average.
    assert np.abs(got.astype(int) - want).mean() < 60


def test_entries_that_name_their_video_are_called_so_and_kept_apart(tmp_path):
  entries = [{**_entry(i), "video_id": name} for i, name in enumerate(["a/b", "..c", "a/b"])]
  clips = tapvid_pickles.open_clips(_write(tmp_path / "k.pkl", entries))
  assert clips.names == ["a_b-0000", "c-0001", "a_b-0002"]


def test_kubric_has_pixels_floats_and_a_batch_axis(tmp_path):
  entry = _entry(1)
  element = {
    "video": (entry["video"].astype(np.float32) / 127.5 - 1.0)[None],
    "target_points": (entry["points"] * np.float32([20, 12]))[None],
    "occluded": entry["occluded"][None],
  }
  clip = tapvid_pickles.open_clips(_write(tmp_path / "kubric.pkl", [element])).read(0)
  np.testing.assert_array_equal(clip.video, entry["video"])
  np.testing.assert_allclose(clip.points_xy, entry["points"] * [20, 12], rtol=1e-6)
  np.testing.assert_array_equal(clip.occluded, entry["occluded"])


def _broken(name):
  entry = _entry(1)
  if name == "no dict":
    return [1, 2]
  if name == "lacks points":
    return {k: v for k, v in entry.items() if k != "points"}
  if name == "frame 1 cannot be decoded":
    video = [_jpeg(frame) for frame in entry["video"]]
    return {**entry, "video": [video[0], video[1][:40], video[2]]}
  if name == "frame 0 is neither":
    return {**entry, "video": ["x", "y", "z"]}
  if name == "different sizes":
    return {**entry, "video": [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]}
  if name == "should have frames uint8":
    return {**entry, "video": np.zeros((3, 12, 20), np.uint8)}
  if name == "should have points":
    return {**entry, "points": entry["points"][:, :2]}
  if name == "points or occluded of uneven rows":
    return {**entry, "points": [[1.0, 2.0], [3.0]]}
  if name == "or occluded of uneven rows":
    return {**entry, "occluded": [[0], [1, 0]]}
  if name == "neither an array nor":
    return {**entry, "video": "frames.mp4"}
  points = np.where(entry["occluded"][..., None], entry["points"], np.float32(np.nan))
  return {**entry, "points": points}


@pytest.mark.parametrize(
  "sentence",
  [
    "no dict",
    "lacks points",
    "frame 1 cannot be decoded",
    "frame 0 is neither",
    "different sizes",
    "should have frames uint8",
    "should have points",
    "points or occluded of uneven rows",
    "or occluded of uneven rows",
    "neither an array nor",
    "without a finite place",
  ],
)
def test_a_broken_entry_is_named_and_the_others_are_read(tmp_path, sentence):
  content = {"bad": _broken(sentence), "good": _entry(2)}
  clips = tapvid_pickles.open_clips(_write(tmp_path / "set.pkl", content))
  with pytest.raises(InputError, match=f"set.pkl, bad.*{sentence}"):
    clips.read(0)
  assert clips.read(1).name == "good"


@pytest.mark.parametrize("content, sentence", [(7, "neither a dict nor a list"), ([], "no clips")])
def test_a_pickle_of_something_else_is_refused(tmp_path, content, sentence):
  with pytest.raises(InputError, match=sentence):
    tapvid_pickles.open_clips(_write(tmp_path / "set.pkl", content))


class _Hostile:
  def __reduce__(self):
    return exec, ("raise SystemExit('executed')",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
  with pytest.raises(InputError, match="set.pkl"):
    tapvid_pickles.open_clips(_write(tmp_path / "set.pkl", {"dog": _Hostile()}))


def test_a_folder_without_pickles_is_a_folder_of_clips(tmp_path):
  with pytest.raises(InputError, match="holds no clips"):
    tapvid_pickles.open_clips(tmp_path)
