"""Every key of every job, with its default. Other configs import this one and change a few keys."""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.job = "train"  # train | evaluate | label | prepare | study
  c.task = "pretrain"  # pretrain | joint | distill | supervised: which file of cwm_jax/tasks
  c.seed = 0
  c.total = "1000 steps"  # steps, examples, epochs: how long to train; fixes the schedules
  c.stop_after = ""  # leave early but cleanly: "8 minutes", "500 steps"; "" runs to the end
  c.init_from = ""  # a workdir or weights file whose parameters start this run; "" for scratch

  c.model = m = ConfigDict()
  m.image_hw = (256, 256)  # pixels the predictor sees
  m.patch = 8
  m.mask_ratio = 0.9  # share of frame 2's patches that is hidden
  m.masking = "drop"  # drop: the encoder sees visible tokens only | token: all, some replaced
  m.positions = "learned"  # learned | rotary (with fixed sine tables) | sine (of a token's number)
  m.positions_hw = ()  # grid that positions are made for, and resized from; () is image_hw / patch
  m.encoder_width, m.encoder_depth, m.encoder_heads = 768, 12, 12
  m.decoder_width, m.decoder_depth, m.decoder_heads = 384, 4, 6
  m.mlp_ratio = 4.0
  m.context = 0  # pixels round each patch of frame 1 that its token sees too
  m.dtype = "float32"  # compute dtype: float32 | bfloat16; parameters stay float32
  m.attention_dtype = ""  # that of attention; "" is dtype's. Matching needs more than the rest
  m.attention_impl = ""  # "" takes the fastest for the device; einsum | xla | cudnn
  m.remat = "none"  # none | dots | full: what the backward pass recomputes

  # Psi-flow, which predicts frame 2 from frame 1 and the flow of a few points.
  c.flow_predictor = f = ConfigDict()
  # single: one stack, quick to train | two_stream: the release's | moved: begins as the frozen
  # predictor, of which it takes sizes, patch and parameters; it is told moved patches | file: the
  # one that a converted release's joint.weights holds, as it is.
  f.kind = "single"
  f.patch = 8
  f.mlp_ratio = 4.0
  f.dtype = "float32"  # as in model; so are the next two
  f.attention_impl = ""
  f.remat = "none"
  f.single = ConfigDict(dict(width=192, depth=6, heads=6))
  f.single.context = 0  # pixels round each patch that its token sees too
  f.two_stream = t = ConfigDict()
  t.setting = "release"  # release: normalises twice, one head across streams | plain: neither
  t.grid_hw = ()  # the one grid of patches it takes; () takes any, but weights go with one
  t.encoder_width, t.encoder_heads = 768, 12
  t.decoder_width, t.decoder_heads = 384, 6
  # Of each block; models/two_stream.py says how to read them.
  t.encoder_links = ("o<->o", "o-_", "o-_", "o-_") * 3
  t.decoder_links = ("o<->o", "o<-_", "o-_", "o-_")

  # The learned mark's network, and how large its marks are.
  c.perturber = r = ConfigDict()
  r.hidden_width = 512
  r.init = "white"  # white (the channels coincide at first) | plain | file
  r.file = ""  # mark file, or weights file with a learned mark, for init = "file"
  r.size = 0  # side of the mark's grid, pixels; 0 takes 20 / 256 of the image, less by `scale`
  r.scale = 1  # the predictor's image is so many times larger than the one that marks are for
  r.reach = 1.0  # how far beside it may lie, as a share of half its grid
  r.on_pixel = True  # the mark lies on the query's pixel, as the release's; False: on the query

  # Joint training of perturber and Psi-flow through a frozen predictor, which brings its own
  # settings: `model` is not read.
  c.joint = j = ConfigDict()
  j.weights = ""  # the predictor's weights file, or a release's name; "" takes the shipped one
  j.dtype = ""  # compute dtype of the predictor; "" takes the file's own
  j.image_hw = ()  # pixels of the frames, as Psi-flow sees them; () takes the predictor's
  j.num_points = 8  # queries a pair
  j.query = "centre"  # centre | anywhere in its patch
  j.masks = "point"  # point: masks of its own for each | shared by the points of a pair
  j.num_masks = 1  # a point
  j.mask_ratio = 0.0  # 0 takes what the predictor was trained with
  j.inverse_temperature = 200.0  # of the soft-argmax
  j.order, j.average = "release", "hidden"  # how several masks are averaged; see evaluate
  j.protocol = "half_pixel"  # half_pixel | release: coordinates and resizes as the public code's
  j.points_at_once = 1  # of each pair; more is quicker on an accelerator and takes more memory

  # RAFT or SEA-RAFT; configs/flow_networks.py has the released sizes by name.
  c.flow_network = w = ConfigDict()
  w.kind = "none"  # none | raft | sea_raft
  w.stem_width, w.widths, w.depths = 64, (64, 96, 128), (2, 2, 2)  # of both encoders
  w.block = "residual"  # residual | bottleneck
  w.feature_norm = "instance"  # batch (stored statistics, never updated) | instance | group | none
  w.context_norm = "batch"
  w.feature_width, w.hidden_width, w.context_width = 256, 128, 128
  w.corr_widths, w.flow_widths, w.motion_width = (256, 192), (128, 64), 128  # motion encoder
  w.head_width = 256
  w.radius, w.levels = 4, 4  # of correlation windows, of their pyramid
  w.iterations = 12
  w.gru = "separable"  # raft only: separable | square
  w.upsampling = "convex"  # raft only: convex | bilinear
  w.refine_blocks = 2  # sea_raft only: ConvNeXt blocks of an iteration
  w.correlation = "auto"  # all_pairs | on_demand (less memory, slower) | auto: by the frames' size
  w.padding = "split"  # to multiples of 8: split between both sides | bottom: rows only below
  w.scale = 0  # the network sees frames 2^scale times their size
  w.image_hw = ()  # or at this size, whatever theirs
  w.remat = False  # recompute each iteration in the backward pass
  w.dtype = "float32"

  c.pretrain = p = ConfigDict()
  p.loss_on = "hidden"  # hidden | all patches of frame 2
  p.target = "raw"  # raw | normalised: per-patch zero mean, unit variance, without colours

  # Training of `flow_network` on flow at points of pairs of `label.image_hw`: distill on labels of
  # data.sources.labels, filtered as `label` says; supervised on the truth of data.sources.scenes.
  c.distill = v = ConfigDict()
  v.loss = "laplace"  # laplace (sea_raft's mixture) | l1
  v.gamma = 0.85  # weight of an estimate against that of the next one
  v.points = 256  # supervised only: a pair
  v.augmented = True
  # See cwm_jax/tasks/augment.py.
  v.augment = ConfigDict(dict(turn_over=True, turn=0.15, zoom=0.15, shift=0.05, motion=0.08))
  v.augment.update(light=0.15, noise=0.02)

  c.optim = o = ConfigDict()
  o.peak_lr = 1.5e-4  # at batch 256 when scale_lr, else as it stands
  o.scale_lr = False  # multiply by batch / 256
  o.schedule = "cosine"  # cosine | one_cycle (straight up from 1/25 of the peak, straight down)
  o.final_lr_ratio = 0.0  # end of the schedule, as a share of the peak
  o.warmup = "0 steps"
  o.warmup_from_zero = False  # the first update has rate 0, as in the release; else one step's
  o.b1, o.b2, o.eps = 0.9, 0.95, 1e-8
  o.weight_decay = 0.05
  o.decay_exclude = r"bias|scale|positions|mask_token"  # paths that are never decayed
  # ((regex, share of the rate, duration of waiting), ...), the first that matches a path.
  o.slow = ()
  o.freeze = ""  # regex of paths that are never updated
  o.clip_norm = 0.0  # global gradient norm; 0 never clips
  o.accumulate = 1  # micro-batches a step
  o.ema_decay = 0.0  # 0 keeps no average

  c.data = d = ConfigDict()
  d.batch_size = 64  # pairs a step, all devices and processes together
  d.num_workers = 0  # Grain worker processes in each process
  d.prefetch = 2  # batches made ahead
  d.crop = "random"  # random | centre | none, of video frames
  d.flip = True  # mirror video pairs left to right at random
  d.epoch_examples = 0  # size of an epoch for "epochs" durations; 0 takes the sources' own
  # Sources of a mixture: a batch comes from one source, drawn by weight. Weight 0 is not opened.
  d.sources = s = ConfigDict()
  s.scenes = ConfigDict(
    dict(
      weight=1.0,
      first_seed=1_000_000,  # scene i of the run has seed first_seed + i; test sets lie below
      curriculum=((0, "worlds"),),  # (pairs seen, preset or ((preset, weight), ...)), ascending
      fade=20_000,  # pairs over which one preset gives way to the next
      max_objects=8,
      texture_size=0,  # texels a side of a layer's texture; 0: as large as what is drawn
      photos="",  # folder of photographs to use as textures
      supersample=1,  # scenes are drawn so many times larger and shrunk
    )
  )
  s.video = ConfigDict(dict(weight=0.0, paths="", gap_ms=150.0))  # folder, list file or file
  s.frames = ConfigDict(dict(weight=0.0, paths="", gap=1))  # folder of frame folders; gap in frames
  # feature: the field that holds the video; "" takes the first of video, frames, images.
  s.tfds = ConfigDict(
    dict(weight=0.0, name="", split="train", data_dir="", feature="", gap=1)  # gap in frames
  )

  s.labels = ConfigDict(dict(weight=0.0, paths=""))  # folder that the labelling job wrote

  # Devices that a CPU plays. Much of a step is work for one core; with a device for each core, the
  # batch is split and all of it is done side by side.
  c.cpu_devices = 1
  # Devices an axis; -1 takes what is left. tensor: how many share the work on each pair.
  c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
  # (regex on the parameter's path, tactic), first match wins; "fsdp" splits the largest axis that
  # divides, "columns" and "rows" split the last axis or the one before over mesh.tensor and then as
  # "fsdp", "replicated" splits nothing.
  c.sharding = (
    ("(qkv|fc1)/(kernel|bias)$", "columns"),
    ("(proj|fc2)/kernel$", "rows"),
    (".*", "fsdp"),
  )

  c.checkpoint = k = ConfigDict()
  k.every = "1000 steps"
  k.minutes = 10.0  # and at least this often; 0 saves every step
  k.keep = 2  # newest ones kept
  k.keep_every = 0  # and every so many steps for good; 0 never

  c.log = g = ConfigDict()
  g.every = "50 steps"
  g.images_every = "1000 steps"  # pictures of predictions; "0 steps" only at the end
  g.eval_every = "1000 steps"  # read-out on held-out scenes; "0 steps" only at the end
  g.eval_scenes = 64
  g.eval_masks = 4
  g.peak_tflops = 0.0  # of one device, for utilisation; 0 looks the device up
  # The evaluation job. Trackers: mm<N> is the weights' with N masks; a public release's name or a
  # weights file (.safetensors) is itself; the rest are the names in evals/trackers.py.
  c.evaluate = e = ConfigDict()
  e.trackers = ("mm10", "mm1", "zero", "phase")
  e.weights = ""  # weights file; "" takes the embedded ones
  e.mask_ratio = 0.0  # 0 takes what the weights were trained with
  e.zoom = 0  # rounds of multi-scale refinement
  # A mark of counterfactual/perturb.py, or "learned" from a file; kind "" takes the weights' own.
  e.mark = ConfigDict(dict(kind="", colour=(255, 0, 0), size=2, amplitude=1.0, sigma=1.5))
  e.mark.file = ""  # mark file, or weights file with a learned mark
  e.readout = "window"  # argmax | soft | window
  e.order = ""  # release | paper | matched, how masks are averaged; "": as `Tracker` has it
  e.average = "hidden"  # hidden | release: over which masks
  # half_pixel | release: how frames are resized, points moved and responses read out, see Tracker.
  # What it answers is continuous under either.
  e.tracker_protocol = "half_pixel"
  e.masks_seed = 0
  e.dtype = e.attention_dtype = ""  # "" takes the weights' own; see Tracker.load
  e.memory_budget = 0.0  # bytes; 0 decides from the device
  # Of flow networks. What does not come back by forward and backward flow is hidden: beyond so many
  # pixels (absolute; 0 takes 6), or beyond a share of both flows' lengths (relative; 0 takes 0.5).
  e.flow = ConfigDict(dict(occlusion="absolute", occlusion_threshold=0.0))
  e.flow.iterations = 0  # 0 takes the file's
  e.scenes = 0  # how many scenes of scenes-test-v1
  e.honesty = True  # on scenes, also with frame 2 exchanged between pairs
  e.tapvid = ""  # TAP-Vid clips: folder of clip folders, .pkl, or folder of .pkl shards
  e.protocols = ("first", "cfg")  # names of evals/protocols.py
  e.frame_gap = 5  # of protocols that ask about a constant gap
  e.query_stride = 5  # frames between the queries of protocol strided
  e.resolution = "native"  # that trackers see clips at: native | nearest_16 | HEIGHTxWIDTH
  e.overlays = 3  # best and worst tracks drawn on their clips; 0 draws none
  e.flow_pairs = ""  # folder of frame pairs with truth: .flo, or as KITTI has it
  e.prediction = 0  # on how many scenes of scenes-test-v1 the weights complete frame 2
  e.segments = 0  # on how many of them mm<N> are asked what moves along with points on movers

  # The labelling job: a tracker's answers about points of pairs from `data`, as shards on disk. How
  # it asks is in `evaluate`.
  c.label = b = ConfigDict()
  b.tracker = "mm4"  # as in evaluate.trackers
  b.pairs = 4096
  b.points = 16  # a pair
  # In one pass; with more than 1 the points are an even grid (see counterfactual/many.py), and
  # label.tracker's mm<N> takes N masks for each.
  b.marks = 1
  b.image_hw = (128, 128)  # pixels of the pairs as they are asked about and kept
  b.round_trip = False  # ask from the answer back too, at twice the cost
  b.shard_pairs = 64  # what a kill may lose of a process's work
  b.pictures_every = 8  # shards; 0 never
  # Filters, which training applies; labelling reports what they keep.
  b.min_confidence = 0.0
  b.max_round_trip = 8.0  # pixels

  # The study job: every mark x number of masks x data set x seed; learned marks are trained by the
  # sections above.
  c.study = y = ConfigDict()
  y.marks = ("red", "green", "white", "learned", "learned_white")
  y.masks = (1, 10, 40)
  y.seeds = (0, 1, 2)  # of masks, and of trainings
  y.hand_made_seeds = (0,)  # of these, the ones under which hand-made marks are measured
  y.scenes = 500  # how many scenes of scenes-test-v1; 0 leaves them out
  y.tapvid = ""  # as in evaluate; "" leaves clips out
  y.protocol, y.frame_gap = "paper_first", 5
  y.bottleneck_scenes = 32  # held-out ones, on which Psi-flow's need for the flow is told; 0: not
  y.square = 0  # side of the squares, pixels; 0 takes half a patch
  y.white = ConfigDict(dict(amplitude=0.5, sigma=1.0))  # the white Gaussian
  y.readout, y.order, y.average = "window", "release", "hidden"  # as in evaluate

  # The preparing job: videos into clips for data.sources.tfds.
  c.prepare = v = ConfigDict()
  v.videos = ""  # folder, list file or file
  v.seconds = 2.0  # of a clip
  v.fps = 20.0  # frames a second, at even times
  v.short_side = 288  # pixels; smaller videos keep their size
  v.quality = 90  # of JPEG
  v.limit = 0  # clips of a video, evenly spread; 0 takes all
  v.shard_videos = 64
  v.workers = 4  # processes; 0 cuts in this one

  c.profile_steps = 0  # how many steps, from the third on, are traced for TensorBoard; 0 none
  c.debug_nans = False  # stop where a NaN is made, slowly
  return c
