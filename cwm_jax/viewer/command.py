"""`cwm-jax view`: reads the clip, starts the server, says where the page is."""

from __future__ import annotations

import threading

from cwm_jax import commands, inputs
from cwm_jax.types import InputError
from cwm_jax.viewer import footage
from cwm_jax.viewer.answers import Answers
from cwm_jax.viewer.server import Server

_PORT = 8765


def run(
  *,
  video: str | None,
  start: int,
  frames: int,
  port: int | None,
  browser: bool,
  reading: inputs.Reading,
) -> None:
  """Serves the viewer until it is interrupted.

  Args:
    video: file or folder of frames; None renders the demo's clip, whose truth is known.
    start, frames: the part of the video to show, in frames.
    port: None takes 8765, or any that is free where that is taken.
    browser: open the page in this machine's browser.
    reading: weights, masks and read-out.

  Raises:
    InputError: anything given that cannot be used.
  """
  tracker = commands.load_tracker(reading)
  clip = footage.rendered() if video is None else footage.read(video, start=start, count=frames)
  answers = Answers(clip, tracker)
  server = make_server(answers, port)
  h, w = clip.size_hw
  print(f"{clip.name}: {len(clip.frames)} frames of {w} x {h}, from frame {clip.first} on")
  print(f"\n  {server.address}\n")
  print(
    "Open this address in a browser on this machine; Ctrl-C ends. From another machine, first\n"
    f"ssh -L {server.server_port}:127.0.0.1:{server.server_port} THIS_MACHINE",
    flush=True,
  )
  threading.Thread(target=answers.warm_up, daemon=True).start()
  if browser:
    import webbrowser

    webbrowser.open(server.address)
  with server:
    server.serve_forever()


def make_server(answers: Answers, port: int | None) -> Server:
  """A server on a port, or where none is named on 8765 or any that is free.

  Raises:
    InputError: the port that is named cannot be had.
  """
  try:
    return Server(answers, _PORT if port is None else port)
  except OSError as error:
    if port is None:
      return Server(answers, 0)
    raise InputError(f"port {port} cannot be had ({error.strerror}); name another") from None
