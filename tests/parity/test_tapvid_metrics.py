"""TAP-Vid metrics against values computed by the public evaluation code."""

import numpy as np
import pytest

from cwm_jax.evals import tapvid_metrics as tm


@pytest.mark.parametrize("mode", tm.QUERY_MODES)
def test_metrics_equal_the_stored_ones(cwm_goldens, mode):
  with np.load(cwm_goldens / "c8_tapvid_metrics.npz") as file:
    stored = {k.split("/", 1)[1]: file[k] for k in file.files if k.startswith(mode + "/")}
  want = {k.split("/")[1]: v for k, v in stored.items() if k.startswith("metric/")}
  videos = len(stored["query_points"])
  answers = [
    tm.compare(
      np.round(stored["query_points"][i, :, 0]).astype(int),
      stored["gt_tracks"][i],
      stored["gt_occluded"][i],
      stored["pred_tracks"][i],
      stored["pred_occluded"][i],
      query_mode=mode,
    )
    for i in range(videos)
  ]
  pooled = tm.summarise(tm.pool(answers), distance_at_query=True)
  # Distances of a batch come out pooled there.
  for ours, theirs in (("average_distance", "avg_distance"), ("median_distance",) * 2):
    np.testing.assert_allclose(pooled[ours], want[theirs][0], rtol=1e-12)
  named = {f"jaccard_{k}": f"jaccard_{k}" for k in tm.THRESHOLDS}
  named |= {f"within_{k}": f"pts_within_{k}" for k in tm.THRESHOLDS}
  named |= {f"occlusion_{kind}": f"occ_{kind}" for kind in ("tp", "fp", "fn")}
  named |= {"average_jaccard": "average_jaccard", "delta_avg": "average_pts_within_thresh"}
  named |= {"num_visible": "num_visible"}
  asked = [np.sum(~a.at_query) for a in answers]
  for i, answer in enumerate(answers):
    got = tm.summarise(answer)
    for ours, theirs in named.items():
      np.testing.assert_allclose(got[ours], want[theirs][i], rtol=1e-12, err_msg=ours)
    # The public code divides each video's right answers by the questions of the whole batch.
    share = asked[i] / sum(asked)
    np.testing.assert_allclose(
      got["occlusion_accuracy"] * share, want["occlusion_accuracy"][i], rtol=1e-12
    )
