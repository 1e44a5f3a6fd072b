"""The command line of `cwm-jax`: which commands there are and what each is given."""

from __future__ import annotations

import argparse

from cwm_jax import argument_values as values
from cwm_jax import job_arguments
from cwm_jax import shared_arguments as shared

_EXAMPLES = """examples:
  cwm-jax demo                                 track a rendered clip with known truth
  cwm-jax demo clip.mp4 --out pictures         the same on your own file
  cwm-jax track clip.mp4 --grid 8              64 points of the first frame
  cwm-jax track frames/ --points points.csv    your own points; header t,y,x
  cwm-jax track clip.mp4 --in-mask dog.png     points where the picture is white
  cwm-jax track clip.mp4 --mode chain          from frame to frame
  cwm-jax flow a.png b.png --stride 4          dense flow: .flo and a picture
  cwm-jax view clip.mp4                        click a point, see how the answer comes about
  cwm-jax dense clip.mp4 --stride 4            a flow field for every frame
  cwm-jax segments dog.png --at 120,80         what moves along when that patch is moved
  cwm-jax eval --tapvid tapvid_davis.pkl       accuracy on TAP-Vid beside other trackers
  cwm-jax train runs/mine --videos my_videos   go on training the weights, on your videos
  cwm-jax prepare my_videos --out clips        short clips of many videos, quick to read
  cwm-jax label --videos my_videos             a tracker's answers, to train a student on
  cwm-jax info                                 what the shipped weights are
  cwm-jax doctor                               what this machine has, what is missing
  cwm-jax convert WORKDIR model.safetensors    a training run's weights as one file
  cwm-jax convert opt-cwm-512 o.safetensors    a public release, fetched and converted

Coordinates are pixels of the frames as given; the image's corner is (0, 0), the centre of its first
pixel (0.5, 0.5). `cwm-jax COMMAND --help` tells what a command writes.

Exit codes: 0 done; 1 doctor found something missing; 2 something given cannot be used; 3 the loss
of a training is not finite; 4 a training or its data could not be written; 130 interrupted, with
what was finished kept."""

_CLIP = "video file or folder of frames"
_MARKS = dict(
  type=values.positive,
  metavar="N",
  help="marks in one pass; 1 asks point by point (default: 16; 1 on a grid of few points, and with "
  "--masks adaptive)",
)


def parser() -> argparse.ArgumentParser:
  """The parser; what it makes holds `run`, "module:function", beside the function's arguments."""
  whole = argparse.ArgumentParser(
    prog="cwm-jax",
    description="Motion read out of a world model: no flow head, no motion labels.",
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)

  demo = shared.add_command(
    commands,
    "demo",
    "track 16 points and draw what was seen",
    "Tracks 16 points through a rendered clip whose truth is known, or through VIDEO, and writes "
    "overlay.mp4, flow.png, tracks.npz and, of a predictor, heatmaps.png and "
    "explanation.png.",
    "  cwm-jax demo\n"
    "  cwm-jax demo clip.mp4 --out pictures\n"
    "  cwm-jax demo --masks 4 --json                      quicker, and for a program",
  )
  demo.add_argument("video", nargs="?", metavar="VIDEO", help=_CLIP)
  shared.add_reading(demo)
  shared.add_out(demo, "demo")
  demo.set_defaults(run="cwm_jax.demo:run")

  track = shared.add_command(
    commands,
    "track",
    "follow points through a video",
    "Follows points from their query frame to the end. Writes tracks.npz (tracks_xy [N, T, 2], "
    "occluded [N, T], confidence [N, T], queries_tyx [N, 3], size_hw [2], times_s [T]) and "
    "overlay.mp4 (hollow: not seen). A long video takes no more memory than a short one. At Ctrl-C "
    "the tracks so far are written.",
    "  cwm-jax track clip.mp4 --grid 16 --csv\n"
    "  cwm-jax track clip.mp4 --in-mask dog.png --at 30 --mode anchor\n"
    "  cwm-jax track frames/ --points points.csv --no-overlay --json",
  )
  track.add_argument("video", metavar="VIDEO", help=_CLIP)
  points = track.add_mutually_exclusive_group()
  points.add_argument(
    "--grid",
    type=values.positive,
    default=8,
    metavar="N",
    help="N x N points of a frame (default: 8)",
  )
  points.add_argument("--points", metavar="FILE", help="CSV with the header t,y,x")
  track.add_argument(
    "--in-mask", dest="within", metavar="PICTURE", help="the grid only where this picture is white"
  )
  track.add_argument(
    "--at", type=values.count, default=0, metavar="T", help="the grid's frame (default: 0)"
  )
  track.add_argument(
    "--mode",
    choices=("query", "chain", "anchor"),
    default="query",
    help="each frame is compared with the query's own, so errors do not add up (query); with the "
    "one in which the point was last seen (chain); with both, and the query's own is believed "
    "where it is confident (anchor) (default: query)",
  )
  track.add_argument(
    "--csv",
    dest="table",
    action="store_true",
    help="write tracks.csv too: point,t,x,y,occluded,confidence",
  )
  track.add_argument("--no-overlay", dest="overlay", action="store_false", help="write no video")
  shared.add_reading(track, adaptive=True)
  shared.add_out(track, "tracks")
  track.set_defaults(run="cwm_jax.track:run")

  flow = shared.add_command(
    commands,
    "flow",
    "where the points of image A are in image B",
    "Without --points: dense flow, as flow.flo (read out every --stride pixels, interpolated "
    "between; with --format png as flow-kitti.png, KITTI's 16 bits) and flow.png, which shows it. "
    "With --points: points.npz (from_xy, to_xy [N, 2], occluded, confidence [N], size_hw) and "
    "points.png.",
    "  cwm-jax flow a.png b.png --stride 4\n"
    "  cwm-jax flow a.png b.png --format png --out flow\n"
    "  cwm-jax flow a.png b.png --points points.csv --json",
  )
  flow.add_argument("first", metavar="A", help="image file")
  flow.add_argument("second", metavar="B", help="image file of the same size")
  where = flow.add_mutually_exclusive_group()
  where.add_argument(
    "--stride",
    type=values.positive,
    default=8,
    metavar="N",
    help="pixels between read-outs (default: 8)",
  )
  where.add_argument("--points", metavar="FILE", help="CSV with the header y,x or t,y,x (t is 0)")
  flow.add_argument("--marks", **_MARKS)
  flow.add_argument(
    "--format", dest="form", choices=("flo", "png"), default="flo", help="default: flo"
  )
  shared.add_reading(flow, adaptive=True)
  shared.add_out(flow, "flow")
  flow.set_defaults(run="cwm_jax.commands:flow")

  dense = shared.add_command(
    commands,
    "dense",
    "a flow field for every frame of a video",
    "Flow from each frame to the one --gap later, as 000000.flo (or KITTI's 16-bit .png) and so "
    "on, and flow.mp4 in colours. Ctrl-C leaves whole files.",
    "  cwm-jax dense clip.mp4 --stride 4 --out flow\n"
    "  cwm-jax dense frames/ --format png --gap 5 --masks 4",
  )
  dense.add_argument("video", metavar="VIDEO", help=_CLIP)
  dense.add_argument(
    "--stride",
    type=values.positive,
    default=8,
    metavar="N",
    help="pixels between read-outs (default: 8)",
  )
  dense.add_argument(
    "--gap", type=values.positive, default=1, metavar="N", help="frames between a pair (default: 1)"
  )
  dense.add_argument(
    "--format", dest="form", choices=("flo", "png"), default="flo", help="default: flo"
  )
  dense.add_argument("--marks", **_MARKS)
  dense.add_argument("--no-overlay", dest="overlay", action="store_false", help="write no flow.mp4")
  shared.add_reading(dense, adaptive=True)
  shared.add_out(dense, "dense")
  dense.set_defaults(run="cwm_jax.dense:run")

  segments = shared.add_command(
    commands,
    "segments",
    "what moves along when a patch is moved",
    "Moves the patch under a point of a picture and sees what else the prediction moves: "
    "segments.npz (along [N, H, W], above 0 where a pixel moves along; points_xy) and "
    "segments.png.",
    "  cwm-jax segments dog.png --at 120,80\n  cwm-jax segments dog.png --points points.csv",
  )
  segments.add_argument("image", metavar="IMAGE", help="image file")
  where = segments.add_mutually_exclusive_group()
  where.add_argument("--at", type=values.place, metavar="X,Y", help="a point (default: the middle)")
  where.add_argument("--points", metavar="FILE", help="CSV with the header y,x or t,y,x (t is 0)")
  shared.add_reading(segments, marked=False)
  shared.add_out(segments, "segments")
  segments.set_defaults(run="cwm_jax.segment_command:run")

  job_arguments.add(commands)

  view = shared.add_command(
    commands,
    "view",
    "click a point and see how its track comes about",
    "Serves one page on this machine (127.0.0.1 only): scrub, click a point, and see the mark, the "
    "predictions with and without it, each mask's response, their mean, and the track. Without "
    "VIDEO it shows a rendered clip whose truth is known. Nothing leaves the machine.",
    "  cwm-jax view\n  cwm-jax view clip.mp4 --start 300 --frames 120\n"
    "  ssh -L 8765:127.0.0.1:8765 HOST            to see it from another machine",
  )
  view.add_argument("video", nargs="?", metavar="VIDEO", help=_CLIP)
  view.add_argument(
    "--start", type=values.count, default=0, metavar="T", help="first frame to show (default: 0)"
  )
  view.add_argument(
    "--frames", type=values.positive, default=240, metavar="N", help="frames to show (default: 240)"
  )
  view.add_argument(
    "--port",
    type=values.port,
    metavar="N",
    help="default: 8765, or any free one where that is taken",
  )
  view.add_argument(
    "--browser", action="store_true", help="open the page in this machine's browser"
  )
  shared.add_reading(view, masks=8)  # somebody waits
  view.set_defaults(run="cwm_jax.viewer.command:run")

  info = shared.add_command(
    commands,
    "info",
    "what a weights file holds",
    "Prints config, scores, names and shapes.",
    "  cwm-jax info\n"
    "  cwm-jax info runs/mine/model.safetensors --json\n"
    "  cwm-jax info --list                                names for --weights",
  )
  info.add_argument(
    "weights",
    nargs="?",
    metavar="WEIGHTS",
    help=".safetensors file or name of a release (default: the shipped one)",
  )
  info.add_argument(
    "--list", dest="listed", action="store_true", help="the names of all weights that have one"
  )
  shared.add_json(info)
  info.set_defaults(run="cwm_jax.commands:info")

  convert = shared.add_command(
    commands,
    "convert",
    "weights from one form into another",
    "IN is a training run's folder (its newest checkpoint is taken, the running average of the "
    "parameters where one is kept), a released checkpoint (.pt, .pth, .safetensors), or a name of "
    "a release: then OUT is a weights file of this project (of a joint training, the mark it "
    "learned). Or IN is such a weights file: then OUT "
    "has the release's names and layouts. Every key of either side is accounted for; where that "
    "fails, both lists are printed.",
    "  cwm-jax convert runs/mine model.safetensors        a training run's weights\n"
    "  cwm-jax convert opt-cwm-512 opt.safetensors        a public release, fetched\n"
    "  cwm-jax convert base.pt o.safetensors --over joint.pt\n"
    "  cwm-jax convert model.safetensors r.safetensors    and back",
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
    "--heads", type=values.two_counts, metavar="E,D", help="attention heads of encoder and decoder"
  )
  convert.add_argument(
    "--flow-heads",
    type=values.two_counts,
    metavar="E,D",
    help="the same of the Psi-flow that joint training saved (default: the release's, or --heads)",
  )
  shared.add_json(convert)
  convert.set_defaults(run="cwm_jax.conversion:run")

  doctor = shared.add_command(
    commands,
    "doctor",
    "what this machine has, what is missing, how to get it",
    "Looks at versions, devices, weights, caches and folders. Exit code 1 where something that is "
    "needed is missing.",
    "  cwm-jax doctor\n  cwm-jax doctor --json                              for a program",
  )
  shared.add_json(doctor)
  doctor.set_defaults(run="cwm_jax.doctor:run")
  return whole
