"""The training step of the predictor in plain PyTorch, as a process of its own, asked by its input.

Started by `launch/bench train`, with a Python that has torch and NumPy; nothing of this project is
imported here. The network is the same, and so are the starting parameters, masks and rates.

  torch_train.py FOLDER THREADS

FOLDER holds settings.json and question.npz. A line {"steps": N} asks for N steps and is answered by
one line: the losses and the seconds taken.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def dense(x, p, name, layer=None):
  kernel, bias = p[f"{name}/kernel"], p[f"{name}/bias"]
  return x @ kernel + bias if layer is None else x @ kernel[layer] + bias[layer]


def norm(x, p, name, layer=None):
  scale, bias = p[f"{name}/scale"], p[f"{name}/bias"]
  if layer is not None:
    scale, bias = scale[layer], bias[layer]
  return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-6)


def rotate(x, table):
  first, second = x.chunk(2, dim=-1)
  cos, sin = table[:, None, :, :, 0], table[:, None, :, :, 1]
  return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def blocks(x, p, name, depth, heads, table, last=None):
  """`last` tokens only are worked out by the last block, as the other side does."""
  for layer in range(depth):
    wanted = slice(-last, None) if last and layer == depth - 1 else slice(None)
    b, n, c = x.shape
    qkv = dense(norm(x, p, f"{name}/norm1", layer), p, f"{name}/attn/qkv", layer)
    q, k, v = qkv.reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, table), rotate(k, table)
    out = F.scaled_dot_product_attention(q[:, :, wanted], k, v).transpose(1, 2)
    x = x[:, wanted] + dense(out.reshape(b, -1, c), p, f"{name}/attn/proj", layer)
    hidden = F.gelu(dense(norm(x, p, f"{name}/norm2", layer), p, f"{name}/fc1", layer))
    x = x + dense(hidden, p, f"{name}/fc2", layer)
  return x


def patchify(x, patch):
  """[b, h, w, 3] to [b, n, patch * patch * 3]."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(2, 3)
  return x.reshape(b, (h // patch) * (w // patch), -1)


def loss_of(p, s, given, mask):
  """Mean squared error of the hidden patches of frame 2."""
  frames, patch = given["frames"], s["patch"]
  b, n = len(frames), mask.shape[-1] * mask.shape[-2]
  both = torch.cat([patchify(frames[:, i], patch) for i in (0, 1)], dim=1)
  tokens = dense(both, p, "patch_embed")
  if s["context"]:
    around = F.conv2d(
      frames[:, 0].permute(0, 3, 1, 2),
      p["context_embed/kernel"].permute(3, 2, 0, 1),
      stride=patch,
      padding=s["context"],
    )
    tokens = torch.cat([tokens[:, :n] + around.flatten(2).transpose(1, 2), tokens[:, n:]], dim=1)
  tokens = tokens + (given["encoder_table"] + p["encoder_positions"][:, None]).reshape(1, 2 * n, -1)
  hidden = mask.reshape(b, 2 * n)
  order = torch.argsort(hidden.to(torch.uint8), dim=1, stable=True)
  shown = order[:, : s["num_visible"]]
  tokens = torch.gather(tokens, 1, shown[:, :, None].expand(-1, -1, tokens.shape[-1]))
  x = blocks(
    *(tokens, p, "encoder/blocks", s["encoder_depth"], s["encoder_heads"]),
    given["encoder_rotary"][shown],
  )
  x = dense(norm(x, p, "encoder_norm"), p, "encoder_to_decoder")
  filler = p["mask_token"].expand(b, 2 * n - s["num_visible"], -1)
  restore = torch.argsort(order, dim=1)
  x = torch.cat([x, filler], dim=1)
  x = torch.gather(x, 1, restore[:, :, None].expand(-1, -1, x.shape[-1]))
  x = x + (given["decoder_table"] + p["decoder_positions"][:, None]).reshape(1, 2 * n, -1)
  table = given["decoder_rotary"][None].expand(b, -1, -1, -1)
  x = blocks(x, p, "decoder/blocks", s["decoder_depth"], s["decoder_heads"], table, last=n)
  pixels = dense(norm(x, p, "decoder_norm"), p, "head")
  weight = hidden[:, n:, None].float()
  squares = (pixels - both[:, n:]).square().mean(-1, keepdim=True)
  return (squares * weight).sum() / weight.sum()


def main():
  folder, threads = Path(sys.argv[1]), int(sys.argv[2])
  torch.set_num_threads(threads)
  s = json.loads((folder / "settings.json").read_text())
  with np.load(folder / "question.npz") as stored:
    given = {name: torch.from_numpy(stored[name].copy()) for name in stored}
  p = {
    name.removeprefix("param:"): given.pop(name).requires_grad_()
    for name in list(given)
    if name.startswith("param:")
  }
  plain = [t for name, t in p.items() if t.ndim < 2 or re.search(s["decay_exclude"], name)]
  decayed = [t for t in p.values() if not any(t is other for other in plain)]
  groups = [
    dict(params=decayed, weight_decay=s["weight_decay"]),
    dict(params=plain, weight_decay=0.0),
  ]
  betas = (s["b1"], s["b2"])
  optimizer = torch.optim.AdamW(groups, betas=betas, eps=s["eps"], foreach=True)
  done = 0
  print(json.dumps(dict(versions=f"torch {torch.__version__}, {threads} threads")), flush=True)
  for line in sys.stdin:
    began, began_cpu, losses = time.perf_counter(), time.process_time(), []
    for _ in range(json.loads(line)["steps"]):
      rate = s["rates"][min(done, len(s["rates"]) - 1)]
      for group in optimizer.param_groups:
        group["lr"] = rate
      optimizer.zero_grad(set_to_none=True)
      loss = loss_of(p, s, given, given["masks"][done % len(given["masks"])])
      loss.backward()
      torch.nn.utils.clip_grad_norm_(p.values(), s["clip_norm"])
      optimizer.step()
      losses.append(loss.item())
      done += 1
    told = dict(seconds=time.perf_counter() - began, cpu=time.process_time() - began_cpu)
    print(json.dumps(dict(told, losses=losses)), flush=True)


if __name__ == "__main__":
  main()
