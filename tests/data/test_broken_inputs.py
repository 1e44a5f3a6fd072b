"""Whatever is wrong with a file: a sentence that names it, or a replacement that is counted."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from cwm_jax.data import flowfiles, images, listing, sources, tapvid, video
from cwm_jax.types import InputError


def _text(path, movies):
  path.write_text("this is not a video\n" * 100)


def _empty(path, movies):
  path.touch()


def _noise(path, movies):
  path.write_bytes(np.random.default_rng(0).bytes(5000))


def _header_only(path, movies):
  path.write_bytes(movies.write_video(path.with_name("whole.mkv"), 20).read_bytes()[:400])
  path.with_name("whole.mkv").unlink()


def _index_lost(path, movies):
  data = movies.write_video(path, 30).read_bytes()
  path.write_bytes(data[: len(data) * 6 // 10])


def _audio(path, movies):
  movies.write_audio(path.with_suffix(".wav")).rename(path)


def _one_frame(path, movies):
  movies.write_video(path, 1)


def _still(path, movies):
  Image.fromarray(movies.picture(1)).save(path.with_suffix(".png"))
  path.with_suffix(".png").rename(path)


def _dangling(path, movies):
  path.symlink_to(path.with_name("gone.mp4"))


def _folder(path, movies):
  path.mkdir()


def _pipe(path, movies):
  os.mkfifo(path)


def _subtitles(path, movies):
  path.write_text("1\n00:00:00,000 --> 00:00:10,000\nhello\n")


def _play_list(path, movies):
  path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n")


def _concat(path, movies):
  path.write_text("ffconcat version 1.0\nfile http://127.0.0.1:9/a.mp4\n")


def _huge(path, movies):
  """An AVI header that claims a gigantic frame."""
  movies.write_video(path.with_name("whole.avi"), 12, codec="rawvideo")
  data = bytearray(path.with_name("whole.avi").read_bytes())
  at = data.index(b"strf") + 8 + 4
  data[at : at + 8] = struct.pack("<ii", 2**30, 2**30)
  path.write_bytes(data)
  path.with_name("whole.avi").unlink()


def _missing(path, movies):
  pass


BROKEN_VIDEOS = [
  (_text, "cannot be read as a video"),
  (_empty, "is empty"),
  (_noise, "cannot be read as a video|has no video stream|no frames"),
  (_header_only, "cannot be read as a video|has no video stream|no frames"),
  (_index_lost, "cannot be read as a video"),
  (_audio, "has no video stream"),
  (_one_frame, "is too short"),
  (_still, "is too short|ends before"),
  (_dangling, "does not exist"),
  (_folder, "is a folder"),
  (_pipe, "is not a regular file"),
  (_subtitles, "has no video stream|cannot be read"),
  (_play_list, "cannot be read as a video|has no video stream"),
  (_concat, "cannot be read as a video|has no video stream"),
  (_huge, "too large|cannot be read as a video"),
  (_missing, "does not exist"),
]


def _read_pair(path):
  with video.VideoFile(path) as file:
    return file.pair(file.latest_start_s(0.15), 0.15)


@pytest.mark.parametrize("spoil, sentence", BROKEN_VIDEOS)
def test_a_broken_video_is_met_with_a_sentence_that_names_it(tmp_path, movies, spoil, sentence):
  path = tmp_path / "x.mp4"
  spoil(path, movies)
  with pytest.raises(InputError, match=rf"x\.mp4.*({sentence})") as error:
    _read_pair(path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil, sentence", BROKEN_VIDEOS)
def test_a_source_replaces_a_broken_video_and_counts_it(tmp_path, movies, spoil, sentence):
  spoil(tmp_path / "x.mp4", movies)
  movies.write_video(tmp_path / "whole.mkv", 12)
  (tmp_path / "list.txt").write_text("x.mp4\nwhole.mkv\n")
  source = sources.VideoSource(
    tmp_path / "list.txt", gap_ms=150.0, image_hw=(16, 16), seed=0, crop="random", flip=True
  )
  broken, whole = source.example(0, 0), source.example(0, 1)
  assert (int(broken["skipped"]), int(whole["skipped"])) == (1, 0)
  assert broken["frames"].shape == (2, 16, 16, 3)


def test_each_broken_file_is_named_in_the_log_once(tmp_path, movies, caplog):
  movies.write_video(tmp_path / "whole.mkv", 12)
  for i in range(2):
    (tmp_path / f"broken{i}.mp4").write_text("no")
  source = sources.VideoSource(
    tmp_path, gap_ms=150.0, image_hw=(16, 16), seed=0, crop="centre", flip=False
  )
  for position in range(12):
    source.example(position, position % 3)
  logged = [line for line in caplog.messages if line.startswith("passed over: ")]
  assert sorted(line.split(tmp_path.name + "/")[1][:7] for line in logged) == ["broken0", "broken1"]


@pytest.mark.parametrize("url", ["http://a.b/c.mp4", "rtsp://cam/1", "https://a.b/watch?v=1"])
def test_an_address_is_refused_with_advice(url):
  with pytest.raises(InputError, match="is a URL; download it first"):
    video.probe(url)


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264")])
@pytest.mark.parametrize("kind", ["cut off", "garbage"])
def test_a_stream_with_damage_inside_ends_with_what_came_before(
  tmp_path, movies, caplog, name, codec, kind
):
  options = {"movflags": "faststart"} if name == "a.mp4" else {}
  path = movies.write_video(tmp_path / name, 30, codec=codec, options=options, keyframes=3)
  data = bytearray(path.read_bytes())
  middle = len(data) * 7 // 10
  if kind == "cut off":
    del data[middle:]
  else:
    data[middle : middle + len(data) // 8] = np.random.default_rng(0).bytes(len(data) // 8)
  path.write_bytes(data)
  seen = []
  try:
    for frame in video.iter_frames(path):
      seen.append(frame)
    told = " ".join(record.getMessage() for record in caplog.records)
  except InputError as error:
    told = str(error)
  assert 0 < len(seen) <= 30
  if len(seen) < 30:
    assert name in told


def test_a_folder_that_cannot_be_listed_is_named_and_left_out(
  tmp_path, movies, monkeypatch, caplog
):
  movies.write_video(tmp_path / "a.mp4", 6)
  (tmp_path / "locked").mkdir()
  scandir = os.scandir

  def refuse(path):  # the tests may run as a user whom no permission stops
    if str(path).endswith("locked"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  assert [os.path.basename(path) for path in listing.list_videos(tmp_path)] == ["a.mp4"]
  assert "locked cannot be listed" in caplog.text


def test_links_that_lead_in_circles_are_walked_once(tmp_path, movies):
  (tmp_path / "deep").mkdir()
  movies.write_video(tmp_path / "deep/a.mp4", 6)
  (tmp_path / "deep/back").symlink_to(tmp_path)
  assert len(listing.list_videos(tmp_path)) == 1


def test_folders_and_lists_without_videos_say_so(tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "other").mkdir()
  (tmp_path / "other/notes.md").write_text("hello")
  (tmp_path / "blank.txt").write_text("\n# nothing\n")
  (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
  for path, sentence in [
    ("empty", "holds no video files"),
    ("other", "holds no video files"),
    ("blank.txt", "names no files"),
    ("binary.txt", "cannot be read as text"),
    ("gone.txt", "does not exist"),
    ("gone", "does not exist"),
  ]:
    with pytest.raises(InputError, match=sentence):
      listing.list_videos(tmp_path / path)
  with pytest.raises(InputError, match="holds no image files"):
    listing.list_frame_folders(tmp_path / "empty")
  with pytest.raises(InputError, match="does not exist"):
    listing.list_photos(tmp_path / "gone")


def test_a_list_that_names_missing_files_is_read_as_far_as_it_goes(tmp_path, movies):
  movies.write_video(tmp_path / "ok.mp4", 12)
  (tmp_path / "list.txt").write_text("gone.mp4\n\n# a note\nok.mp4\nhttp://a.b/c.mp4\n")
  source = sources.VideoSource(
    tmp_path / "list.txt", gap_ms=100.0, image_hw=(8, 8), seed=0, crop="centre", flip=False
  )
  assert source.items == 3
  assert {int(source.example(0, item)["skipped"]) > 0 for item in (0, 2)} == {True}


def _frame_source(path, gap=1):
  return sources.FrameFolderSource(
    path, gap=gap, image_hw=(16, 16), seed=0, crop="centre", flip=False
  )


def test_frames_are_paired_in_natural_order(tmp_path, movies):
  movies.write_frames(tmp_path / "clip", 12)  # 0.png ... 11.png: text order is wrong
  source = _frame_source(tmp_path, gap=2)
  for position in range(20):
    frames = source.example(position, 0)["frames"]
    assert movies.number_of(frames[1]) - movies.number_of(frames[0]) == 2


def test_broken_frame_folders_are_replaced(tmp_path, movies):
  movies.write_frames(tmp_path / "a_short", 1)
  movies.write_frames(tmp_path / "b_sizes", 2)
  Image.fromarray(movies.picture(1, (40, 40))).save(tmp_path / "b_sizes/1.png")
  movies.write_frames(tmp_path / "c_damaged", 2)
  whole = (tmp_path / "c_damaged/1.png").read_bytes()
  (tmp_path / "c_damaged/1.png").write_bytes(whole[: len(whole) // 2])
  movies.write_frames(tmp_path / "d_fine", 2)
  source = _frame_source(tmp_path)
  assert source.items == 4
  for item, sentence in [(0, "too short"), (1, "need one size"), (2, "cannot be read as an image")]:
    with pytest.raises(InputError, match=sentence):
      source.read(item, np.random.default_rng(0))
    assert int(source.example(0, item)["skipped"]) >= 1
  assert int(source.example(0, 3)["skipped"]) == 0


def test_broken_images_are_met_with_a_sentence(tmp_path):
  (tmp_path / "text.png").write_text("no image")
  (tmp_path / "empty.jpg").touch()
  (tmp_path / "folder.png").mkdir()
  for name in ("text.png", "empty.jpg", "folder.png", "gone.png"):
    with pytest.raises(InputError, match=name):
      images.read_image(tmp_path / name)


def _clip(folder, movies, **arrays):
  folder.mkdir()
  movies.write_frames(folder / "video", 3)
  fields = dict(
    points_xy=np.zeros((2, 3, 2), np.float32), occluded=np.zeros((2, 3), bool), hw=[48, 64]
  )
  fields.update(arrays)
  np.savez(folder / "points.npz", **{k: v for k, v in fields.items() if v is not None})
  return folder


class _Trap:
  """Unpickling this would leave a file behind."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_points_are_never_unpickled(tmp_path, movies):
  trap = np.array([_Trap(tmp_path / "sprung")], dtype=object)
  folder = _clip(tmp_path / "a", movies, points_xy=trap)
  with pytest.raises(InputError, match="points.npz cannot be read"):
    tapvid.read_clip(folder)
  (folder / "points.npz").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
  with pytest.raises(InputError, match="points.npz cannot be read"):
    tapvid.read_clip(folder)
  assert not (tmp_path / "sprung").exists()


WRONG_POINTS = [
  (dict(occluded=None), "lacks an array"),
  (dict(points_xy=np.zeros((2, 3, 3), np.float32)), r"it holds points_xy float32 \[2, 3, 3\]"),
  (dict(occluded=np.zeros((2, 4), bool)), r"occluded bool \[2, 4\]"),
  (dict(occluded=np.zeros((2, 3))), r"occluded float64 \[2, 3\]"),
  (dict(points_xy=np.full((2, 3, 2), np.nan, np.float32)), "without a finite place"),
  (dict(hw=[10, 10]), "is about 3 frames of 10x10, the folder holds 3 of 64x48"),
  (
    dict(points_xy=np.zeros((2, 5, 2), np.float32), occluded=np.zeros((2, 5), bool)),
    "is about 5 frames",
  ),
]


@pytest.mark.parametrize("arrays, sentence", WRONG_POINTS)
def test_points_that_do_not_fit_are_refused(tmp_path, movies, arrays, sentence):
  with pytest.raises(InputError, match=sentence):
    tapvid.read_clip(_clip(tmp_path / "a", movies, **arrays))


def test_damaged_points_are_refused(tmp_path, movies):
  folder = _clip(tmp_path / "a", movies)
  path = folder / "points.npz"
  whole = path.read_bytes()
  claims = struct.pack("<H", 118) + (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 2), }".ljust(117) + b"\n"
  )
  with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
    for name in ("points_xy", "occluded", "hw"):
      archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + claims + bytes(64))
  spoilt = [whole[: len(whole) // 2], b"", b"PK\x03\x04", (tmp_path / "huge.npz").read_bytes()]
  for data in spoilt:
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"points\.npz cannot be read"):
      tapvid.read_clip(folder)
  with pytest.raises(InputError, match="holds no clips"):
    tapvid.list_clips(tmp_path / "nowhere")


def _flo(magic=202021.25, width=3, height=2, floats=12):
  return struct.pack("<fii", magic, width, height) + bytes(4 * floats)


BROKEN_FLOWS = [
  (b"", "too short to be a .flo file"),
  (b"PIEH", "too short"),
  (_flo(magic=1.0), "is not a .flo file"),
  (_flo(floats=11), "a flow of 3x2 takes 60"),
  (_flo(floats=13), "a flow of 3x2 takes 60"),
  (_flo(width=2**30, height=2**30), "which is not possible"),
  (_flo(width=10_000, height=10_000), "a flow of 10000x10000 takes"),
  (_flo(width=-3, height=-2), "which is not possible"),
  (_flo(width=0), "which is not possible"),
]


@pytest.mark.parametrize("data, sentence", BROKEN_FLOWS)
def test_broken_flow_files_are_refused(tmp_path, data, sentence):
  (tmp_path / "x.flo").write_bytes(data)
  with pytest.raises(InputError, match=rf"x\.flo.*{sentence}"):
    flowfiles.read_flo(tmp_path / "x.flo")


def test_broken_kitti_files_are_refused(tmp_path):
  with pytest.raises(InputError, match="does not exist"):
    flowfiles.read_kitti(tmp_path / "gone.png")
  path = tmp_path / "x.png"
  Image.new("RGB", (4, 4)).save(path)
  with pytest.raises(InputError, match="is not 16-bit RGB"):
    flowfiles.read_kitti(path)
  rng = np.random.default_rng(0)
  flowfiles.write_kitti(path, rng.normal(size=(30, 40, 2)))
  whole = path.read_bytes()
  for data in (b"", b"text", whole[: len(whole) // 3]):
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.png"):
      flowfiles.read_kitti(path)


def test_flow_pairs_without_their_frames_are_named(tmp_path):
  with pytest.raises(InputError, match="holds no .flo files"):
    list(flowfiles.iter_flow_pairs(tmp_path))
  flowfiles.write_flo(tmp_path / "flow10.flo", np.zeros((4, 6, 2)))
  with pytest.raises(InputError, match=r"there is no image frame10\.\* beside it"):
    list(flowfiles.iter_flow_pairs(tmp_path))
  Image.new("RGB", (6, 4)).save(tmp_path / "frame10.png")
  Image.new("RGB", (6, 5)).save(tmp_path / "frame11.png")
  with pytest.raises(InputError, match="differ in size"):
    list(flowfiles.iter_flow_pairs(tmp_path))
