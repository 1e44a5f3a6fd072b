"""What the viewer keeps of a clip, where it listens, how it is started and ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from cwm_jax import inputs
from cwm_jax.types import InputError
from cwm_jax.viewer import command, footage
from cwm_jax.viewer.answers import Answers


@pytest.mark.parametrize(
  "size_hw, count",
  [((240, 320), 100), ((2160, 3840), 240), ((3840, 2160), 240), ((40, 30), 10), ((20, 9000), 5)],
)
def test_frames_are_kept_within_a_bounded_size_and_memory(size_hw, count):
  h, w = footage.kept_size(size_hw, count)
  assert max(h, w) <= 960 and h * w * 3 * count <= 2**28
  assert h <= size_hw[0] and w <= size_hw[1]
  if max(size_hw) <= 320:
    assert (h, w) == size_hw


def test_a_part_of_a_clip_is_read(clip_path):
  part = footage.read(str(clip_path), start=2, count=3)
  whole = footage.read(str(clip_path), start=0, count=240)
  assert part.first == 2 and whole.frames.shape == (6, 40, 56, 3)
  np.testing.assert_array_equal(part.frames, whole.frames[2:5])


def test_frames_are_made_smaller_for_those_that_there_are_and_not_for_those_asked_for(
  clip_path, monkeypatch
):
  monkeypatch.setattr(footage, "_BYTES", 6 * 40 * 56 * 3)  # for all six at their own size
  part = footage.read(str(clip_path), start=0, count=10_000)
  assert part.frames.shape == (6, 40, 56, 3)
  # A file that holds more than it claims takes no more memory for that.
  clip = inputs.open_clip(str(clip_path))
  monkeypatch.setattr(inputs, "open_clip", lambda path: clip._replace(length=2))
  monkeypatch.setattr(footage, "_BYTES", 2 * 40 * 56 * 3)
  part = footage.read(str(clip_path), start=0, count=10_000)
  assert len(part.frames) == 6 and part.frames.nbytes <= footage._BYTES
  assert part.frames.shape[1:] == (*footage.kept_size((40, 56), 8), 3)


@pytest.mark.parametrize("start, told", [(5, "has 1 frames from frame 5"), (50, "has 0 frames")])
def test_too_short_a_part_is_one_sentence(clip_path, start, told):
  with pytest.raises(InputError, match=told):
    footage.read(str(clip_path), start=start, count=240)


def test_points_go_to_the_kept_frames_and_back():
  clip = footage.Footage("", np.zeros((2, 24, 32, 3), np.uint8), (48, 64), 0, 5.0, None)
  np.testing.assert_array_equal(clip.to_frames(np.array([20.0, 10.0])), [10, 5])
  np.testing.assert_array_equal(clip.to_clip(np.array([10.0, 5.0])), [20, 10])


def test_a_port_that_is_taken_is_one_sentence_and_without_one_another_is_found(clip_path):
  answers = Answers(footage.read(str(clip_path), start=0, count=2), None)
  with socket.socket() as other:
    other.bind(("127.0.0.1", 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(InputError, match=f"port {port} cannot be had"):
      command.make_server(answers, port)
  servers = [command.make_server(answers, None) for _ in range(2)]
  assert servers[0].server_port != servers[1].server_port
  for server in servers:
    server.server_close()


def test_the_command_says_where_the_page_is_and_ctrl_c_ends_it(clip_path, weights_path):
  process = subprocess.Popen(
    [sys.executable, "-m", "cwm_jax.cli", "view", clip_path, "--weights", weights_path],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  try:
    lines = iter(process.stdout.readline, "")
    assert "clip.mp4: 6 frames of 56 x 40" in next(lines)
    address = next(line.strip() for line in lines if "token=" in line)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{20,}", address)
    page = urllib.request.urlopen(address, timeout=60).read()
    assert b"<title>cwm-jax view</title>" in page
  finally:
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
  assert process.returncode == 130 and "Traceback" not in stderr
