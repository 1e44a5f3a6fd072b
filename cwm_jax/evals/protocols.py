"""The conventions under which published TAP-Vid tables were made, by name.

The questions are the same in all of them; what differs is what counts, and that moves the average
distance by tens of percent. Compare a number only with numbers of its own protocol.
"""

from __future__ import annotations

from typing import NamedTuple

from cwm_jax.types import InputError

QUERIES = ("first", "strided", "cfg")
QUERY_FRAMES = ("out", "given", "asked")


class Protocol(NamedTuple):
  """What is asked and what counts.

  queries:      "first" (each point from its first visible frame), "strided" (from every fifth frame
                in which it is visible, or another stride), "cfg" (from every frame in which it is
                visible about the one a constant gap later).
  query_frame:  the query's own frame in average and median distance: "out" (not counted), "given"
                (counted as 0), or "asked" (the tracker answers there too). It never counts for
                thresholds, Jaccard and occlusion.
  truth_hidden: the true occlusion stands in for the predicted one, so occlusion accuracy is 1 and
                Jaccard measures places only.
  bare_indices: places are pixel indices: a query is rounded down to its pixel, and an answer loses
                the half pixel from the pixel's corner to its centre.
  nan_spreads:  a video that is asked about and has no number makes the mean over videos NaN, and
                occlusion F1 goes by precision and recall, so that it is NaN without a true
                positive. Otherwise such videos are left out, and F1 is then 0.
  about:        which tables are made so.
  """

  queries: str
  query_frame: str = "out"
  truth_hidden: bool = False
  bare_indices: bool = False
  nan_spreads: bool = False
  about: str = ""


PROTOCOLS = {
  "first": Protocol("first", about="TAP-Vid's query-first tables: AJ, delta, OA."),
  "strided": Protocol("strided", about="TAP-Vid's query-strided tables: AJ, delta, OA."),
  "cfg": Protocol("cfg", about="Constant frame gap with continuous places; the house's own."),
  "release_first": Protocol(
    "first",
    query_frame="asked",
    bare_indices=True,
    nan_spreads=True,
    about="Opt-CWM's released evaluation, First: AJ 47.53, AD 8.73, delta 64.83, OA 80.87, "
    "OF1 60.74 on DAVIS.",
  ),
  "release_cfg": Protocol(
    "cfg",
    query_frame="given",
    bare_indices=True,
    nan_spreads=True,
    about="Opt-CWM's released evaluation, CFG-5: AJ 69.53, AD 1.19, delta 83.15, OA 88.85, "
    "OF1 44.17 on DAVIS. The query's own frame counts as an error of 0, which halves AD or more.",
  ),
  "paper_first": Protocol(
    "first",
    bare_indices=True,
    about="Opt-CWM's paper, VFG (AD 11.78, MD 3.63, delta 52.30 for its best on DAVIS) and its "
    "ablations: it counts every later visible frame.",
  ),
  "paper_cfg": Protocol(
    "cfg",
    bare_indices=True,
    about="Opt-CWM's paper, CFG-5 (AD 2.09, delta 69.18 for its best on DAVIS): the pair's later "
    "frame alone.",
  ),
  "doduo_first": Protocol(
    "first",
    query_frame="asked",
    truth_hidden=True,
    nan_spreads=True,
    about="Doduo's evaluation (its rows, and DINO's nearest neighbours, in other papers' tables): "
    "true occlusion, and AD with the query's own frame.",
  ),
}


def find(name: str) -> Protocol:
  """A protocol by its name.

  Raises:
    InputError: an unknown name.
  """
  if name not in PROTOCOLS:
    raise InputError(f"there is no protocol {name!r}; choose one of {', '.join(PROTOCOLS)}")
  return PROTOCOLS[name]


def title(name: str, *, frame_gap: int, query_stride: int) -> str:
  """The protocol's name with the number that belongs to it: "cfg-5", "strided-5", "first"."""
  number = {"cfg": frame_gap, "strided": query_stride}.get(find(name).queries)
  return name if number is None else f"{name}-{number}"
