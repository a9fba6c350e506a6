"""`jaxclus evaluate` certifies: what it prints and writes, and what it refuses to."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_line import error_line

import jaxclus as jc
from jaxclus import cli, evaluation
from jaxclus.cli._certificates import certify

COUNT, SHAPE = 16, (8, 8, 1)


def network(name="cnn", **arguments):
    return jc.models.create(name, 10, SHAPE, jax.random.key(0), **arguments)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A perceptron on pixels with a head by least squares, and the command that judges it."""
    model = network(widths=(), hidden=64)
    model.dense.kernel[...], model.dense.bias[...] = jnp.eye(64), jnp.zeros(64)
    train = jc.data.load("digits", "train")
    pixels = train.images.reshape(-1, 64) / 255
    solved = np.linalg.lstsq(pixels, np.eye(10)[train.labels], rcond=None)[0]
    model.head.kernel[...], model.head.bias[...] = jnp.asarray(solved, jnp.float32), jnp.zeros(10)
    path = jc.export(model, tmp_path_factory.mktemp("model") / "model.safetensors")
    found = ["evaluate", str(path), "--dataset", "digits", "--eps", "0.03", "--no-masking"]
    return [*found, "--num-images", str(COUNT), "--microbatch", "2", "--curve"]


def test_certificates_and_brackets_as_a_user_sees_them(words, tmp_path, capfd, monkeypatch):
    words = [*words, "--output", str(tmp_path)]
    honest = evaluation.certify

    def everything(*args, **kwargs):
        found = honest(*args, **kwargs)
        return dataclasses.replace(found, certified=found.clean)

    # A certificate that contradicts the attack ends the command, before anything is written.
    monkeypatch.setattr(evaluation, "certify", everything)
    assert cli.main(words) == 1
    line = error_line(capfd)
    assert re.search(r"breaks \d+ of the images .* numbers \d+.* may be published", line)
    assert not (tmp_path / "certificates.json").exists()
    assert not list((tmp_path / "attacks").glob("*.json"))
    monkeypatch.setattr(evaluation, "certify", honest)

    assert cli.main(words) == 0
    out = capfd.readouterr().out
    shares = re.findall(r"certified accuracy (\S+)  (\w+), linf eps 0.03 \(7.65/255\)", out)
    assert [method for _, method in shares] == ["lipschitz", "interval"]
    assert re.search(r"lipschitz, .* Lipschitz bound 1 \(l2\), median linf radius 0\.0\d+", out)
    low, high = re.search(
        r"certified (\S+) % <= true robust accuracy <= (\S+) % "
        r"\(autoattack, linf, eps 0.03, 16 images\)",
        out,
    ).groups()
    assert 0 < float(low) <= float(high) < 100
    found = json.loads((tmp_path / "certificates.json").read_text())
    methods = [each["method"] for each in found["certificates"]]
    assert methods == ["lipschitz", "interval"] and found["not_certified"] == {}
    for (share, _), each in zip(shares, found["certificates"], strict=True):
        assert each["certified_accuracy"] == pytest.approx(float(share), abs=1e-4)
        assert len(each["certified"]) == COUNT
    (bracket,) = found["brackets"]
    assert bracket["certified_accuracy"] == pytest.approx(float(low) / 100, abs=1e-3)
    attack = json.loads((tmp_path / "attacks" / "autoattack-linf.json").read_text())
    assert attack["curve"][0]["robust"] == bracket["robust"]
    assert "versions" in found


def test_no_certify(words, tmp_path, capfd, monkeypatch):
    # Any attack will do: AutoAttack's programs take long to compile.
    monkeypatch.setattr(jc.attacks, "AutoAttack", lambda ball, version: jc.attacks.FGSM(ball))
    words = [*words, "--norm", "l2", "--no-certify", "--output", str(tmp_path)]
    assert cli.main(words) == 0
    assert "certified" not in capfd.readouterr().out
    assert not (tmp_path / "certificates.json").exists()


def test_one_line_says_why_there_is_no_certificate(tmp_path, capsys):
    images, ball = jc.data.load("digits", "test").take(8), jc.Linf(0.1)
    path = tmp_path / "certificates.json"
    certify(path, network("vgg11", width=4), images, ball, [], 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and not path.exists()
    assert lines[0].startswith("no lipschitz or interval certificate: `model` must be a CNN")


def test_what_some_methods_cannot_certify(tmp_path, capsys):
    images, ball = jc.data.load("digits", "test").take(8), jc.Linf(0.1)
    path, model = tmp_path / "certificates.json", network(widths=(2,), activation="gelu")
    attacked = [
        evaluation.robustness(
            jax.random.key(0), model, jc.attacks.FGSM(ball), images, microbatch=1, progress=False
        )
    ]
    certify(path, model, images, ball, attacked, 1)
    out = capsys.readouterr().out
    assert "no interval certificate: `model` must have monotone activations" in out
    assert "(fgsm, linf, eps 0.1, 8 images)" in out
    assert list(json.loads(path.read_text())["not_certified"]) == ["interval"]
