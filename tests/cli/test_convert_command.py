"""`cwm-jax convert` on released checkpoints: there and back, both lists, exit code 2."""

from __future__ import annotations

import json

import command_line
import numpy as np
import pytest
import tiny_release
from torch_writer import Tensor, write

from cwm_jax.pretrained import safetensors_file, weights


@pytest.fixture
def released(cwm_goldens):
  """(state file of a flow predictor, its attention heads as the command takes them)."""
  section = json.loads((cwm_goldens / "config.json").read_text())["base_cwm"]
  heads = f"{section['encoder_num_heads']},{section['decoder_num_heads']}"
  return cwm_goldens / "c4_flow_state.safetensors", heads


def test_a_release_goes_there_and_back_bit_for_bit(capsys, tmp_path, released):
  source, heads = released
  ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
  code, out, err = command_line.run(capsys, "convert", source, ours, "--heads", heads)
  assert (code, err) == (0, "") and f"written  {ours}" in out
  assert f"with {heads.replace(',', ' and ')} heads" in out
  code, out, _ = command_line.run(capsys, "convert", ours, back, "--json")
  assert code == 0 and json.loads(out)["files"] == [str(back)]
  wanted, found = safetensors_file.read(source), safetensors_file.read(back)
  assert wanted.keys() == found.keys()
  assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
  code, out, _ = command_line.run(capsys, "info", ours)
  assert code == 0 and "perturber/fc1/kernel" in out


def test_a_torch_file_laid_over_a_base_is_reported(capsys, tmp_path, cwm_goldens, released):
  source, heads = released
  flow = safetensors_file.read(source)
  over = {f"flow_predictor.{name}": Tensor(np.array(array)) for name, array in flow.items()}
  write(tmp_path / "over.pt", {"model": over})
  base = cwm_goldens / "c1_base_cwm_state.safetensors"
  arguments = ["convert", base, tmp_path / "o.safetensors", "--over", tmp_path / "over.pt"]
  code, out, _ = command_line.run(capsys, *arguments, "--heads", heads)
  shared = {f"cwm_model.{name}" for name in safetensors_file.read(base)} & flow.keys()
  assert shared and code == 0 and f"laid {len(shared)} tensors over the base's" in out
  code, out, _ = command_line.run(capsys, *arguments, "--heads", heads, "--keep-base", "--json")
  assert code == 0 and json.loads(out)["overlaid"] == []


def test_the_heads_of_psi_flow_are_given_apart_from_the_predictors(capsys, tmp_path):
  state = {name: Tensor(array) for name, array in tiny_release.joint().items()}
  source, out = write(tmp_path / "joint.pt", state), tmp_path / "o.safetensors"
  arguments = ["convert", source, out, "--heads", "2,4", "--flow-heads", "4,2"]
  code, said, _ = command_line.run(capsys, *arguments)
  assert code == 0 and "with 2 and 4 heads" in said
  assert "its Psi-flow taken with 4 and 2 heads" in said
  section = weights.read_header(out).config["flow_predictor"]["two_stream"]
  assert (section["encoder_heads"], section["decoder_heads"]) == (4, 2)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_mismatch_prints_both_lists_and_one_sentence(capsys, tmp_path, released, as_json):
  source, heads = released
  state = {name: Tensor(np.array(a)) for name, a in safetensors_file.read(source).items()}
  del state["cwm_model.mask_token"]
  state["cwm_model.surplus"] = Tensor(np.zeros(1, np.float32))
  path = write(tmp_path / "wrong.pt", state)
  arguments = ["convert", path, tmp_path / "o", "--heads", heads, *(["--json"] if as_json else [])]
  code, out, err = command_line.run(capsys, *arguments)
  assert code == 2 and err.count("\n") == 1 and err.startswith(f"error: {path} does not fit")
  if as_json:
    told = json.loads(out)
    assert told["missing"] == ["cwm_model.mask_token"]
    assert told["unexpected"] == ["cwm_model.surplus"]
  else:
    assert out.splitlines() == [
      "missing:",
      "  cwm_model.mask_token",
      "unexpected:",
      "  cwm_model.surplus",
    ]
  assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    (["absent.pt", "o"], "there is no 'absent.pt'"),
    (["hostile.pt", "o"], "have no use for"),
    (["text.safetensors", "o"], "not a safetensors file"),
    (["hostile.pt", "o", "--keep-base"], "--keep-base goes with --over"),
    (["folder", "o", "--like", "opt-cwm-512"], "go with a released checkpoint"),
  ],
)
def test_what_cannot_be_converted_is_one_sentence_and_exit_code_2(
  capsys, tmp_path, monkeypatch, arguments, sentence
):
  from torch_writer import Global

  monkeypatch.chdir(tmp_path)
  write(tmp_path / "hostile.pt", {"a": Global("os", "system", ("touch MARKER",))})
  (tmp_path / "text.safetensors").write_text("These are not the weights you seek.")
  (tmp_path / "folder").mkdir()
  code, out, err = command_line.run(capsys, "convert", *arguments)
  assert code == 2 and out == "" and sentence in err
  assert not (tmp_path / "MARKER").exists() and not (tmp_path / "o").exists()
