"""The README is run: its API block, and its commands against the command line and the Makefile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastpeft.cli import COMMANDS
from tiny_lm import save_tiny

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
if not README.is_file():
    pytest.skip(f"{ROOT} is no source checkout", allow_module_level=True)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.M | re.S)


def test_the_api_block_runs(tmp_path, monkeypatch, capsys):
    (code,) = blocks("python")
    assert len(code.splitlines()) <= 24
    save_tiny(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert len(names["report"].converted) == 14
    assert "lora" in capsys.readouterr().out
    assert (tmp_path / "poems" / "adapter_model.safetensors").is_file()


def test_every_command_it_shows_exists():
    shown = set(re.findall(r"^fastpeft (\w+)", "\n".join(blocks("")), re.M))
    assert shown and shown <= set(COMMANDS)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    asked = set(re.findall(r"`?make ([a-z]+)", README.read_text()))
    assert asked <= targets, asked - targets
