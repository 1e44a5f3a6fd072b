"""The shipped tiny predictor, on procedural scenes and two CPU cores, in three stages.

python -m cwm_jax.main --config configs/pretrain_tiny.py:match --workdir runs/match
python -m cwm_jax.main --config configs/pretrain_tiny.py:move --workdir runs/move \
    --config.init_from runs/match
python -m cwm_jax.main --config configs/pretrain_tiny.py:worlds --workdir runs/worlds \
    --config.init_from runs/move

`match` makes finding patches of frame 2 in frame 1 the only thing that pays; its loss lies on a
plateau for 600 steps. `move` brings any displacement, sprites and whole scenes. `worlds` goes on at
64 x 64 pixels: rotary positions carry the weights over. Speed, hours and scores of the run that
made the shipped weights are in cwm_jax/weights/predictor-tiny.md. `:runlocal` is a minute's trial.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cwm_jax.configs import base


def get_config(arg: str = "match") -> ConfigDict:
  c = base.get_config()
  c.model.update(
    image_hw=(32, 32),
    patch=4,
    mask_ratio=0.75,
    positions="rotary",
    encoder_width=128,
    encoder_depth=4,
    encoder_heads=8,
    decoder_width=128,
    decoder_depth=3,
    decoder_heads=8,
  )
  c.total = "3e6 examples"
  c.optim.update(peak_lr=2e-3, warmup="200 steps", clip_norm=1.0)
  c.data.batch_size = 64
  c.log.update(every="50 steps", eval_every="500 steps", images_every="1000 steps")
  c.checkpoint.every = "500 steps"
  scenes = c.data.sources.scenes
  scenes.max_objects = 4
  if arg == "match":
    scenes.curriculum = ((0, "patch_shifts"),)
    c.stop_after = "1200 steps"
  elif arg == "move":
    c.seed, scenes.first_seed = 1, 10_000_000
    c.optim.update(warmup="100 steps")
    scenes.curriculum = (
      (
        0,
        (
          ("patch_shifts", 1.0),
          ("half_patch_shifts", 1.5),
          ("pixel_shifts", 1.5),
          ("shifts", 1.0),
        ),
      ),
    )
    c.stop_after = "850 steps"
  elif arg == "context":
    c.seed, scenes.first_seed = 2, 20_000_000
    c.model.context = 4
    c.optim.update(warmup="100 steps")
    scenes.curriculum = (
      (
        0,
        (("patch_shifts", 1.0), ("pixel_shifts", 1.0), ("smooth_shifts", 2.0), ("worlds", 1.0)),
      ),
    )
  elif arg == "stray":
    c.seed, scenes.first_seed = 4, 40_000_000
    c.model.context = 4
    c.optim.update(warmup="100 steps")
    scenes.fade = 4000
    scenes.curriculum = (
      (0, (("strays_3", 2.0), ("strays_2", 2.0), ("strays_1", 0.5), ("patch_shifts", 0.5))),
      (12_000, (("strays_4", 2.0), ("strays_3", 2.0), ("strays_2", 1.0))),
      (28_000, (("strays_4", 2.0), ("smooth_shifts", 1.0), ("worlds", 2.0))),
    )
  elif arg == "view":
    c.seed, scenes.first_seed = 5, 50_000_000
    c.model.context = 4
    c.optim.update(warmup="50 steps")
    scenes.curriculum = (
      (
        0,
        (
          ("strays_4", 2.0),
          ("smooth_shifts", 2.0),
          ("views", 2.0),
          ("movers", 1.5),
          ("worlds", 0.5),
        ),
      ),
    )
  elif arg == "worlds":
    c.seed, scenes.first_seed = 6, 60_000_000
    c.total = "195e3 examples"
    c.model.context = 4
    c.optim.update(warmup="50 steps")
    scenes.curriculum = (
      (0, (("smooth_shifts", 1.5), ("views", 2.5), ("movers", 2.5), ("worlds", 2.5))),
      (60_000, (("smooth_shifts", 1.0), ("views", 2.0), ("movers", 2.0), ("worlds", 4.0))),
      (120_000, (("views", 1.0), ("movers", 1.0), ("worlds", 6.0))),
    )
  elif arg == "large":
    c.seed, scenes.first_seed = 8, 80_000_000
    c.total = "30e3 examples"
    c.model.update(context=4, image_hw=(64, 64))
    c.data.batch_size = 16
    c.optim.update(peak_lr=1.5e-3, warmup="50 steps")
    scenes.max_objects = 6
    scenes.curriculum = ((0, (("near_views", 3.0), ("near_movers", 3.0), ("worlds", 3.0))),)
  elif arg == "runlocal":
    c.total = "20 steps"
    c.data.batch_size = 8
    c.model.update(encoder_depth=1, decoder_depth=1)
    c.optim.warmup = "5 steps"
    c.log.every = "5 steps"
    scenes.curriculum = ((0, "patch_shifts"),)
  else:
    raise ValueError(f"unknown stage {arg!r}; choose match, move, worlds or runlocal")
  return c
