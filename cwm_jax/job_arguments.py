"""The commands that are jobs: eval, train, label and prepare, and what each is given."""

from __future__ import annotations

from typing import Any

from cwm_jax import argument_values as values
from cwm_jax import shared_arguments as shared


def add(commands: Any) -> None:
  """Adds them to argparse's commands."""
  evaluate = shared.add_command(
    commands,
    "eval",
    "how good trackers are, on clips with truth",
    "Evaluates trackers on TAP-Vid (a .pkl, a folder of its shards, or of clip folders), on frame "
    "pairs with true flow, or on procedural scenes (default: 100 of them), and prints a table for "
    "each. Killed, it goes on with the same command. Fractions are printed as percent.",
    "  cwm-jax eval                                     the shipped weights on 100 scenes\n"
    "  cwm-jax eval --tapvid tapvid_davis.pkl --trackers mm10,zero,lk\n"
    "  cwm-jax eval --scenes 500 --weights mine.safetensors --json\n"
    "  cwm-jax eval --segments 20 --trackers mm4         what moves along with objects",
  )
  evaluate.add_argument("--tapvid", metavar="PATH", help="clips of TAP-Vid")
  evaluate.add_argument(
    "--flow-pairs", metavar="FOLDER", help="frame pairs with .flo or KITTI truth"
  )
  evaluate.add_argument(
    "--scenes",
    type=values.positive,
    metavar="N",
    help="so many of the 500 frozen procedural scenes",
  )
  evaluate.add_argument(
    "--segments",
    type=values.positive,
    metavar="N",
    help="on so many of them: do objects move along with themselves? (of mm<N>)",
  )
  evaluate.add_argument(
    "--trackers",
    type=values.names,
    metavar="A,B",
    help="mm<N> (the weights with N masks), zero, phase, dis, farneback, lk, a weights file or a "
    "release's name (default: mm10,mm1,zero,phase)",
  )
  evaluate.add_argument(
    "--protocols", type=values.names, metavar="A,B", help="of TAP-Vid (default: first,cfg)"
  )
  evaluate.add_argument("--weights", metavar="FILE", help="what mm<N> asks (default: the shipped)")
  evaluate.add_argument("--readout", choices=("argmax", "soft", "window"), help="default: window")
  evaluate.add_argument(
    "--zoom", type=values.count, metavar="N", help="rounds of zoom (default: 0)"
  )
  shared.add_settings(evaluate)
  shared.add_out(evaluate, "evaluation")
  evaluate.set_defaults(run="cwm_jax.jobs:evaluate")

  train = shared.add_command(
    commands,
    "train",
    "go on training weights, on your own videos",
    "Fine-tunes weights on a folder of videos (configs/finetune.py), or trains by another config, "
    "and writes WORKDIR/model.safetensors, which --weights takes (a joint training the mark it "
    "learned, WORKDIR/mark.safetensors). Ctrl-C saves and writes that too; the same command goes "
    "on. Pictures of predictions, metrics and checkpoints are in WORKDIR.",
    "  cwm-jax train runs/mine --videos my_videos --minutes 30\n"
    "  cwm-jax track clip.mp4 --weights runs/mine/model.safetensors\n"
    "  cwm-jax train runs/match --config pretrain_tiny:match      from scratch, on scenes\n"
    "  cwm-jax train runs/mine --videos v --set optim.peak_lr=1e-4",
  )
  train.add_argument("workdir", type=values.folder, metavar="WORKDIR", help="folder of the run")
  train.add_argument(
    "--config",
    dest="config_name",
    metavar="NAME[:ARG]",
    help="one of those that come with the package (default: finetune)",
  )
  train.add_argument("--videos", metavar="FOLDER", help="folder of videos, list file or video")
  train.add_argument(
    "--from",
    dest="weights",
    metavar="FILE",
    help="weights file, release's name or another WORKDIR to start from (default: the shipped); "
    "for a joint training the predictor it asks, a file or name, or a joint training's WORKDIR",
  )
  train.add_argument("--steps", type=values.positive, metavar="N", help="length of the whole run")
  train.add_argument(
    "--minutes",
    type=values.above_zero,
    metavar="M",
    help="leave after so long; the next call goes on",
  )
  train.add_argument("--batch", type=values.positive, metavar="N", help="pairs a step")
  shared.add_settings(train)
  shared.add_json(train)
  train.set_defaults(run="cwm_jax.jobs:train")

  label = shared.add_command(
    commands,
    "label",
    "a tracker's answers about many pairs, for training",
    "Asks a tracker about points of many pairs of frames and writes ArrayRecord shards of pair, "
    "points, flow, confidence and visibility, a manifest and pictures. Killed, it goes on with the "
    "same command. `cwm-jax train WORKDIR --config distill_tiny` learns from them.",
    "  cwm-jax label                              rendered scenes, the shipped weights\n"
    "  cwm-jax label --videos my_videos --pairs 1000 --points 32 --tracker mm10",
  )
  label.add_argument("--videos", metavar="FOLDER", help="instead of scenes: folder, list or video")
  label.add_argument("--tracker", metavar="NAME", help="as in eval --trackers (default: mm2)")
  for name, what in (("pairs", "in all"), ("points", "of each pair")):
    label.add_argument(f"--{name}", type=values.positive, metavar="N", help=f"how many, {what}")
  shared.add_settings(label)
  shared.add_out(label, "labels")
  label.set_defaults(run="cwm_jax.jobs:label")

  prepare = shared.add_command(
    commands,
    "prepare",
    "videos into a dataset of short clips, for training",
    "Cuts clips at even times from a folder of videos, into ArrayRecord shards that "
    "tfds.data_source reads, with a manifest of counts, hashes and what was skipped. Killed, it "
    "goes on with the same command.",
    "  cwm-jax prepare my_videos\n  cwm-jax prepare my_videos --limit 4 --workers 16",
  )
  prepare.add_argument("videos", metavar="VIDEOS", help="folder, list file or video")
  for name, what in (("seconds", "of a clip (default: 2)"), ("fps", "frames a second (20)")):
    prepare.add_argument(f"--{name}", type=values.above_zero, metavar="X", help=what)
  for name, what in (("limit", "clips of a video (default: all)"), ("workers", "processes (4)")):
    prepare.add_argument(f"--{name}", type=values.count, metavar="N", help=what)
  shared.add_settings(prepare)
  shared.add_out(prepare, "prepared")
  prepare.set_defaults(run="cwm_jax.prepare_command:run")
