"""How the releases of RAFT and SEA-RAFT name their tensors; `keymaps` reads the rules both ways.

Three namings: "raft" (princeton-vl/RAFT), "torchvision" (its port) and "sea_raft"
(princeton-vl/SEA-RAFT, which Opt-CWM's distilled network shares). The first and the last store the
norm of a block's skip under two names; `merge_twins` and `add_twins` go between the two forms.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class _Form(NamedTuple):
  """What a network has that others of its naming have not.

  depths: blocks of each stage of the encoders.
  bottleneck: blocks have three convolutions, not two.
  separable: the recurrent unit goes along rows, then along columns.
  refine_blocks: ConvNeXt blocks of an iteration.
  """

  depths: tuple[int, ...]
  bottleneck: bool
  separable: bool
  refine_blocks: int


def rules_of_state(state: Mapping[str, object], naming: str) -> tuple[Rule, ...]:
  """The rules of a release's state dict, after `merge_twins`.

  What the network may lack, and lacks, has no rule: whether it fits a model is for the caller to
  check.

  Args:
    state: its names are looked at.
    naming: one of `NAMINGS`.
  """
  encoder = "feature_encoder" if naming == "torchvision" else "fnet"
  first = "convnormrelu3.0" if naming == "torchvision" else "conv3"
  units = ("update_block.gru.convz2.weight", "update_block.recurrent_block.convgru2.convz.weight")
  form = _Form(
    tuple(_count(rf"{encoder}\.layer{stage}\.", state) for stage in (1, 2, 3)),
    bottleneck=f"{encoder}.layer1.0.{first}.weight" in state,
    separable=any(name in state for name in units),
    refine_blocks=_count(r"update_block\.refine\.", state),
  )
  return tuple(r for r in _rules(naming, form) if any(name in state for name in r.theirs))


def rules_of_params(params: Mapping[str, object], naming: str) -> tuple[Rule, ...]:
  """The rules by which parameters of ours become a release's; the inverse of `rules_of_state`.

  Args:
    params: its '/'-joined names are looked at.
    naming: one of `NAMINGS`.
  """
  form = _Form(
    tuple(_count(rf"feature_encoder/stage{stage}_block", params) for stage in (1, 2, 3)),
    bottleneck="feature_encoder/stage1_block0/conv3/kernel" in params,
    separable="update/gates2/kernel" in params,
    refine_blocks=_count("refine_", params),
  )
  return tuple(rule for rule in _rules(naming, form) if rule.ours in params)


def _count(before: str, names: Iterable[str]) -> int:
  """One more than the highest number that follows `before` in a name; 0 where none does."""
  found = (re.match(rf"{before}(\d{{1,3}})\b", name) for name in names)
  return max((int(match[1]) + 1 for match in found if match), default=0)


def _rules(naming: str, form: _Form) -> list[Rule]:
  made = []
  encoders = ("feature_encoder", "context_encoder")
  theirs = encoders if naming == "torchvision" else ("fnet", "cnet")
  for names in zip(theirs, encoders):
    made += _encoder(*names, naming, form)
  return made + {"raft": _raft, "torchvision": _torchvision, "sea_raft": _sea_raft}[naming](form)


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


def _norm(theirs: str, ours: str) -> list[Rule]:
  leaves = dict(weight="scale", bias="bias", running_mean="mean", running_var="var")
  return [Rule((f"{theirs}.{a}",), f"{ours}/batch/{b}") for a, b in leaves.items()]


def _encoder(theirs: str, ours: str, naming: str, form: _Form) -> list[Rule]:
  port = naming == "torchvision"
  norm_word = "bn" if naming == "sea_raft" else "norm"
  stem, stem_norm = ("convnormrelu.0", "convnormrelu.1") if port else ("conv1", f"{norm_word}1")
  out = {"raft": "conv2", "torchvision": "conv", "sea_raft": "final_conv"}[naming]
  count = 3 if form.bottleneck else 2
  made = _convolution(f"{theirs}.{stem}", f"{ours}/stem")
  made += _norm(f"{theirs}.{stem_norm}", f"{ours}/stem_norm")
  for stage, depth in enumerate(form.depths, start=1):
    for i in range(depth):
      block, mine = f"{theirs}.layer{stage}.{i}", f"{ours}/stage{stage}_block{i}"
      for k in range(1, count + 1):
        layer = f"{block}.convnormrelu{k}.0" if port else f"{block}.conv{k}"
        norm = f"{block}.convnormrelu{k}.1" if port else f"{block}.{norm_word}{k}"
        made += _convolution(layer, f"{mine}/conv{k}") + _norm(norm, f"{mine}/norm{k}")
      norm = f"{block}.downsample.1" if port else f"{block}.{norm_word}{count + 1}"
      made += _convolution(f"{block}.downsample.0", f"{mine}/skip")
      made += _norm(norm, f"{mine}/skip_norm")
  return made + _convolution(f"{theirs}.{out}", f"{ours}/out")


def _motion(prefix: str, end: str, words: tuple[str, str]) -> list[Rule]:
  made = []
  for word, ours in zip(words, ("corr", "flow")):
    for i in (1, 2):
      made += _convolution(f"{prefix}.{word}{i}{end}", f"motion_encoder/{ours}{i}")
  return made + _convolution(f"{prefix}.conv{end}", "motion_encoder/both")


def _gru(theirs: str, number: int) -> list[Rule]:
  """`theirs` has a place for the gate's letter."""
  made = []
  for letters, name in (("zr", "gates"), ("q", "candidate")):
    tensors = [theirs.format(letter) for letter in letters]
    parts = len(letters)
    bias = Joined(tuple(range(parts)), count=parts) if parts > 1 else Same()
    ours = f"update/{name}{number}"
    made.append(Rule(tuple(f"{t}.weight" for t in tensors), f"{ours}/kernel", Convolution(parts)))
    made.append(Rule(tuple(f"{t}.bias" for t in tensors), f"{ours}/bias", bias))
  return made


def _heads(flow: tuple[str, str], mask: tuple[str, str]) -> list[Rule]:
  made = []
  for i in (0, 1):
    made += _convolution(flow[i], f"flow_head/conv{i + 1}")
    made += _convolution(mask[i], f"upsample_head/conv{i + 1}")
  return made


def _raft(form: _Form) -> list[Rule]:
  top = "update_block"
  made = _motion(f"{top}.encoder", "", ("convc", "convf"))
  if form.separable:
    made += _gru(f"{top}.gru.conv{{}}1", 1) + _gru(f"{top}.gru.conv{{}}2", 2)
  else:
    made += _gru(f"{top}.gru.conv{{}}", 1)
  head, mask = f"{top}.flow_head", f"{top}.mask"
  return made + _heads((f"{head}.conv1", f"{head}.conv2"), (f"{mask}.0", f"{mask}.2"))


def _torchvision(form: _Form) -> list[Rule]:
  top = "update_block"
  made = _motion(f"{top}.motion_encoder", ".0", ("convcorr", "convflow"))
  for i in (1, 2) if form.separable else (1,):
    made += _gru(f"{top}.recurrent_block.convgru{i}.conv{{}}", i)
  head, mask = f"{top}.flow_head", "mask_predictor"
  return made + _heads((f"{head}.conv1", f"{head}.conv2"), (f"{mask}.convrelu.0", f"{mask}.conv"))


def _sea_raft(form: _Form) -> list[Rule]:
  made = _convolution("init_conv", "context_conv")
  made += _motion("update_block.encoder", "", ("convc", "convf"))
  for i in range(form.refine_blocks):
    theirs, ours = f"update_block.refine.{i}", f"refine_{i}"
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
  return made + _heads(("flow_head.0", "flow_head.2"), ("upsample_weight.0", "upsample_weight.2"))
