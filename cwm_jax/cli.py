"""`cwm-jax`, the people's entry: track a video, read flow, look into weights, see the demo.

Exit codes: 0 done, 2 something given cannot be used (one sentence says what), 130 interrupted.
Everything heavy is imported inside the command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

from cwm_jax.types import InputError

_EXAMPLES = """examples:
  cwm-jax demo                                 track a rendered clip with known truth
  cwm-jax demo clip.mp4 --out pictures         the same on your own file
  cwm-jax track clip.mp4 --grid 8              64 points of the first frame
  cwm-jax track frames/ --points points.csv    your own points; header t,y,x
  cwm-jax flow a.png b.png --stride 4          dense flow: .flo and a picture
  cwm-jax view clip.mp4                        click a point, see how the answer comes about
  cwm-jax info                                 what the shipped weights are
  cwm-jax convert WORKDIR model.safetensors    a training run's weights as one file
  cwm-jax convert opt-cwm-512 o.safetensors    a public release, fetched and converted

Coordinates are pixels of the frames as given; the image's corner is (0, 0), the centre of its first
pixel (0.5, 0.5). `cwm-jax COMMAND --help` tells what a command writes."""

_CLIP = "video file or folder of frames"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line and returns its exit code.

  Args:
    argv: arguments without the program's name; None takes the process's own.
  """
  if argv is None:
    _leave_at_ctrl_c()
  try:
    options = vars(_parser().parse_args(argv))
    module, _, function = options.pop("run").partition(":")
    if "readout" in options:
      from cwm_jax.inputs import Reading

      options["reading"] = Reading(**{name: options.pop(name) for name in Reading._fields})
    getattr(importlib.import_module(module), function)(**options)
    return 0
  except InputError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:
    # Whoever read our output has left. Python would complain when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except OSError as error:
    print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    return 2


def _leave_at_ctrl_c() -> None:
  """Makes Ctrl-C end the process at once with exit code 130.

  Python would raise KeyboardInterrupt, which waits for a long computation on the device to end and
  is lost where it strikes a garbage-collection callback. A thread that the signal itself wakes does
  neither.
  """
  woken, wake = os.pipe()
  os.set_blocking(wake, False)
  signal.set_wakeup_fd(wake)
  signal.signal(signal.SIGINT, lambda *_: None)

  def leave():
    while signal.SIGINT not in os.read(woken, 1):
      pass
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(130)

  threading.Thread(target=leave, daemon=True).start()


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="cwm-jax",
    description="Motion read out of a world model: no flow head, no motion labels.",
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

  demo = _command(
    commands,
    "demo",
    "track 16 points and draw what was seen",
    "Tracks 16 points through a rendered clip whose truth is known, or through VIDEO, and writes "
    "overlay.mp4, flow.png, heatmaps.png, explanation.png and tracks.npz.",
  )
  demo.add_argument("video", nargs="?", metavar="VIDEO", help=_CLIP)
  _add_reading(demo)
  _add_out(demo, "demo")
  demo.set_defaults(run="cwm_jax.demo:run")

  track = _command(
    commands,
    "track",
    "follow points through a video",
    "Follows points from their query frame to the end. Writes tracks.npz (tracks_xy [N, T, 2], "
    "occluded [N, T], confidence [N, T], queries_tyx [N, 3], size_hw [2]) and overlay.mp4.",
  )
  track.add_argument("video", metavar="VIDEO", help=_CLIP)
  points = track.add_mutually_exclusive_group()
  points.add_argument(
    "--grid", type=_positive, default=8, metavar="N", help="N x N points of frame 0 (default: 8)"
  )
  points.add_argument("--points", metavar="FILE", help="CSV with the header t,y,x")
  track.add_argument("--no-overlay", dest="overlay", action="store_false", help="write no video")
  _add_reading(track)
  _add_out(track, "tracks")
  track.set_defaults(run="cwm_jax.commands:track")

  flow = _command(
    commands,
    "flow",
    "where the points of image A are in image B",
    "Without --points: dense flow, as flow.flo (read out every --stride pixels, interpolated "
    "between) and flow.png. With --points: points.npz (from_xy, to_xy [N, 2], occluded, "
    "confidence [N], size_hw) and points.png.",
  )
  flow.add_argument("first", metavar="A", help="image file")
  flow.add_argument("second", metavar="B", help="image file of the same size")
  where = flow.add_mutually_exclusive_group()
  where.add_argument(
    "--stride", type=_positive, default=8, metavar="N", help="pixels between read-outs (default: 8)"
  )
  where.add_argument("--points", metavar="FILE", help="CSV with the header y,x or t,y,x (t is 0)")
  _add_reading(flow)
  _add_out(flow, "flow")
  flow.set_defaults(run="cwm_jax.commands:flow")

  view = _command(
    commands,
    "view",
    "click a point and see how its track comes about",
    "Serves one page on this machine (127.0.0.1 only): scrub, click a point, and see the mark, the "
    "predictions with and without it, each mask's response, their mean, and the track. Without "
    "VIDEO it shows a rendered clip whose truth is known. Nothing leaves the machine.",
  )
  view.add_argument("video", nargs="?", metavar="VIDEO", help=_CLIP)
  view.add_argument(
    "--start", type=_count, default=0, metavar="T", help="first frame to show (default: 0)"
  )
  view.add_argument(
    "--frames", type=_positive, default=240, metavar="N", help="frames to show (default: 240)"
  )
  view.add_argument(
    "--port", type=_port, metavar="N", help="default: 8765, or any free one where that is taken"
  )
  view.add_argument(
    "--browser", action="store_true", help="open the page in this machine's browser"
  )
  _add_reading(view)
  view.set_defaults(run="cwm_jax.viewer.command:run")

  info = _command(
    commands, "info", "what a weights file holds", "Prints config, scores, names and shapes."
  )
  info.add_argument(
    "weights",
    nargs="?",
    metavar="WEIGHTS",
    help=".safetensors file or name of a release (default: the shipped one)",
  )
  _add_json(info)
  info.set_defaults(run="cwm_jax.commands:info")

  convert = _command(
    commands,
    "convert",
    "weights from one form into another",
    "IN is a training run's folder (its newest checkpoint is taken, the running average of the "
    "parameters where one is kept), a released checkpoint (.pt, .pth, .safetensors), or a name of "
    "a release: then OUT is a weights file of this project (of a joint training, the mark it "
    "learned). Or IN is such a weights file: then OUT "
    "has the release's names and layouts. Every key of either side is accounted for; where that "
    "fails, both lists are printed.",
  )
  convert.add_argument("source", metavar="IN", help="folder, checkpoint, weights file or name")
  convert.add_argument("out", metavar="OUT", help=".safetensors file to write")
  convert.add_argument(
    "--dtype", choices=("float32", "bfloat16"), default="float32", help="how numbers are stored"
  )
  convert.add_argument(
    "--over",
    metavar="FILE",
    help="joint-training checkpoint whose flow predictor is laid over IN, as the release does",
  )
  convert.add_argument(
    "--keep-base", action="store_true", help="of --over, or a named release: take the mark only"
  )
  convert.add_argument(
    "--like", metavar="NAME", help="the release that IN is, where its shapes leave that open"
  )
  convert.add_argument(
    "--heads", type=_two_counts, metavar="E,D", help="attention heads of encoder and decoder"
  )
  _add_json(convert)
  convert.set_defaults(run="cwm_jax.conversion:run")
  return parser


def _command(commands, name: str, summary: str, description: str) -> argparse.ArgumentParser:
  return commands.add_parser(name, help=summary, description=description)


def _add_reading(parser: argparse.ArgumentParser) -> None:
  """Adds the options of every command that reads motion."""
  parser.add_argument(
    "--weights",
    metavar="FILE",
    help="weights file, or a release's name such as opt-cwm-512 (default: the one that is shipped)",
  )
  parser.add_argument(
    "--masks",
    type=_positive,
    default=10,
    metavar="N",
    help="masks averaged; more is slower and better (default: 10)",
  )
  parser.add_argument(
    "--readout",
    choices=("argmax", "soft", "window"),
    default="window",
    help="how the response is read; window goes below a pixel (default: window)",
  )
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the masks (default: 0)")


def _add_out(parser: argparse.ArgumentParser, out: str) -> None:
  parser.add_argument(
    "--out", default=out, metavar="DIR", help=f"folder for what is written (default: {out})"
  )
  _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--json", dest="as_json", action="store_true", help="print JSON instead of text"
  )


def _positive(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
  return int(text)


def _count(text: str) -> int:
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
  return int(text)


def _port(text: str) -> int:
  if not text.isdecimal() or not 1 <= int(text) < 2**16:
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
  return int(text)


def _two_counts(text: str) -> tuple[int, int]:
  parts = text.split(",")
  if len(parts) != 2:
    raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers with a comma between")
  return _positive(parts[0]), _positive(parts[1])


if __name__ == "__main__":
  sys.exit(main())
