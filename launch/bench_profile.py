"""Where the time of a run's traced steps went, by kind of work.

Run by `launch/bench profile WORKDIR`, on what `--config.profile_steps=N` has left there. Times are
of XLA's worker threads on a CPU, and of the kernels on an accelerator, all of them together.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from pathlib import Path

# The first pattern that an operation's name has says its kind. Attention that is not one fused
# kernel is products and a softmax.
_KINDS = (
  ("communication", r"all-?reduce|all-?gather|all-?to-?all|reduce-?scatter|permute|nccl"),
  ("attention", r"fmha|flash|cudnn.*attn"),
  ("matrix_products", r"ynn_fusion|dot|gemm|cublas|cutlass|convolution|conv_|matmul"),
  ("softmax", r"exponential|subtract_multiply|divide|maximum|softmax"),
  (
    "moving_data",
    r"copy|memcpy|memset|transpose|concatenate|slice|broadcast|pad|gather|iota|select",
  ),
)
# These hold others, which are counted themselves.
_WHOLES = re.compile(r"ThunkExecutor|ThreadPool|^while|^call|^end: ")


def main() -> int:
  """Prints the row."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("workdir", type=Path, help="of a run with --config.profile_steps")
  traces = sorted(parser.parse_args().workdir.rglob("*.xplane.pb"))
  if not traces:
    print("error: no trace there; train with --config.profile_steps=3", file=sys.stderr)
    return 2
  seconds, longest = collections.Counter(), collections.Counter()
  for name, spent in _operations(traces[-1]):
    kind = next((kind for kind, names in _KINDS if re.search(names, name)), "rest")
    seconds[kind] += spent
    longest[re.sub(r"[.\d]+$", "", name)] += spent
  total = sum(seconds.values())
  if not total:
    print(f"error: {traces[-1]} holds no operations", file=sys.stderr)
    return 2
  shares = {kind: round(spent / total, 3) for kind, spent in seconds.most_common()}
  most = {name: round(spent / total, 3) for name, spent in longest.most_common(8)}
  print(json.dumps(dict(measure="profile", seconds=round(total, 3), shares=shares, longest=most)))
  return 0


def _operations(trace: Path):
  """(name, seconds) of each operation in a trace."""
  from jax.profiler import ProfileData

  for plane in ProfileData.from_file(str(trace)).planes:
    for line in plane.lines:
      kernels = plane.name.startswith("/device:") and line.name.startswith(("Stream", "XLA Ops"))
      if not kernels and not re.search("XLAEigen|PjRtCpu", line.name):
        continue
      for event in line.events:
        if not _WHOLES.search(event.name):
          yield event.name, event.duration_ns / 1e9


if __name__ == "__main__":
  sys.exit(main())
