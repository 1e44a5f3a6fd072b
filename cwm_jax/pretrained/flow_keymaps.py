"""How the releases of RAFT and SEA-RAFT name their tensors; `keymaps` reads the rules both ways.

Three namings: "raft" (princeton-vl/RAFT), "torchvision" (its port) and "sea_raft"
(princeton-vl/SEA-RAFT, which Opt-CWM's distilled network shares). The first and the last store the
norm of a block's skip under two names; `merge_twins` and `add_twins` go between the two forms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cwm_jax.pretrained.keymaps import Rule
from cwm_jax.pretrained.layouts import Joined, Same, Transposed
from cwm_jax.types import InputError

NAMINGS = ("raft", "torchvision", "sea_raft")
# What batch normalisation counts in training and nothing reads afterwards.
COUNTERS = "num_batches_tracked"


@dataclass(frozen=True)
class Convolution:
  """Theirs [out, in, rows, columns], or several of them; ours [rows, columns, in, out].

  Attributes:
    parts: how many of theirs lie end to end along our last axis.
  """

  parts: int = 1

  def ours(self, theirs: Sequence[np.ndarray]) -> np.ndarray:
    if len({array.shape for array in theirs}) > 1 or theirs[0].ndim != 4:
      raise InputError(f"has shape {theirs[0].shape}, which is no convolution's or not the others'")
    return np.concatenate([array.transpose(2, 3, 1, 0) for array in theirs], axis=3)

  def theirs(self, ours: np.ndarray) -> list[np.ndarray]:
    return [part.transpose(3, 2, 0, 1) for part in np.split(ours, self.parts, axis=3)]


def naming_of(names: Mapping[str, object]) -> str | None:
  """Which of `NAMINGS` a state dict's names follow; None for something else."""
  for name, mark in zip(
    NAMINGS,
    ("update_block.encoder.convf1.weight", "feature_encoder.conv.weight", "init_conv.weight"),
  ):
    if mark in names and not (name == "raft" and "init_conv.weight" in names):
      return name
  return None


def depths_of(names: Mapping[str, object], naming: str) -> tuple[int, int, int]:
  """Blocks of each stage of the encoders, by the highest number among the names."""
  encoder = "feature_encoder" if naming == "torchvision" else "fnet"
  found = [0, 0, 0]
  for name in names:
    if match := re.match(rf"{encoder}\.layer([123])\.(\d{{1,3}})\.", name):
      found[int(match[1]) - 1] = max(found[int(match[1]) - 1], int(match[2]) + 1)
  return tuple(found)


def rules(names: Mapping[str, object], naming: str) -> tuple[Rule, ...]:
  """The rules of a flow network's state dict, after `merge_twins`.

  Args:
    names: the state dict, or a mapping with its names; they tell how deep the network is, and which
      of its norms have numbers.
    naming: one of `NAMINGS`.
  """
  made = []
  depths = depths_of(names, naming)
  for theirs, ours in _ENCODERS[naming]:
    made += _encoder(theirs, ours, naming, depths, names)
  made += {"raft": _raft, "torchvision": _torchvision, "sea_raft": _sea_raft}[naming](names)
  return tuple(made)


def merge_twins(state: Mapping[str, np.ndarray], *, where: str) -> dict[str, np.ndarray]:
  """The state with one name for each norm of a skip, and without `COUNTERS`.

  Args:
    where: names the state's origin in messages.

  Raises:
    InputError: two names of one norm hold different numbers.
  """
  kept = {name: array for name, array in state.items() if not name.endswith(COUNTERS)}
  for name in [name for name in kept if ".downsample.1." in name]:
    twin = _twin(name, kept)
    array = kept.pop(name)
    if twin in kept and not np.array_equal(kept[twin], array, equal_nan=True):
      raise InputError(f"{where}: {name!r} and {twin!r} are one norm's, but differ")
    kept[twin] = array
  return kept


def add_twins(state: Mapping[str, np.ndarray], naming: str) -> dict[str, np.ndarray]:
  """The state with every name that the release's own code writes; `merge_twins` backwards."""
  whole = dict(state)
  if naming == "torchvision":
    return whole
  for name in state:
    block, _, rest = name.rpartition(".downsample.0.")
    if rest != "weight":
      continue
    for leaf in ("weight", "bias", "running_mean", "running_var"):
      twin = _twin(f"{block}.downsample.1.{leaf}", state)
      if twin in state:
        whole[f"{block}.downsample.1.{leaf}"] = state[twin]
  return whole


_ENCODERS = {
  "raft": (("fnet", "feature_encoder"), ("cnet", "context_encoder")),
  "torchvision": (
    ("feature_encoder", "feature_encoder"),
    ("context_encoder", "context_encoder"),
  ),
  "sea_raft": (("fnet", "feature_encoder"), ("cnet", "context_encoder")),
}


def _twin(name: str, names: Mapping[str, object]) -> str:
  """The norm that `<block>.downsample.1.<leaf>` is: the block's last one."""
  block, _, leaf = name.rpartition(".downsample.1.")
  if _is_sea_raft(names):
    return f"{block}.bn3.{leaf}"
  last = 4 if f"{block}.conv3.weight" in names else 3
  if f"{block}.conv1.weight" not in names:
    return name  # torchvision's, whose name is the only one
  return f"{block}.norm{last}.{leaf}"


def _is_sea_raft(names: Mapping[str, object]) -> bool:
  return "init_conv.weight" in names


def _convolution(theirs: str, ours: str) -> list[Rule]:
  return [
    Rule((f"{theirs}.weight",), f"{ours}/kernel", Convolution()),
    Rule((f"{theirs}.bias",), f"{ours}/bias"),
  ]


def _norm(theirs: str, ours: str, names: Mapping[str, object]) -> list[Rule]:
  """A batch norm's rules; none where the release's norm has no numbers."""
  if f"{theirs}.running_mean" not in names:
    return []
  leaves = dict(weight="scale", bias="bias", running_mean="mean", running_var="var")
  return [Rule((f"{theirs}.{a}",), f"{ours}/batch/{b}") for a, b in leaves.items()]


def _encoder(
  theirs: str,
  ours: str,
  naming: str,
  depths: tuple[int, int, int],
  names: Mapping[str, object],
) -> list[Rule]:
  port = naming == "torchvision"
  norm_word = "bn" if naming == "sea_raft" else "norm"
  stem, stem_norm = ("convnormrelu.0", "convnormrelu.1") if port else ("conv1", f"{norm_word}1")
  out = {"raft": "conv2", "torchvision": "conv", "sea_raft": "final_conv"}[naming]
  made = _convolution(f"{theirs}.{stem}", f"{ours}/stem")
  made += _norm(f"{theirs}.{stem_norm}", f"{ours}/stem_norm", names)
  for stage, depth in enumerate(depths, start=1):
    for i in range(depth):
      block, mine = f"{theirs}.layer{stage}.{i}", f"{ours}/stage{stage}_block{i}"
      first = f"{block}.convnormrelu{{}}.0" if port else f"{block}.conv{{}}"
      count = 3 if f"{first.format(3)}.weight" in names else 2
      for k in range(1, count + 1):
        norm = f"{block}.convnormrelu{k}.1" if port else f"{block}.{norm_word}{k}"
        made += _convolution(first.format(k), f"{mine}/conv{k}")
        made += _norm(norm, f"{mine}/norm{k}", names)
      if f"{block}.downsample.0.weight" in names:
        norm = f"{block}.downsample.1" if port else f"{block}.{norm_word}{count + 1}"
        made += _convolution(f"{block}.downsample.0", f"{mine}/skip")
        made += _norm(norm, f"{mine}/skip_norm", names)
  return made + _convolution(f"{theirs}.{out}", f"{ours}/out")


def _motion(prefix: str, end: str, words: tuple[str, str], second: bool) -> list[Rule]:
  corr, flow = (f"{prefix}.{word}" for word in words)
  made = _convolution(f"{corr}1{end}", "motion_encoder/corr1")
  if second:
    made += _convolution(f"{corr}2{end}", "motion_encoder/corr2")
  for i in (1, 2):
    made += _convolution(f"{flow}{i}{end}", f"motion_encoder/flow{i}")
  return made + _convolution(f"{prefix}.conv{end}", "motion_encoder/both")


def _gru(theirs: str, number: int) -> list[Rule]:
  """`theirs` has a place for the gate's letter."""
  made = []
  for letters, name in (("zr", "gates"), ("q", "candidate")):
    tensors = [theirs.format(letter) for letter in letters]
    bias = Joined(tuple(range(len(letters))), count=len(letters)) if len(letters) > 1 else Same()
    ours = f"update/{name}{number}"
    weight = Convolution(parts=len(letters))
    made.append(Rule(tuple(f"{t}.weight" for t in tensors), f"{ours}/kernel", weight))
    made.append(Rule(tuple(f"{t}.bias" for t in tensors), f"{ours}/bias", bias))
  return made


def _heads(flow: tuple[str, str], mask: tuple[str, str], names: Mapping[str, object]) -> list[Rule]:
  made = []
  for i in (0, 1):
    made += _convolution(flow[i], f"flow_head/conv{i + 1}")
    if f"{mask[0]}.weight" in names:
      made += _convolution(mask[i], f"upsample_head/conv{i + 1}")
  return made


def _raft(names: Mapping[str, object]) -> list[Rule]:
  top = "update_block"
  second = f"{top}.encoder.convc2.weight" in names
  made = _motion(f"{top}.encoder", "", ("convc", "convf"), second)
  if f"{top}.gru.convz1.weight" in names:
    made += _gru(f"{top}.gru.conv{{}}1", 1) + _gru(f"{top}.gru.conv{{}}2", 2)
  else:
    made += _gru(f"{top}.gru.conv{{}}", 1)
  head = f"{top}.flow_head"
  mask = f"{top}.mask"
  return made + _heads((f"{head}.conv1", f"{head}.conv2"), (f"{mask}.0", f"{mask}.2"), names)


def _torchvision(names: Mapping[str, object]) -> list[Rule]:
  top = "update_block"
  second = f"{top}.motion_encoder.convcorr2.0.weight" in names
  made = _motion(f"{top}.motion_encoder", ".0", ("convcorr", "convflow"), second)
  for i in (1, 2):
    unit = f"{top}.recurrent_block.convgru{i}"
    if f"{unit}.convz.weight" in names:
      made += _gru(f"{unit}.conv{{}}", i)
  head, mask = f"{top}.flow_head", "mask_predictor"
  return made + _heads(
    (f"{head}.conv1", f"{head}.conv2"), (f"{mask}.convrelu.0", f"{mask}.conv"), names
  )


def _sea_raft(names: Mapping[str, object]) -> list[Rule]:
  made = _convolution("init_conv", "context_conv")
  made += _motion("update_block.encoder", "", ("convc", "convf"), True)
  count = 0
  while f"update_block.refine.{count}.gamma" in names:
    theirs, ours = f"update_block.refine.{count}", f"refine_{count}"
    made += [
      Rule((f"{theirs}.dwconv.weight",), f"{ours}/depthwise_kernel", Convolution()),
      Rule((f"{theirs}.dwconv.bias",), f"{ours}/depthwise_bias"),
      Rule((f"{theirs}.gamma",), f"{ours}/gamma"),
      Rule((f"{theirs}.norm.weight",), f"{ours}/norm/scale"),
      Rule((f"{theirs}.norm.bias",), f"{ours}/norm/bias"),
      *_convolution(f"{theirs}.final", f"{ours}/out"),
    ]
    for a, b in (("pwconv1", "fc1"), ("pwconv2", "fc2")):
      made.append(Rule((f"{theirs}.{a}.weight",), f"{ours}/{b}/kernel", Transposed()))
      made.append(Rule((f"{theirs}.{a}.bias",), f"{ours}/{b}/bias"))
    count += 1
  heads = ("flow_head.0", "flow_head.2"), ("upsample_weight.0", "upsample_weight.2")
  return made + _heads(*heads, names)
