"""The public PyTorch code of Opt-CWM as a process of its own, asked over its standard input.

Started by `launch/bench track --torch`, with the Python that has torch and what the public code
imports; nothing of this project is imported here. Calls of `.cuda()` are made identities, so that
the public code runs on the CPU as it is.

  torch_track.py CODE FOLDER THREADS

CODE is the public code. FOLDER holds settings.json (`model`: what its builder of flow predictors
takes), state.npz (the flow predictor's parameters by name) and question.npz: frames uint8
[2, H, W, 3], points_yx int [N, 2], masks bool [M, tokens of both frames]. A line {"points": P,
"batch": B} asks for the first P points, B of them at a time, and is answered by one line.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(code, folder):
  """The public flow predictor with the folder's parameters and masks, and a count of its passes."""
  torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
  sys.path.insert(0, str(code))
  from models import builder

  settings = json.loads((folder / "settings.json").read_text())
  # A size in pixels is a tuple there.
  settings["model"]["base_cwm"]["patch_size"] = tuple(settings["model"]["base_cwm"]["patch_size"])
  model = builder.get_flow_predictor(settings["model"]).eval()
  if settings["highres"]:
    model.highres()
  with np.load(folder / "state.npz") as stored:
    state = {name: torch.from_numpy(stored[name]) for name in stored}
  model.load_state_dict(state, strict=True)
  passes = [0]

  def count(module, inputs):
    passes[0] += len(inputs[0])

  model.cwm_model.register_forward_pre_hook(count)
  return model, passes


def answer(model, question, count, batch):
  """Destinations [P, 2], (row, column), of the first `count` points, `batch` of them at a time."""
  masks = torch.from_numpy(question["masks"])
  model.masking_generator = lambda count: masks.expand(count, *masks.shape)
  frames = (torch.from_numpy(question["frames"]).float() / 255 - torch.tensor(MEAN)) / torch.tensor(
    STD
  )
  video = frames.permute(3, 0, 1, 2)[None]  # [1, 3, 2, H, W]
  points = torch.from_numpy(question["points_yx"][:count])
  found = [
    model(video.repeat_interleave(len(some), 0), some)["pred_pixel_loc"]
    for some in points.split(batch)
  ]
  return torch.cat(found).numpy()


def memory(name):
  """A line of this process's memory, in bytes: "VmRSS" now, "VmHWM" at most since the last mark."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith(name + ":"):
      return int(line.split()[1]) * 1024
  return 0


def main():
  code, folder, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
  torch.set_num_threads(threads)
  # What the public code prints must not mix with the answers.
  out, sys.stdout = sys.stdout, sys.stderr
  model, passes = load(code, folder)
  with np.load(folder / "question.npz") as stored:
    question = dict(stored)
  versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
  print(json.dumps(dict(versions=versions)), file=out)
  out.flush()
  for line in sys.stdin:
    asked = json.loads(line)
    passes[0], before = 0, memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # marks: VmHWM counts from here on
    began = time.process_time()
    with torch.no_grad():
      found = answer(model, question, asked["points"], asked["batch"])
    told = dict(
      points_yx=found.tolist(),
      passes=passes[0],
      cpu_seconds=time.process_time() - began,
      grown=memory("VmHWM") - before,
      peak=memory("VmHWM"),
    )
    print(json.dumps(told), file=out)
    out.flush()


if __name__ == "__main__":
  main()
