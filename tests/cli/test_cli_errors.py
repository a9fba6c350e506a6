"""Help, and how commands fail."""

import inspect
import re
import subprocess
import sys

import pytest
from error_line import error_line

import jaxclus as jc
from jaxclus import cli
from jaxclus.cli import _main

NETWORK = next(iter(jc.zoo.list()), "none ships")
COMMANDS = ("train", "attack", "evaluate", "linearize", "report", "data", "zoo", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"jaxclus {command}" in capsys.readouterr().out.split("Try:")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_examples_are_read(command, monkeypatch):
    kind = _main._COMMANDS[command]
    text = re.sub(r"\\\n\s*", "", inspect.getdoc(kind).split("Try:")[1])
    lines = [line.strip() for line in text.splitlines()]
    examples = [line.split()[1:] for line in lines if line.startswith("jaxclus ")]
    ran = []
    monkeypatch.setattr(kind, "run", lambda self: ran.append(self))
    for words in examples:
        assert cli.main(words) == 0
    assert len(ran) == len(examples) > 0


def test_help_of_training_names_every_network(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    words = set(re.findall(r"\w+", capsys.readouterr().out))
    assert set(jc.models.names()) <= words


def test_preparing_jax_leaves_the_backend_to_the_command():
    """What `--deterministic` puts into XLA_FLAGS counts only before the backend starts."""
    code = (
        "import jax; from jaxclus.cli import _main; _main._keep_compiled_code();"
        "jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count('cpu') == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_data_lists_and_describes(capsys):
    assert cli.main(["data", "list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert cli.main(["data", "info", "digits"]) == 0
    assert re.search(r"train 1,\d+, test \d+ images", capsys.readouterr().out)


@pytest.mark.parametrize(
    "words, named",
    [
        (["train", "digits", "--epochs", "0"], "`epochs`"),
        (["train", "digits", "--method", "pgd"], "`eps`"),
        (["train", "digits", "--method", "pgd", "--eps", "0"], "`eps`"),
        (["train", "digits", "--model", "resnet9"], "resnet18"),
        (["train", "digits", "--batch-size", "100000"], "`data`"),
        (["train", "digits", "--num-images", "100000"], "`n`"),
        (["train", "digits", "--seeds"], "`seeds`"),
        (["train", "no_such_set"], "no_such_set"),
        (["data", "info", "no_such_set"], "no_such_set"),
        (["train", "cifar10"], "jaxclus data prepare cifar10"),
        (["attack", "no/such/run", "--eps", "0.1"], "no/such/run"),
        (["attack", "no/such/run", "--eps"], "`eps`"),
        (["linearize", "no/such/run"], "no/such/run"),
        (["report", "no/such/run"], "no/such/run"),
        (["train", "digits", "--method", "trades"], "`eps` must be given for --method trades"),
        (["train", "digits", "--method", "free", "--norm", "l2", "--eps", "0.1"], "`norm`"),
        (
            ["train", "digits", "--method", "fast", "--eps", "0.1", "--attack-steps", "4"],
            "`attack_steps` is a setting of --method pgd, trades, mart, clustr_trades, "
            "prototypes_pgd, prototypes_trades, not of fast",
        ),
        (
            ["train", "digits", "--eps", "8/255"],
            "`eps` is a setting of --method pgd, trades, mart, fast, free, ",
        ),
        (["train", "digits", "--step-size", "0.1"], "`step_size` is a setting of --method pgd"),
        (
            ["train", "digits", "--attack-steps", "4"],
            "`attack_steps` is a setting of --method pgd, trades",
        ),
        (
            ["train", "digits", "--generator", "simplex"],
            "`generator` is a setting of --method prototypes, prototypes_pgd, ",
        ),
        (
            ["train", "digits", "--method", "prototypes_learned", "--scale", "2"],
            "`scale` is a setting of --method prototypes, prototypes_pgd, prototypes_trades, not",
        ),
        (["train", "digits", "--method", "prototypes_pgd"], "`eps` must be given for --method"),
        (
            ["train", "digits", "--method", "prototypes", "--cluster", "weight"],
            "`cluster` must not be weight for a method that does not train the network's own",
        ),
        (["train", "digits", "--norm", "l2"], "`norm` is a setting of --method pgd"),
        (["train", "digits", "--num-groups", "3"], "`num_groups` is a setting of --cluster"),
        (["train", "digits", "--beta", "0.1"], "`beta` is a setting of --cluster"),
        (["train", "digits", "--teacher", "runs/x"], "`teacher` is a setting of --cluster"),
        (
            ["train", "digits", "--tradeoff", "2"],
            "`tradeoff` is a setting of --method trades, mart",
        ),
        (
            ["train", "digits", "--cluster", "weight", "--teacher", "no/such", "--num-groups", "2"],
            "no/such",
        ),
        (["train", "digits", "--cluster", "weight", "--teacher", "x"], "must be given together"),
        (["zoo", "no-such-network"], NETWORK),
        (["zoo", "no-such-network", "--verify"], "'no-such-network'"),
        (["zoo", "--num-images", "8"], "`num_images` is a setting of --verify, got 8"),
        (["linearize", NETWORK], "`output` must be given"),
        (["attack", "no-such-network", "--eps", "0.1"], "(`jaxclus zoo`), found no no-such"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_1(words, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert cli.main(words) == 1
    assert named in error_line(capsys)


def test_an_unwritable_output_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["train", "digits", "--epochs", "1", "--output", str(tmp_path / "file" / "x")]
    assert cli.main(words) == 1
    assert "file" in error_line(capsys)


@pytest.mark.parametrize(
    "words",
    [["train"], ["nonsense"], ["attack", "x", "--eps", "one"], ["attack", "x", "--eps", "8/0"]],
)
def test_a_command_line_that_cannot_be_parsed_exits_with_2(words):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
