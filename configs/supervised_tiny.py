"""The student of distill_tiny.py on the exact flow of procedural scenes: the upper line.

python -m cwm_jax.main --config configs/supervised_tiny.py --workdir runs/supervised

The same network, augmentations, schedule and held-out scenes; points are drawn and their truth is
told, from as many scenes as there are steps for. Arguments are names of configs/flow_networks.py,
"student", or "runlocal" for a minute's trial.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import distill_tiny, flow_networks


def get_config(arg: str = "student") -> ConfigDict:
  c = distill_tiny.get_config("runlocal" if arg == "runlocal" else "")
  c.task = "supervised"
  c.data.sources.labels.weight = 0.0
  c.data.sources.scenes.weight = 1.0
  if arg not in ("student", "runlocal"):
    c.flow_network.update(flow_networks.network(arg), image_hw=())
    # Batch statistics are never taken: from scratch, the released sizes take another norm.
    c.flow_network.update(feature_norm="instance", context_norm="group")
    if c.flow_network.kind == "raft":
      c.distill.loss = "l1"
  return c
