"""How the parameters of public PyTorch releases are named and laid out, and how ours are.

A release is described by a tuple of `Rule`s, and read both ways by two functions: `to_params` makes
our parameters from a state dict, `to_state` the state dict from our parameters. A rule takes one or
several of their tensors to one of ours; "{i}" in its names stands for the number of a block, whose
tensors are stacked along a new first axis (ours are scanned). Both ways are strict: every tensor is
named by a rule, and every rule finds its tensors.

A further release needs a further tuple of rules, and a `Layout` where its layouts are new.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cwm_jax.pretrained import weights
from cwm_jax.pretrained.layouts import (
  Joined,
  Layout,
  NoBias,
  PatchEmbedding,
  Same,
  Transposed,
  Unbatched,
)
from cwm_jax.pretrained.merge import check_names
from cwm_jax.types import InputError


@dataclass(frozen=True)
class Rule:
  """Their tensors that make one array of ours.

  Attributes:
    theirs: names in their state dict; "{i}" stands for the number of a block.
    ours: '/'-joined path of our parameter.
    layout: how the numbers are laid out anew.
    blocks: the numbers that "{i}" stands for; None for all from 0 to the highest there is.
  """

  theirs: tuple[str, ...]
  ours: str
  layout: Layout = field(default_factory=Same)
  blocks: range | None = None


def predictor_rules(
  *, prefix: str = "", learned_positions: bool = True, key_bias: bool = True, bridge: bool = True
) -> tuple[Rule, ...]:
  """The two-frame predictors of the public releases, as `models.predictor.Predictor` has them.

  Args:
    prefix: what stands before each of their names, such as "cwm_model.".
    learned_positions: False where the release's position tables are fixed and thus not stored.
    key_bias: False where the release's keys have no bias.
    bridge: False where the step from encoder to decoder has no bias.
  """
  rules = [
    Rule(("encoder.patch_embed.proj.weight",), "patch_embed/kernel", PatchEmbedding()),
    Rule(("encoder.patch_embed.proj.bias",), "patch_embed/bias"),
    Rule(("mask_token",), "mask_token", Unbatched(2)),
    *norm("encoder.norm", "encoder_norm"),
    Rule(("encoder_to_decoder.weight",), "encoder_to_decoder/kernel", Transposed()),
    *norm("decoder.norm", "decoder_norm"),
    *linear("decoder.head", "head"),
  ]
  if bridge:
    rules.append(Rule(("encoder_to_decoder.bias",), "encoder_to_decoder/bias"))
  else:
    rules.append(Rule(("encoder_to_decoder.weight",), "encoder_to_decoder/bias", NoBias()))
  if learned_positions:
    rules.append(Rule(("encoder.pos_embed",), "encoder_positions", Unbatched()))
    rules.append(Rule(("pos_embed",), "decoder_positions", Unbatched()))
  names, parts = ("q_bias", "k_bias", "v_bias"), (0, 1, 2)
  if not key_bias:
    names, parts = ("q_bias", "v_bias"), (0, 2)
  for half in ("encoder", "decoder"):
    block, ours = f"{half}.blocks.{{i}}", f"{half}/blocks"
    rules += [
      *norm(f"{block}.norm1", f"{ours}/norm1"),
      Rule((f"{block}.attn.qkv.weight",), f"{ours}/attn/qkv/kernel", Transposed()),
      Rule(
        tuple(f"{block}.attn.{name}" for name in names),
        f"{ours}/attn/qkv/bias",
        Joined(parts, count=3),
      ),
      *linear(f"{block}.attn.proj", f"{ours}/attn/proj"),
      *norm(f"{block}.norm2", f"{ours}/norm2"),
      *linear(f"{block}.mlp.fc1", f"{ours}/fc1"),
      *linear(f"{block}.mlp.fc2", f"{ours}/fc2"),
    ]
  return with_prefix(rules, prefix)


def perturber_rules(*, prefix: str = "") -> tuple[Rule, ...]:
  """The perturber's MLP, as `models.perturber.Perturber` has it.

  Args:
    prefix: what stands before each of their names, such as "perturber.".
  """
  rules = []
  for layer in (1, 2, 3):
    first = 3 * (layer - 1)  # linear, norm and activation are numbered through
    rules += linear(f"nn.mlp.{first}", f"fc{layer}")
    rules += norm(f"nn.mlp.{first + 1}", f"norm{layer}")
  return with_prefix(rules, prefix)


def with_prefix(rules: Sequence[Rule], theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
  """The rules with something put before all names of either side."""
  return tuple(
    replace(rule, theirs=tuple(theirs + name for name in rule.theirs), ours=ours + rule.ours)
    for rule in rules
  )


def to_params(
  state: dict[str, np.ndarray], rules: Sequence[Rule], *, where: str = "the state dict"
) -> dict[str, Any]:
  """Our parameters from a PyTorch state dict.

  Args:
    state: their name -> array, of any float dtype.
    rules: the release's rules.
    where: names the state's origin in messages.

  Returns:
    A nested dict of float32 arrays. Whether they fit a model is `weights.check_fit`'s to say.

  Raises:
    InputError: tensors that no rule names, rules without their tensors (both are listed), or a
      tensor whose shape its rule cannot take.
  """
  flat = {}
  for rule, arrays in _laid_out(state, rules, where):
    # One after the other: a stack of transposed tensors is laid out anew, and two copies of all of
    # them would not fit where one does.
    stacked = np.stack(arrays) if _is_stacked(rule) else arrays[0]
    flat[rule.ours] = np.ascontiguousarray(stacked, np.float32)
  return weights.unflatten(flat)


def to_shapes(
  shapes: dict[str, tuple[int, ...]], rules: Sequence[Rule], *, where: str = "the state dict"
) -> dict[str, tuple[int, ...]]:
  """The shapes of what `to_params` would make, without making it.

  Args:
    shapes: their name -> shape.
    rules, where: as `to_params`.

  Returns:
    '/'-joined path of our parameter -> shape.

  Raises:
    InputError: as `to_params`.
  """
  # One number seen everywhere: an array of any shape that takes no memory.
  state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
  return {
    rule.ours: (len(arrays), *arrays[0].shape) if _is_stacked(rule) else arrays[0].shape
    for rule, arrays in _laid_out(state, rules, where)
  }


def to_state(
  params: dict[str, Any], rules: Sequence[Rule], *, where: str = "the parameters"
) -> dict[str, np.ndarray]:
  """A PyTorch state dict from our parameters; the inverse of `to_params`.

  Args:
    params: nested dict of arrays.
    rules: the release's rules.
    where: names the parameters' origin in messages.

  Returns:
    Their name -> float32 array.

  Raises:
    InputError: parameters that no rule names, rules without their parameter (both are listed), or
      numbers that the release has no place for.
  """
  flat = {name: np.asarray(value, np.float32) for name, value in weights.flatten(params).items()}
  check_names(dict.fromkeys(flat, ()), {rule.ours: () for rule in rules}, where=where)
  state = {}
  for rule in rules:
    blocks = _blocks_of(rule, flat[rule.ours], where)
    for number, array in blocks:
      try:
        theirs = rule.layout.theirs(array)
      except InputError as error:
        raise InputError(f"{where}: {rule.ours!r} {error}") from None
      state.update(zip(_names(rule, number), map(np.ascontiguousarray, theirs)))
  return state


def linear(theirs: str, ours: str) -> list[Rule]:
  """A linear layer with a bias."""
  return [
    Rule((f"{theirs}.weight",), f"{ours}/kernel", Transposed()),
    Rule((f"{theirs}.bias",), f"{ours}/bias"),
  ]


def norm(theirs: str, ours: str) -> list[Rule]:
  """A layer norm."""
  return [Rule((f"{theirs}.weight",), f"{ours}/scale"), Rule((f"{theirs}.bias",), f"{ours}/bias")]


def _is_stacked(rule: Rule) -> bool:
  return "{i}" in rule.theirs[0]


def _names(rule: Rule, number: int | None) -> list[str]:
  return [name.replace("{i}", str(number)) for name in rule.theirs]


def _blocks(rule: Rule, state: dict[str, np.ndarray]) -> Sequence[int | None]:
  """The numbers of the blocks that a rule speaks of: up to the highest that the state has at all.

  Other rules' tensors count too, so that a block that lacks this rule's is told as incomplete.
  """
  if not _is_stacked(rule):
    return [None]
  if rule.blocks is not None:
    return rule.blocks
  pattern = re.compile(re.escape(rule.theirs[0].split("{i}")[0]) + r"(\d+)\b")
  found = [match[1] for name in state if (match := pattern.match(name))]
  # A number beyond the count of tensors cannot be one of a series without gaps; leaving it out
  # keeps a hostile name from making a list of a billion missing ones.
  numbers = [int(text) for text in found if len(text) < 7 and int(text) < len(state)]
  return range(max(numbers, default=0) + 1)


def _blocks_of(
  rule: Rule, array: np.ndarray, where: str
) -> Iterable[tuple[int | None, np.ndarray]]:
  """Ours taken apart: each block's number, and its array."""
  if not _is_stacked(rule):
    return [(None, array)]
  if rule.blocks is None:
    return enumerate(array)
  if len(array) != len(rule.blocks):
    raise InputError(f"{where}: {rule.ours!r} is of {len(array)} blocks, not {len(rule.blocks)}")
  return zip(rule.blocks, array)


def _laid_out(
  state: dict[str, np.ndarray], rules: Sequence[Rule], where: str
) -> Iterator[tuple[Rule, list[np.ndarray]]]:
  """Each rule with its arrays, one a block; everything was accounted for before the first."""
  blocks = {rule.ours: _blocks(rule, state) for rule in rules}
  expected = {
    name: () for rule in rules for number in blocks[rule.ours] for name in _names(rule, number)
  }
  check_names(dict.fromkeys(state, ()), expected, where=where)
  for rule in rules:
    arrays = [_lay_out(rule, number, state, where) for number in blocks[rule.ours]]
    if len({array.shape for array in arrays}) > 1:
      raise InputError(f"{where}: the blocks of {rule.theirs[0]!r} differ in shape")
    yield rule, arrays


def _lay_out(
  rule: Rule, number: int | None, state: dict[str, np.ndarray], where: str
) -> np.ndarray:
  names = _names(rule, number)
  try:
    return rule.layout.ours([state[name] for name in names])
  except InputError as error:
    raise InputError(f"{where}: {names[0]!r} {error}") from None
  except ValueError:
    # NumPy's own words speak of the layout's steps, which mean nothing to whoever has the file.
    shape = state[names[0]].shape
    raise InputError(f"{where}: {names[0]!r} has shape {shape}, which no model has") from None
