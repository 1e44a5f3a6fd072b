"""`cwm-jax doctor`: what it says, and that nothing stops it."""

from __future__ import annotations

import json
from importlib import metadata

import command_line

from cwm_jax import doctor


def test_here_everything_needed_is_found(capsys):
  code, out, err = command_line.run(capsys, "doctor")
  assert (code, err) == (0, "")
  assert "all that is needed is here" in out and "missing" not in out
  for about in ("Python", "jax", "devices", "shipped weights", "video", "disk here"):
    assert f"  {about}" in out
  facts = json.loads(command_line.run(capsys, "doctor", "--json")[1])
  assert facts["ok"] and {f["state"] for f in facts["findings"]} <= {"ok", "note"}
  (jax,) = (f for f in facts["findings"] if f["about"] == "jax")
  assert jax["found"] == metadata.version("jax")


def test_what_is_missing_is_named_with_a_way_to_get_it_and_exit_code_1(
  capsys, monkeypatch, tmp_path
):
  monkeypatch.setattr(doctor, "_version", lambda name: None if name == "flax" else "1.0")
  monkeypatch.setenv("CWM_JAX_CACHE", str(tmp_path / "none"))
  monkeypatch.setenv("CWM_DATA", str(tmp_path / "gone"))
  code, out, _ = command_line.run(capsys, "doctor")
  assert code == 1 and "1 missing" in out
  lines = out.splitlines()
  at = next(i for i, line in enumerate(lines) if line.startswith("missing flax"))
  assert lines[at + 1].strip() == "pip install flax"
  assert any(line.startswith("note    CWM_DATA") and "gone" in line for line in lines)
  assert "none yet" in out


def test_weights_that_are_lost_and_a_device_that_fails_are_findings(capsys, monkeypatch, tmp_path):
  import jax

  from cwm_jax.pretrained import weights

  def no_devices():
    raise RuntimeError("Unable to initialize backend 'tpu'\nand more")

  monkeypatch.setattr(jax, "devices", no_devices)
  monkeypatch.setattr(weights, "shipped", lambda: tmp_path / "gone.safetensors")
  code, out, err = command_line.run(capsys, "doctor", "--json")
  states = {f["about"]: f for f in json.loads(out)["findings"]}
  assert code == 1 and err == ""
  assert states["devices"]["found"] == "Unable to initialize backend 'tpu'"
  assert "JAX_PLATFORMS=cpu" in states["devices"]["fix"]
  assert states["shipped weights"]["state"] == "missing"
