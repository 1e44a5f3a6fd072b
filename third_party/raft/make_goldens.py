"""Stores flows of torchvision's RAFT under weights and frames that a rule makes anew.

  PYTHON third_party/raft/make_goldens.py

PYTHON is one with torch and torchvision, which this project does not need. Writes one file for each
size of the network into goldens/, whose INDEX.md says what is in them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
SIZES = ("raft_large", "raft_small")
FRAME_HW = (128, 136)  # the correlations' coarsest level needs 128 a side
ITERATIONS = 3
# So strong that flows reach pixels, and neither windows nor frames are left at once.
FLOW_GAIN = 0.2


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Float32 numbers for every name of a state dict, each by its name and shape alone."""
  return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  leaf = name.rpartition(".")[2]
  if leaf == "num_batches_tracked":
    return np.zeros(shape, np.int64)
  values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if leaf in ("bias", "running_mean"):
    values *= 0.1
  elif leaf == "running_var":
    values = np.exp(0.2 * values)
  elif len(shape) == 1:  # the scale of a norm
    values = 1 + 0.1 * values
  else:
    values *= np.sqrt(2 / np.prod(shape[1:]))
  if name.endswith("flow_head.conv2.weight"):
    values *= FLOW_GAIN
  return values.astype(np.float32)


def frames() -> np.ndarray:
  """Float32 [2, H, W, 3] in [0, 1]: smooth noise, and that moved by (3, -2) with a new corner."""
  (h, w), rng = FRAME_HW, np.random.default_rng(0)
  coarse = rng.uniform(size=(h // 8 + 3, w // 8 + 3, 3))
  rows, columns = (np.arange(8 * (n - 1)) / 8 for n in coarse.shape[:2])
  picture = _between(_between(coarse, rows, axis=0), columns, axis=1)
  pair = np.stack([picture[4 : 4 + h, 4 : 4 + w], picture[6 : 6 + h, 1 : 1 + w]])
  pair[1, : h // 3, : w // 3] = rng.uniform(size=3)
  return pair.astype(np.float32)


def _between(values: np.ndarray, places: np.ndarray, *, axis: int) -> np.ndarray:
  """`values` read linearly between its items along an axis."""
  low = places.astype(int)
  share = np.expand_dims(places - low, [i for i in range(values.ndim) if i != axis])
  return np.take(values, low, axis) * (1 - share) + np.take(values, low + 1, axis) * share


def main() -> None:
  """Writes goldens/<size>.npz and prints what the versions were and how far the flows reach."""
  import torch
  import torchvision
  from torchvision.models import optical_flow

  print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
  given = 2 * torch.from_numpy(frames().transpose(0, 3, 1, 2).copy()) - 1
  GOLDENS.mkdir(exist_ok=True)
  for size in SIZES:
    network = getattr(optical_flow, size)().eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    state = weights(shapes)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    with torch.inference_mode():
      flows = torch.stack(network(given[:1], given[1:], num_flow_updates=ITERATIONS))
    flow_xy = flows[:, 0].permute(0, 2, 3, 1).numpy()
    names = sorted(shapes)
    np.savez_compressed(
      GOLDENS / f"{size}.npz",
      flow_xy=flow_xy[:, ::2, ::3],
      names=np.array(names),
      shapes=np.array([" ".join(map(str, shapes[name])) for name in names]),
    )
    reach = [float(np.abs(flow).max()) for flow in flow_xy]
    print(size, "reaches", np.round(reach, 2), "pixels")


if __name__ == "__main__":
  main()
