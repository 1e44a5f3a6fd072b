"""The tiny predictor on procedural scenes and two CPU cores, stage by stage.

python -m cwm_jax.main --config configs/pretrain_tiny.py:match --workdir runs/match
python -m cwm_jax.main --config configs/pretrain_tiny.py:stray --workdir runs/stray \
    --config.init_from=runs/match        # and so on: view, worlds, large, far

match   whole-patch shifts of noise: finding patches of frame 2 in frame 1 is all that pays; its
        loss lies on a plateau for 1,000 steps and then falls.
stray   shifts stray from whole patches, a little more at each level. Any displacement at once,
        after `match`, taught nothing in 900 steps; by degrees, level 2 took 125.
view    natural textures under a moving camera, and the first movers.
worlds  whole scenes.
large   64 x 64 pixels: rotary positions carry the weights over. A cosine to zero.
far     the same with large motion: what moved by more than 8 pixels was still lost.
double  128 x 128 pixels, the patches as they were: four times as many of them, finer in the scene.
        As the paper goes from 256 to 512: positions are resized, and a mark's size doubles with it.

The next stage may begin when `eval/*/median_share` of the last preset is below about 0.3. Speed: 30
pairs/s at 64 x 64 on two CPU cores (launch/README.md, "What was measured"). What the shipped
weights went through, and their scores, is in cwm_jax/weights/predictor-tiny.md. `:runlocal` is a
minute's trial.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base

CURRICULA = {
  "match": ((0, "patch_shifts"),),
  "stray": (
    (0, (("strays_1", 3.0), ("patch_shifts", 1.0))),
    (16_000, (("strays_2", 2.0), ("strays_1", 1.0), ("patch_shifts", 0.5))),
    (48_000, (("strays_3", 2.0), ("strays_2", 2.0), ("strays_1", 0.5), ("patch_shifts", 0.5))),
    (96_000, (("strays_4", 2.0), ("strays_3", 2.0), ("strays_2", 1.0))),
  ),
  "view": (
    (0, (("strays_4", 2.0), ("smooth_shifts", 2.0), ("views", 2.0), ("movers", 1.5))),
    (80_000, (("smooth_shifts", 1.0), ("views", 3.0), ("movers", 2.5), ("worlds", 0.5))),
  ),
  "worlds": (
    (0, (("smooth_shifts", 1.5), ("views", 2.5), ("movers", 2.5), ("worlds", 2.5))),
    (60_000, (("smooth_shifts", 1.0), ("views", 2.0), ("movers", 2.0), ("worlds", 4.0))),
    (120_000, (("views", 1.0), ("movers", 1.0), ("worlds", 6.0))),
  ),
  "large": ((0, (("near_views", 3.0), ("near_movers", 3.0), ("worlds", 3.0))),),
  "far": (
    (
      0,
      (
        *(("near_views", 1.0), ("near_movers", 1.0)),
        *(("views", 2.0), ("movers", 2.0), ("worlds", 4.0)),
      ),
    ),
  ),
}
CURRICULA["double"] = CURRICULA["far"]
CURRICULA["runlocal"] = CURRICULA["match"]


def get_config(arg: str = "match") -> ConfigDict:
  if arg not in CURRICULA:
    raise ValueError(f"unknown stage {arg!r}; choose one of {', '.join(CURRICULA)}")
  c = base.get_config()
  # Every stage draws scenes that no other stage draws.
  c.seed = list(CURRICULA).index(arg)
  c.total = "3e6 examples"
  c.model.update(
    image_hw=(32, 32),
    patch=4,
    mask_ratio=0.75,
    positions="rotary",
    context=4,
    encoder_width=128,
    encoder_depth=4,
    encoder_heads=8,
    decoder_width=128,
    decoder_depth=3,
    decoder_heads=8,
  )
  c.optim.update(peak_lr=2e-3, warmup="100 steps", clip_norm=1.0)
  c.data.batch_size = 64
  c.cpu_devices = 2
  c.data.sources.scenes.update(
    first_seed=(c.seed + 1) * 10_000_000,
    curriculum=CURRICULA[arg],
    fade=4000,
    max_objects=4,
  )
  c.log.update(every="50 steps", eval_every="250 steps", images_every="1000 steps")
  c.checkpoint.every = "500 steps"
  if arg in ("large", "far"):
    c.total = "100e3 examples"
    c.model.image_hw = (64, 64)
    c.data.batch_size = 16
    c.data.sources.scenes.max_objects = 6
    c.optim.peak_lr = 1.5e-3
  elif arg == "double":
    c.total = "20e3 examples"
    c.model.update(image_hw=(128, 128), positions_hw=(16, 16))
    c.data.batch_size = 4
    c.data.sources.scenes.max_objects = 6
    c.optim.update(peak_lr=5e-4, warmup="50 steps")
    # A question takes five times as long as at 64 x 64: all 64 scenes would take half an hour.
    c.log.update(eval_every="1000 steps", eval_scenes=8)
  elif arg == "runlocal":
    c.total = "20 steps"
    c.data.batch_size = 8
    c.model.update(encoder_depth=1, decoder_depth=1)
    c.optim.warmup = "5 steps"
    c.log.every = "5 steps"
  return c
