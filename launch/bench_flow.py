"""RAFT against torchvision's, SEA-RAFT against its authors' code: the same numbers, how fast.

Run by `launch/bench flow`. Both sides get the same random weights, converted as a release is, and
the same frames, in one process and in turns, so that other work on the machine falls on both. With
--time the row `flow` has seconds a pair and `parts` where they go: features (RAFT's with context),
one iteration of how many `times`, and which of them, all iterations together, `bound_by` names.
PyTorch is no part of this project: install torch and torchvision into any environment of the same
Python version and name its site-packages with --torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_facts
import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import geometry, models
from cwm_jax.configs import flow_networks
from cwm_jax.data import images
from cwm_jax.pretrained import convert
from cwm_jax.types import InputError

_WITHOUT_TORCH = (
  "PyTorch is not here: pip install torch torchvision into an environment of Python "
  f"{sys.version_info[0]}.{sys.version_info[1]} and name its site-packages with --torch"
)


def measure_raft(frames: np.ndarray, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Rows that compare torchvision's RAFTs with ours.

  Theirs enlarge the flow of every iteration, which is a part of their time, ours the last one.
  """
  import torch
  import torchvision
  from torchvision.models import optical_flow

  given = _as_torch(frames, options.device) / 127.5 - 1.0
  for name in ("raft_large", "raft_small"):
    theirs = _with_random_norms(getattr(optical_flow, name)(), options).eval()

    def run_theirs(count: int, theirs: Any = theirs) -> np.ndarray:
      with torch.inference_mode():
        flow = theirs(given[:1], given[1:], num_flow_updates=count)[-1]
      return flow[0].permute(1, 2, 0).cpu().numpy()

    sides = {"ours": _ours(theirs, frames), "torch": run_theirs}
    versions = f"torchvision {torchvision.__version__}, torch {torch.__version__}"
    yield from rows(name, sides, frames, options, versions)


def measure_sea_raft(frames: np.ndarray, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Rows that compare SEA-RAFT by its authors' code with ours."""
  import torch

  theirs = _with_random_norms(_public_sea_raft(options), options).eval()
  given = _as_torch(frames, options.device)

  def run_theirs(count: int) -> np.ndarray:
    with torch.inference_mode():
      flow = theirs(given[:1], given[1:], iters=count, test_mode=True)["final"]
    return flow[0].permute(1, 2, 0).cpu().numpy()

  sides = {"ours": _ours(theirs, frames), "torch": run_theirs}
  versions = f"the authors' code, torch {torch.__version__}"
  yield from rows(f"sea_raft_{options.size_name}", sides, frames, options, versions)


def rows(
  network: str,
  sides: dict[str, Callable[[int], np.ndarray]],
  frames: np.ndarray,
  options: argparse.Namespace,
  baseline: str,
) -> Iterator[dict[str, Any]]:
  """How far both sides are apart, in pixels; where times are asked for, seconds whole and in parts.

  Args:
    network: its name.
    sides: "ours" and "torch", each number of iterations -> flow [H, W, 2] on the host.
    frames: float32 [2, H, W, 3].
    options: iterations, of which one alone has no parts; time, sea_raft, repetitions.
    baseline: the other side's versions.
  """
  full = options.iterations
  row = _row(network, *(run(full) for run in sides.values()), frames, iterations=full)
  if not options.time:
    yield row
    return
  # SEA-RAFT without an iteration is its context alone; torchvision's RAFT needs one.
  least = 0 if options.sea_raft else 1
  seconds = _seconds(sides, sorted({least, 1, full}), options.repetitions)
  times = {f"{side}_seconds": round(seconds[side, full], 4) for side in sides}
  ratio = round(seconds["torch", full] / seconds["ours", full], 3)
  yield row | times | dict(baseline=baseline, ratio=ratio)
  for side in sides if full > 1 else ():
    each = (seconds[side, full] - seconds[side, 1]) / (full - 1)
    features = seconds[side, 1] - each
    parts = dict(features_and_correlation=features)
    if least == 0:
      parts = dict(context=seconds[side, 0], features_and_correlation=features - seconds[side, 0])
    whole = parts | dict(iterations=full * each)
    parts = {part: round(s, 4) for part, s in (parts | dict(iteration=each)).items()}
    size = {name: row[name] for name in ("height", "width")}
    about = dict(measure="parts", network=network, **size, side=side, times=full)
    bound = dict(bound_by=max(whole, key=whole.get))
    yield about | parts | bound | bench_facts.facts()


def _seconds(
  sides: dict[str, Callable[[int], Any]], counts: list[int], repetitions: int
) -> dict[tuple[str, int], float]:
  """Median seconds of each side at each count; the first repetition compiles and is not timed."""
  taken: dict[tuple[str, int], list[float]] = {}
  for repetition in range(repetitions + 1):
    for count in counts:
      for name, run in sides.items():
        began = time.perf_counter()
        run(count)
        if repetition:
          taken.setdefault((name, count), []).append(time.perf_counter() - began)
  return {key: float(np.median(values)) for key, values in taken.items()}


def _ours(theirs: Any, frames: np.ndarray) -> Callable[[int], np.ndarray]:
  """Our network with a torch module's numbers: iterations -> flow."""
  ours, params = _converted(theirs)
  mine = jnp.asarray(frames[None] / 255.0, jnp.float32)
  call = jax.jit(
    lambda p, f, count: ours.apply({"params": p}, f, iterations=count), static_argnums=2
  )
  return lambda count: np.asarray(call(params, mine, count).flow_xy)[0]


def _converted(theirs: Any) -> tuple[Any, Any]:
  """Our module and parameters from a torch module's state dict."""
  state = {name: tensor.detach().cpu().numpy() for name, tensor in theirs.state_dict().items()}
  made = convert.from_state(state, where="the torch module")
  ours = models.build_flow_network(made.config["flow_network"])
  return ours, jax.tree.map(jnp.asarray, made.params)


def _with_random_norms(module: Any, options: argparse.Namespace) -> Any:
  """A module as it is born, but with norms that do something, so that exchanged ones show."""
  import torch

  torch.manual_seed(0)
  for name, tensor in module.state_dict().items():
    if name.endswith(("running_mean", "running_var")) or "norm" in name or ".bn" in name:
      if tensor.is_floating_point():
        tensor.copy_(tensor + 0.2 * torch.rand_like(tensor))
  return module.to(options.device)


def _public_sea_raft(options: argparse.Namespace) -> Any:
  """SEA-RAFT as its authors' code builds it, without the ImageNet weights that it would fetch."""
  import torchvision

  folder = Path(options.sea_raft)
  settings = folder / "config" / "eval" / f"sintel-{options.size_name}.json"
  if not settings.is_file():
    raise InputError(f"there is no {settings}: name a checkout of princeton-vl/SEA-RAFT")
  for name in ("resnet18", "resnet34"):
    make = getattr(torchvision.models, name)
    setattr(torchvision.models, name, lambda weights=None, make=make: make())
  try:
    import huggingface_hub  # noqa: F401
  except ImportError:
    hub = types.ModuleType("huggingface_hub")
    # The network's class names it as a base, with arguments, and nothing here calls it.
    hub.PyTorchModelHubMixin = type(
      "Mixin", (), {"__init_subclass__": classmethod(lambda cls, **_: None)}
    )
    sys.modules["huggingface_hub"] = hub
  sys.path.insert(0, str(folder / "core"))
  import raft

  return raft.RAFT(argparse.Namespace(**json.loads(settings.read_text())))


def _row(name: str, got: np.ndarray, want: np.ndarray, frames: np.ndarray, **more: Any) -> dict:
  return dict(
    measure="flow",
    network=name,
    height=frames.shape[1],
    width=frames.shape[2],
    apart_px=float(np.abs(got - want).max()),
    largest_flow_px=round(float(np.abs(want).max()), 2),
    **bench_facts.facts(),
    **more,
  )


def _frames(options: argparse.Namespace) -> np.ndarray:
  """float32 [2, H, W, 3], 0 to 255."""
  if options.pair:
    frames = [images.read_image(path).astype(np.float32) for path in options.pair]
    return np.stack([np.asarray(geometry.resize(jnp.asarray(f), options.size)) for f in frames])
  h, w = options.size
  rng = np.random.default_rng(0)
  coarse = jnp.asarray(rng.uniform(0, 255, (h // 8 + 2, w // 8 + 2, 3)), jnp.float32)
  picture = np.asarray(geometry.resize(coarse, (h + 8, w + 8)))
  return np.stack([picture[4 : 4 + h, 4 : 4 + w], picture[2 : 2 + h, 7 : 7 + w]])


def _as_torch(frames: np.ndarray, device: str) -> Any:
  import torch

  return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).to(device)


def _options(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="launch/bench flow", description=__doc__.split("\n\n")[0], allow_abbrev=False
  )
  add = parser.add_argument
  add("--torch", default="", metavar="FOLDER", help="site-packages that have torch")
  add("--sea-raft", default="", metavar="FOLDER", help="checkout of princeton-vl/SEA-RAFT")
  add("--size-name", default="S", choices=["S", "M", "L"], help="of SEA-RAFT")
  add("--pair", nargs=2, metavar="IMAGE", help="two frames; otherwise a moved pattern")
  add("--size", type=int, nargs=2, default=None, metavar=("HEIGHT", "WIDTH"),
      help="of the frames; 128 160 for RAFT (multiples of 8), 436 1024 for SEA-RAFT")  # fmt: skip
  add("--iterations", type=int, default=None,
      help="SEA-RAFT's own (S and M 4, L 12) unless named; 4 for RAFT")  # fmt: skip
  add("--time", action="store_true", help="time RAFT too; SEA-RAFT always is")
  add("--repetitions", type=int, default=5)
  options = parser.parse_args(arguments)
  options.time = options.time or bool(options.sea_raft)
  if options.iterations is None:
    own = flow_networks.network(f"sea-raft-{options.size_name}")["iterations"]
    options.iterations = own if options.sea_raft else 4
  if min(options.iterations, options.repetitions) < 1:
    parser.error("iterations and repetitions are 1 or more")
  options.size = tuple(options.size or ((436, 1024) if options.sea_raft else (128, 160)))
  if options.sea_raft and min(options.size) < 121:
    parser.error("SEA-RAFT's own code takes frames from 121 pixels a side on")
  return options


def main() -> int:
  """Prints the rows; exit code 2 where something given cannot be used."""
  options = _options(sys.argv[1:])
  if options.torch:
    sys.path.append(options.torch)  # last, so that what both have is ours
  try:
    import torch
    import torchvision  # noqa: F401
  except ImportError:
    print(_WITHOUT_TORCH, file=sys.stderr)
    return 2
  on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
  options.device = "cuda" if on_gpu else "cpu"
  measure = measure_sea_raft if options.sea_raft else measure_raft
  try:
    for row in measure(_frames(options), options):
      print(json.dumps(row), flush=True)
  except (InputError, ValueError) as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
