import importlib.machinery
import json
import math
import os
import stat
import sys

import jax
import pytest

import jaxclus
from jaxclus import runs


def test_write_atomic_makes_directories_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    runs.write_atomic(path, b"old")
    runs.write_atomic(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    runs.write_atomic(path, b"old")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(KeyboardInterrupt):
        runs.write_atomic(path, b"new, and longer")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    runs.write_atomic(path, b"old")
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(path.read_bytes()), fsync(fd)))
    runs.write_atomic(path, b"new")
    assert seen == [b"old"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        runs.write_atomic(tmp_path / "file", b"")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_write_json(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": "Linf ε"}
    runs.write_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text()
    assert json.loads(text) == value
    assert text.endswith("}\n")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_write_json_refuses_what_is_not_json(tmp_path, number):
    runs.write_json(tmp_path / "file.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(tmp_path / "file.json", {"a": [number]})
    assert json.loads((tmp_path / "file.json").read_text()) == 1


def test_environment_names_versions_hardware_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/jaxclus", "train", "--epochs", "3"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    found = runs.environment()
    json.dumps(found, allow_nan=False)
    assert found["command"] == "jaxclus train --epochs 3"
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["jaxclus"] == jaxclus.__version__
    assert found["versions"].keys() == {"python", "jaxclus", "jax", "flax", "optax", "numpy"}
    count, kind = found["hardware"].split(" x ")
    assert int(count) == len(jax.devices())
    assert kind.endswith(f", {os.cpu_count()} CPU cores")


@pytest.mark.parametrize("module", ["benchmarks.pgd", "benchmarks.pgd.__main__"])
def test_the_command_can_be_typed_as_it_is(monkeypatch, module):
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/pgd.py", "--output", "my results"])
    spec = importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
    command = runs.environment()["command"]
    assert command == "python -m benchmarks.pgd --output 'my results'"


def test_no_progress_prints_nothing(capfd):
    with runs.progress("attack", 3, "images", enabled=False) as advance:
        advance(2)
        advance(1, "loss 0.1")
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr_with_what_was_done_before(capfd):
    with runs.progress("attack", 8, "images", done=2) as advance:
        advance(4, "loss 0.125")
    out, err = capfd.readouterr()
    assert not out
    assert "attack" in err and "75 %" in err and "loss 0.125" in err
