"""Reading videos: times, seeks, orientation, formats."""

from __future__ import annotations

import io
import os
import tracemalloc
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from cwm_jax.data import orientation, sources, video
from cwm_jax.types import InputError

CONTAINERS = [
  ("a.mp4", "libx264"),
  ("a.mkv", "libx264"),
  ("a.avi", "mpeg4"),
  ("a.webm", "libvpx"),
  ("a.gif", "gif"),
]


@pytest.mark.parametrize("name, codec", CONTAINERS)
def test_every_container_gives_all_frames_and_any_pair(tmp_path, movies, name, codec):
  path = movies.write_video(tmp_path / name, 30, codec=codec, rate=25)
  info = video.probe(path)
  assert (info.width, info.height) == (64, 48)
  assert info.duration_s == pytest.approx(1.2, abs=0.05)
  numbers = [movies.number_of(frame) for frame in video.iter_frames(path)]
  assert numbers == list(range(30))
  for first in (0, 7, 13, 26):
    pair = video.read_pair(path, first / 25 + 0.01, 0.12)
    assert [movies.number_of(frame) for frame in pair.frames] == [first, first + 3]
    assert pair.times_s[1] - pair.times_s[0] == pytest.approx(0.12, abs=1e-3)


@pytest.mark.parametrize("name", ["a.h264", "a.ts", "a.flv", "a.y4m"])
def test_formats_that_claim_little_are_measured(tmp_path, movies, name):
  codec = "wrapped_avframe" if name == "a.y4m" else "libx264"
  path = movies.write_video(tmp_path / name, 30, codec=codec, rate=25)
  with video.VideoFile(path) as file:
    assert file.duration_s() == pytest.approx(1.2, abs=0.13)
    assert file.duration_s() == file.duration_s() == file.info().duration_s
    pair = file.pair(0.41, 0.12)
    assert [movies.number_of(frame) for frame in pair.frames] == [10, 13]


def test_a_pair_goes_by_time_under_a_variable_frame_rate(tmp_path, movies):
  times = [0, 10, 20, 100, 200, 210, 220, 230, 400, 600, 1000, 1010, 1400]
  for name in ("a.mkv", "a.mp4"):
    path = movies.write_video(tmp_path / name, len(times), times_ms=times, keyframes=4)
    with video.VideoFile(path) as file:
      for start, gap in [(0, 100), (100, 100), (205, 200), (230, 170), (999, 400), (15, 600)]:
        shown = max(i for i, t in enumerate(times) if t <= start)
        later = range(shown + 1, len(times))
        nearest = min(later, key=lambda i: abs(times[i] - times[shown] - gap))
        pair = file.pair(start / 1000, gap / 1000)
        assert [movies.number_of(frame) for frame in pair.frames] == [shown, nearest], (name, start)
        assert pair.times_s == pytest.approx((times[shown] / 1000, times[nearest] / 1000))


def test_frames_further_apart_than_the_gap_still_make_a_pair(tmp_path, movies):
  path = movies.write_video(tmp_path / "slow.mp4", 5, rate=2)
  pair = video.read_pair(path, 0.6, 0.15)
  assert [movies.number_of(frame) for frame in pair.frames] == [1, 2]


def test_a_frame_is_on_display_until_the_next_one(tmp_path, movies):
  path = movies.write_video(tmp_path / "a.mkv", 4, times_ms=[0, 500, 510, 900])
  for time_s, number in [(0.0, 0), (0.499, 0), (0.5, 1), (0.7, 2), (0.9, 3)]:
    assert movies.number_of(video.read_frame(path, time_s)) == number


def test_streaming_starts_and_stops_where_it_is_told(tmp_path, movies):
  path = movies.write_video(tmp_path / "a.mp4", 30, rate=30)
  frames = video.iter_frames(path, start_s=0.5, stop_s=0.7)
  assert [movies.number_of(frame) for frame in frames] == [15, 16, 17, 18, 19, 20]


@pytest.mark.parametrize("start_of_second", [0, -30])
def test_times_of_streams_that_were_joined_go_on_and_no_frame_is_left_out(
  tmp_path, movies, start_of_second
):
  times_ms = [100_000 + 40 * i for i in range(6)]
  later_ms = [time + 1000 * start_of_second for time in times_ms]
  parts = [
    movies.write_video(tmp_path / f"{i}.ts", 6, rate=25, times_ms=times)
    for i, times in enumerate((times_ms, later_ms))
  ]
  path = tmp_path / "joined.ts"
  path.write_bytes(b"".join(part.read_bytes() for part in parts))
  with video.VideoFile(path) as file:
    found = list(file.timed())
  assert [movies.number_of(frame) for _, frame in found] == [*range(6), *range(6)]
  np.testing.assert_allclose([time_s for time_s, _ in found], np.arange(12) / 25, atol=1e-3)


@pytest.mark.parametrize("times", [[0, 1, 1, 2, 3, 4], [0, 2, 1, 2, 3, 4]])
def test_a_time_told_twice_or_out_of_order_moves_no_later_frame(
  monkeypatch, movies, tmp_path, times
):
  path = movies.write_video(tmp_path / "a.mp4", 6, rate=25)
  displayed_at = video.VideoFile._displayed_at

  def told(self, start_s):
    first, later = displayed_at(self, start_s)
    frames = [frame for _, frame in (first, *later)]
    pairs = [(t / 25, frame) for t, frame in zip(times, frames)]
    return pairs[0], iter(pairs[1:])

  monkeypatch.setattr(video.VideoFile, "_displayed_at", told)
  with video.VideoFile(path) as file:
    found = [time_s for time_s, _ in file.timed()]
  assert np.all(np.diff(found) > 0)
  np.testing.assert_allclose(found[-2:], [3 / 25, 4 / 25], atol=1e-6)


# Turned by this much, the red corner (top left as stored) is here.
CORNERS = [
  (None, False, (0, 0)),
  (90, False, (-1, 0)),
  (180, False, (-1, -1)),
  (-90, False, (0, -1)),
  (90, True, (-1, -1)),
]


@pytest.mark.parametrize("rotation, mirrored, corner", CORNERS)
def test_frames_are_turned_as_the_file_says(tmp_path, movies, rotation, mirrored, corner):
  path = movies.write_video(tmp_path / "a.mp4", 6, rotation=rotation, mirrored=mirrored)
  upright = (64, 48) if rotation in (90, -90) else (48, 64)
  info = video.probe(path)
  assert (info.height, info.width) == upright
  pair = video.read_pair(path, 0.0, 0.1)
  assert pair.frames.shape == (2, *upright, 3)
  for frame in (pair.frames[0], next(video.iter_frames(path))):
    red = frame[corner].astype(int)
    assert red[0] > 180 and red[1] < 80
    opposite = frame[tuple(-1 - c for c in corner)].astype(int)
    assert np.ptp(opposite) < 20


def _cameras_clip(path, movies, orientation):
  """Motion JPEG as cameras write it: each frame with EXIF, which may say how it is to be turned."""
  exif = Image.Exif()
  exif[0x010F] = "a maker"
  if orientation is not None:
    exif[0x0112] = orientation
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mjpeg", rate=10)
    stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
    for i in range(6):
      jpeg = io.BytesIO()
      Image.fromarray(movies.picture(i)).save(jpeg, "JPEG", exif=exif, quality=95)
      packet = av.Packet(jpeg.getvalue())
      packet.stream, packet.is_keyframe = stream, True
      packet.pts, packet.dts, packet.time_base = i, i, Fraction(1, 10)
      container.mux(packet)
  return path


@pytest.mark.parametrize("name", ["a.avi", "a.mov", "a.mkv"])
@pytest.mark.parametrize(
  "exif_orientation, corner", [(None, (0, 0)), (6, (0, -1)), (3, (-1, -1)), (8, (-1, 0))]
)
def test_frames_with_exif_are_read_and_turned_as_it_says(
  tmp_path, movies, name, exif_orientation, corner
):
  path = _cameras_clip(tmp_path / name, movies, exif_orientation)
  upright = (64, 48) if exif_orientation in (6, 8) else (48, 64)
  info = video.probe(path)
  assert (info.height, info.width) == upright
  frames = list(video.iter_frames(path))
  assert [movies.number_of(frame) for frame in frames] == list(range(6))
  red = frames[0][corner].astype(int)
  assert red[0] > 180 and red[1] < 80
  cropped = dict(image_hw=(16, 16), seed=0, crop="centre", flip=False)
  example = sources.VideoSource(path, gap_ms=200, **cropped).example(0, 0)
  assert example["skipped"] == 0
  first, second = (movies.number_of(frame) for frame in example["frames"])
  assert second - first == 2


def test_a_display_matrix_moves_every_pixel_where_it_says():
  image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
  one = 2**16
  for linear in np.ndindex(2, 2, 2):  # the eight ways to lay down a rectangle
    swap, *signs = linear
    x, y = ((one, -one)[s] for s in signs)
    a, b, c, d = (0, y, x, 0) if swap else (x, 0, 0, y)
    turned = orientation.turn_upright(image, np.array([a, b, 0, c, d, 0, 0, 0, 2**30], np.int32))
    height, width = turned.shape[:2]
    for row, column in np.ndindex(2, 3):
      # Where the pixel's centre goes, from the rectangle's middle.
      px, py = column + 0.5 - 1.5, row + 0.5 - 1.0
      to_x, to_y = (a * px + c * py) / one, (b * px + d * py) / one
      to = int(to_y + height / 2 - 0.5), int(to_x + width / 2 - 0.5)
      assert np.array_equal(turned[to], image[row, column])


def test_names_of_any_bytes_can_be_read_and_printed(tmp_path, movies):
  plain = movies.write_video(tmp_path / "a.mp4", 6)
  odd = os.path.join(tmp_path, os.fsdecode("видео 😀 %d".encode() + b"\xff.mp4"))
  os.rename(plain, odd)
  assert video.probe(odd).width == 64
  open(odd, "wb").close()
  with pytest.raises(InputError) as error:
    video.probe(odd)
  assert "\\udcff.mp4 is empty" in str(error.value)
  str(error.value).encode()  # would raise if it held what cannot be printed


def test_a_video_too_short_for_the_gap_says_so(tmp_path, movies):
  path = movies.write_video(tmp_path / "a.mp4", 4, rate=10)
  with video.VideoFile(path) as file:
    assert file.latest_start_s(0.3) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(InputError, match=r"a\.mp4 is too short: it lasts 0.4 s"):
      file.latest_start_s(0.5)
    with pytest.raises(InputError, match="ends before 0.500 s"):
      file.pair(0.0, 0.5)
    with pytest.raises(InputError, match="ends at 0.300 s"):
      file.frame_at(2.0)


def test_streaming_holds_a_few_frames_however_long_the_video(tmp_path, movies):
  path = movies.write_video(tmp_path / "a.mp4", 30, size_hw=(240, 320))
  tracemalloc.start()
  count = sum(1 for _ in video.iter_frames(path))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert count == 30
  assert peak < 5 * 240 * 320 * 3


def _times_and_pictures(path):
  """Decodes a whole clip plainly: times in seconds, and a checksum of each picture."""
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    stamp = "dts" if container.format.name == "avi" else "pts"
    ticks, pictures = [], []
    for frame in container.decode(stream):
      known = getattr(frame, stamp)
      ticks.append(ticks[-1] + 1 if known is None else known)  # AVI's last frames have none
      pictures.append(zlib.crc32(frame.to_ndarray(format="rgb24").tobytes()))
    times = [float((t - (stream.start_time or 0)) * stream.time_base) for t in ticks]
  assert times == sorted(times)
  return np.array(times), pictures


def test_every_real_clip_gives_the_right_pair_from_anywhere(cwm_data):
  clips = sorted((cwm_data / "clips").iterdir())
  assert len(clips) == 20
  for path in clips:
    info = video.probe(path)
    small = info.width <= 500  # decoding the large ones whole takes long
    times, pictures = _times_and_pictures(path) if small else (None, None)
    with video.VideoFile(path) as file:
      latest = file.latest_start_s(0.15)
      for share in np.linspace(0, 1, 9 if small else 2):
        pair = file.pair(share * latest, 0.15)
        assert pair.frames.shape == (2, info.height, info.width, 3)
        if not small:
          continue
        first = max(0, np.searchsorted(times, share * latest + 1e-5, side="right") - 1)
        gaps = np.abs(times[first + 1 :] - times[first] - 0.15)
        second = first + 1 + int(np.flatnonzero(gaps <= gaps.min() + 1e-5)[0])
        assert pair.times_s == pytest.approx((times[first], times[second]), abs=1e-6), path
        for frame, expected in zip(pair.frames, (first, second)):
          assert zlib.crc32(frame.tobytes()) == pictures[expected], path
