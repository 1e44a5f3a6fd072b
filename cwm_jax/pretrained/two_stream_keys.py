"""How the public release names Psi-flow, its two-stream predictor, and how we do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cwm_jax.models import two_stream
from cwm_jax.pretrained.keymaps import Rule, linear, norm, with_prefix
from cwm_jax.pretrained.layouts import PatchEmbedding, Transposed, Unbatched

_ENCODER, _DECODER = "encoder.two_stream_transformer.blocks", "decoder.blocks"
_STREAMS = ("primary", "secondary")
_CROSS = "cross_attn_{}_onto_{}_layers"
_RGB, _RGB_AND_FLOW = 3, 5


def two_stream_rules(
  encoder_links: Sequence[str], decoder_links: Sequence[str], *, prefix: str = ""
) -> tuple[Rule, ...]:
  """Psi-flow of the release, as `models.flow_predictor.FlowConditionedPredictor` has it.

  Args:
    encoder_links, decoder_links: of each block; see `models.two_stream`.
    prefix: what stands before each of their names, such as "recon_cwm_model.two_stream_vmae.".
  """
  rules = [
    *norm("decoder.output_layers.norm_primary", "decoder_norm"),
    *linear("decoder.output_layers.head_primary", "head"),
  ]
  for stream, channels in (("primary", _RGB), ("secondary", _RGB_AND_FLOW)):
    embed = f"encoder.patch_embed_{stream}.proj"
    rules += [
      Rule((f"{embed}.weight",), f"{stream}_embed/kernel", PatchEmbedding(channels)),
      Rule((f"{embed}.bias",), f"{stream}_embed/bias"),
      *norm(f"encoder.{stream}_norm", f"{stream}_norm"),
      Rule((f"encoder_to_decoder_{stream}.weight",), f"{stream}_bridge/kernel", Transposed()),
      Rule((f"mask_token_{stream}",), f"{stream}_mask_token", Unbatched(2)),
    ]
  for half, theirs, links in (
    ("encoder", _ENCODER, encoder_links),
    ("decoder", _DECODER, decoder_links),
  ):
    for kind, numbers in two_stream.runs(links):
      ours = f"{half}/{two_stream.run_name(numbers)}"
      block = _block_rules(f"{theirs}.{{i}}", ours, two_stream.parse_links(kind))
      rules += [replace(rule, blocks=numbers) for rule in block]
  return with_prefix(rules, prefix)


def links_of(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """(encoder's, decoder's) links of each block, told by the names of a state dict without prefix.

  What a block lacks has no tensors; a block without any cannot be told from one that is not there.
  """
  return _links_in(names := set(names), _ENCODER), _links_in(names, _DECODER)


def _links_in(names: set[str], blocks: str) -> tuple[str, ...]:
  found: dict[int, set[str]] = {}
  for name in names:
    if match := re.match(re.escape(blocks) + r"\.(\d{1,4})\.(\w+)\.", name):
      found.setdefault(int(match[1]), set()).add(match[2])
  links = []
  for number in range(max(found, default=-1) + 1):
    parts = found.get(number, set())
    left, right = ("o" if f"self_attn_layers_{s}" in parts else "_" for s in _STREAMS)
    onto_left = "<" if _CROSS.format("secondary", "primary") in parts else ""
    onto_right = ">" if _CROSS.format("primary", "secondary") in parts else ""
    links.append(f"{left}{onto_left}-{onto_right}{right}")
  return tuple(links)


def _block_rules(theirs: str, ours: str, links: two_stream.Links) -> list[Rule]:
  rules = []
  for stream, present in (("primary", links.primary), ("secondary", links.secondary)):
    layers, mine = f"{theirs}.self_attn_layers_{stream}", f"{ours}/{stream}"
    if present:
      rules += [
        *norm(f"{layers}.norm_before_self_attn", f"{mine}_norm1"),
        *linear(f"{layers}.self_attn.qkv", f"{mine}_attn/qkv"),
        *linear(f"{layers}.self_attn.proj", f"{mine}_attn/proj"),
        *norm(f"{layers}.norm_before_mlp", f"{mine}_norm2"),
        *linear(f"{layers}.mlp.fc1", f"{mine}_fc1"),
        *linear(f"{layers}.mlp.fc2", f"{mine}_fc2"),
      ]
  for source, target, present in (
    ("secondary", "primary", links.onto_primary),
    ("primary", "secondary", links.onto_secondary),
  ):
    if present:
      layers, mine = f"{theirs}.{_CROSS.format(source, target)}", f"{ours}/onto_{target}"
      rules += linear(f"{layers}.cross_attn.proj", f"{mine}/proj")
      for part in "qkv":
        rules += norm(f"{layers}.norm_before_cross_attn_{part}", f"{mine}/norm_{part}")
        rules += linear(f"{layers}.cross_attn.qkv.{part}", f"{mine}/{part}")
  return rules
