"""How an Opt-CWM release names its parts, told by the names in a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cwm_jax.pretrained import keymaps, two_stream_keys
from cwm_jax.pretrained.flow_predictors import FLOW_PREDICTOR
from cwm_jax.pretrained.learned_marks import PERTURBER
from cwm_jax.types import InputError

# What joint training puts before the names of its Psi-flow.
JOINT_FLOW_PREDICTOR = "recon_cwm_model."
_PSI_FLOW = f"{JOINT_FLOW_PREDICTOR}two_stream_vmae."
_PREFIXES = ("", "cwm_model.", "flow_predictor.cwm_model.")
_PATCHES = "encoder.patch_embed.proj.weight"


@dataclass(frozen=True)
class Naming:
  """How a release names a predictor, and a perturber and Psi-flow where it has them.

  Attributes:
    predictor: what stands before each of the predictor's names.
    perturber: what stands before each of the perturber's names; None where there is none.
    flow_predictor: what stands before each of Psi-flow's names; None where there is none.
    links: those of Psi-flow's encoder and of its decoder, of each block.
    learned_positions, key_bias, bridge: see `keymaps.predictor_rules`.
  """

  predictor: str = ""
  perturber: str | None = None
  flow_predictor: str | None = None
  links: Sequence[Sequence[str]] = ((), ())
  learned_positions: bool = True
  key_bias: bool = True
  bridge: bool = True

  def rules(self) -> tuple[keymaps.Rule, ...]:
    """The key map from this naming to a weights file of ours."""
    rules = keymaps.predictor_rules(
      prefix=self.predictor,
      learned_positions=self.learned_positions,
      key_bias=self.key_bias,
      bridge=self.bridge,
    )
    if self.perturber is not None:
      mark = keymaps.perturber_rules(prefix=self.perturber)
      rules += keymaps.with_prefix(mark, ours=f"{PERTURBER}/")
    if self.flow_predictor is not None:
      psi_flow = two_stream_keys.two_stream_rules(*self.links, prefix=self.flow_predictor)
      rules += keymaps.with_prefix(psi_flow, ours=f"{FLOW_PREDICTOR}/")
    return rules


def naming_of(names: Iterable[str], *, where: str) -> Naming:
  """Tells a release's naming by its names.

  Raises:
    InputError: no predictor among them.
  """
  names = set(names)
  for prefix in _PREFIXES:
    if f"{prefix}{_PATCHES}" in names:
      mark = prefix.removesuffix("cwm_model.") + "perturber."
      has_mark = bool(prefix) and any(name.startswith(mark) for name in names)
      psi_flow = [name[len(_PSI_FLOW) :] for name in names if name.startswith(_PSI_FLOW)]
      return Naming(
        predictor=prefix,
        perturber=mark if has_mark else None,
        flow_predictor=_PSI_FLOW if psi_flow else None,
        links=two_stream_keys.links_of(psi_flow),
        learned_positions=f"{prefix}encoder.pos_embed" in names,
        key_bias=f"{prefix}encoder.blocks.0.attn.k_bias" in names,
        bridge=f"{prefix}encoder_to_decoder.bias" in names,
      )
  some = ", ".join(sorted(names)[:3])[:200]
  raise InputError(f"{where} has the layout of no release that is known here (it begins: {some})")
