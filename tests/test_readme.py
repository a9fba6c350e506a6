"""The example of the README does what it says."""

from pathlib import Path

import jaxclus as jc

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs(capsys):
    example = README.split("```python\n")[1].split("```")[0]
    assert "epochs=30" in example
    names = {}
    exec(example.replace("epochs=30", "epochs=1"), names)
    clean, robust = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert 0 <= robust <= clean <= 1
    assert isinstance(names["result"], jc.evaluation.Robustness)


def test_every_command_it_names_exists():
    from jaxclus.cli import _main

    block = README.split("## On the command line")[1].split("```")[1]
    named = {line.split()[1] for line in block.splitlines() if line.startswith("jaxclus ")}
    assert named <= set(_main._COMMANDS) and "train" in named
