"""The examples of the README do what they say."""

from pathlib import Path

import jaxclus as jc

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_examples_run(capsys, tmp_path, monkeypatch):
    example = README.split("```python\n")[1].split("```")[0]
    assert "epochs=30" in example
    names = {}
    exec(example.replace("epochs=30", "epochs=1"), names)
    clean, robust = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert 0 <= robust <= clean <= 1
    assert isinstance(names["result"], jc.evaluation.Robustness)

    load, judge = README.split("```python\n")[2].split("```")[0].split("\n", 1)
    assert "from_torch" in load and "AutoAttack" in judge  # which the first example has run
    names |= {"model": names["run"].model, "test": names["test"].take(12)}
    monkeypatch.chdir(tmp_path)
    exec(judge.replace("AutoAttack", "PGD"), names)
    assert (tmp_path / "out" / "evaluation.json").exists()
    assert float(capsys.readouterr().out.split()[0]) == names["result"].robust_accuracy


def test_every_command_it_names_exists():
    from jaxclus.cli import _main

    block = README.split("## On the command line")[1].split("```")[1]
    named = {line.split()[1] for line in block.splitlines() if line.startswith("jaxclus ")}
    assert named <= set(_main._COMMANDS) and "train" in named
