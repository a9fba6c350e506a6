"""The benchmarks' bookkeeping, with stand-ins for the peers, which tests cannot have."""

import itertools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclus as jc
from benchmarks import autoattack, clustr, kmeans, regularisers, steps
from benchmarks import autoattack_peers as peers


def linear(weights, x):
    return x.reshape(x.shape[0], -1) @ weights


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 4, 4, 1), np.uint8)
    labels = (images.reshape(12, -1) @ WEIGHTS).argmax(1)
    data = jc.data.Dataset(images, labels, tuple("abcd"))
    return peers.Problem(data, jc.Linf(1e-6), seed=0, steps=2)


WEIGHTS = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)


def torch_linear():
    import torch

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4, bias=False))
    net[1].weight.data = torch.from_numpy(WEIGHTS.T.copy())  # one channel: the order is the same
    return net


class Reference:
    """As the reference's class: attacks with settings, a logger, one method."""

    def __init__(self, model, norm, eps, seed, version, device):
        assert (norm, version) == ("Linf", "standard") and eps == pytest.approx(1e-6)
        self.model, self.logger = model, types.SimpleNamespace(log=print)
        self.apgd, self.fab, self.square = (types.SimpleNamespace() for _ in range(3))
        self.apgd_targeted = types.SimpleNamespace()

    def run_standard_evaluation(self, x, y, bs):
        assert (self.apgd.n_iter, self.fab.n_iter, self.square.n_queries) == (2, 2, 10)
        assert self.apgd_targeted.n_target_classes == self.fab.n_target_classes == 1
        self.model(x)
        self.logger.log("initial accuracy: 100.00%")
        for name, share in (("APGD-CE", "75.00"), ("APGD-T", "50.00"), ("FAB-T", "50.00")):
            self.model(x)
            self.logger.log(f"robust accuracy after {name}: {share}% (total time 0.1 s)")
        return 1 - x  # another image: some are misclassified


class Attack:
    """As torchattacks' classes: an attack is called with images and labels."""

    def __init__(self, model, **settings):
        assert model.training is False and settings["norm"] == "Linf"

    def __call__(self, x, y):
        return x.clone().requires_grad_()


def test_a_case_with_both_peers(problem, capsys):
    pytest.importorskip("torch")
    packages = {
        "autoattack": types.SimpleNamespace(AutoAttack=Reference),
        "torchattacks": types.SimpleNamespace(
            **dict.fromkeys(("APGD", "APGDT", "FAB", "Square"), Attack)
        ),
    }
    model = jax.tree_util.Partial(linear, jnp.asarray(WEIGHTS))
    case = autoattack.Case("linear", model, torch_linear, problem)
    row = autoattack.Benchmark(resnet18=True)._measure(case, packages)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    sides = row["sides"]
    assert list(sides) == ["jaxclus", "jaxclus again", "autoattack", "torchattacks"]
    for name in ("jaxclus", "jaxclus again", "torchattacks"):
        assert sides[name]["robust"] == row["clean"] == "1" * 12
        assert list(sides[name]["parts"]) == list(peers.FULL_STEPS)
        assert sides[name]["largest_norm"] == 0 and sides[name]["within"]
    ours = sides["jaxclus"]["parts"]
    assert [ours[name]["gradient"] for name in peers.FULL_STEPS] == [36, 36, 24, 0]
    official = sides["autoattack"]
    assert list(official["parts"]) == ["apgd-ce", "apgd-t", "fab-t"]  # it stops once none is left
    assert [part["robust_accuracy"] for part in official["parts"].values()] == [0.75, 0.5, 0.5]
    assert [part["forward"] for part in official["parts"].values()] == [12, 12, 12]
    broken = [i for i, digit in enumerate(official["robust"]) if digit == "0"]
    assert official["only_peer_breaks"] == broken and official["only_jaxclus_breaks"] == []
    assert official["agreement"] == pytest.approx(1 - len(broken) / 12) and broken
    assert not official["within"]
    assert "EXTRAPOLATED" in autoattack.table(row)
    assert "autoattack" in autoattack.table(row)


def test_extrapolation_counts_compilation_once(problem):
    part = {"seconds": 1.0}
    side = {"seconds": 4.0, "parts": dict.fromkeys(peers.FULL_STEPS, part)}
    sides = {name: dict(side) for name in ("jaxclus", "jaxclus again", "autoattack")}
    sides["jaxclus"]["seconds"] = 14.0
    autoattack._extrapolate(problem, sides)
    again = 100 / 2 + 900 / 2 + 900 / 2 + 5000 / 10
    found = [side["extrapolated_seconds"] for side in sides.values()]
    assert found == [again + 10, again, again]


@pytest.mark.parametrize("package", peers.SOURCES)
def test_an_absent_peer_is_skipped_with_a_message(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert peers.find(package, None, "--option") is None
    said = capsys.readouterr().out
    assert said.startswith(f"skipped: {package} cannot be imported") and "--option PATH" in said


def test_a_checkout_is_found(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "torchattacks", raising=False)
    (tmp_path / "torchattacks.py").write_text("here = True")
    found = peers.find("torchattacks", tmp_path, "--torchattacks")
    monkeypatch.delitem(sys.modules, "torchattacks")
    assert found is not None and found.here


def test_torch_resnet_normalises_as_ours_does():
    torch = pytest.importorskip("torch")
    model = jc.models.create(
        "resnet18", 10, (32, 32, 3), jax.random.key(0), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    x = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    with torch.no_grad():
        theirs = autoattack._torch_resnet(model).eval()(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        )
    np.testing.assert_allclose(theirs, jc.jit(lambda m, x: m(x))(model, x), atol=1e-4)


def test_bad_options():
    with pytest.raises(ValueError, match="`networks` must be given unless --resnet18 is"):
        autoattack.Benchmark()
    with pytest.raises(ValueError, match="`only` must hold names of .*'mnist_madry_tiny'"):
        autoattack.Benchmark(resnet18=True, only=("nothing",))
    with pytest.raises(ValueError, match=r"`only` must hold names of \['cifar10_cnn_a_adv4'\]"):
        autoattack.Benchmark(resnet18=True, l1=True, only=("mnist_madry_tiny",))


def test_regularisers_are_timed_by_the_median_round(tmp_path, monkeypatch, capsys):
    first, rounds = [9.0, 9.5, 9.9], [1.0, 1.1, 2.0, 3.0, 3.3, 3.0, 2.0, 2.2, 2.8]
    hundred = [3.0, 3.0, 3.0] + 3 * [2.0, 2.2, 2.5]
    clock, taken = iter([*first, *rounds, *hundred]), []

    def seconds(call):
        call()
        taken.append(call)
        return next(clock)

    monkeypatch.setattr(steps, "seconds", seconds)
    # A side of its own for each objective and data set; what they do is the next test's.
    monkeypatch.setattr(
        regularisers.Benchmark, "_side", lambda self, objective, dataset: lambda: None
    )
    with pytest.raises(SystemExit) as missed:
        regularisers.Benchmark(rounds=3, output=tmp_path).run()
    assert missed.value.code == 1
    (path,) = tmp_path.glob("regularisers-*.json")
    found = json.loads(path.read_text())
    assert found["kept"] is False
    for classes in (taken[:12], taken[12:]):
        assert classes == 4 * classes[:3] and len(set(classes)) == 3  # in turns
    assert list(found["rows"]) == ["cifar10", "cifar100"]
    ten, hundred = found["rows"].values()
    assert list(ten) == list(hundred) == ["plain", "logits", "weight"]
    assert [row["seconds"] for row in ten.values()] == [2.0, 2.2, 2.8]
    assert [row["ratio"] for row in ten.values()] == [1.0, 1.1, 1.4]
    assert [row["first_call_seconds"] for row in ten.values()] == first
    assert [row["ratio"] for row in hundred.values()] == [1.0, 1.1, 1.25]
    assert "at most 1.30 times plain: MISSED" in capsys.readouterr().out


def test_a_timed_side_is_a_training_step(monkeypatch):
    train_step, taken = steps._step.train_step, []

    def spied(state, *batch, program):
        state, metrics = train_step(state, *batch, program=program)
        taken.append((int(state.step), program.objective))
        return state, metrics

    monkeypatch.setattr(steps._step, "train_step", spied)
    tiny = regularisers.Benchmark(model="cnn", batch_size=4, attack_steps=1)
    objective = tiny.compared("cifar10")["weight"]
    side = tiny._side(objective, "cifar10")
    side()
    side()
    assert taken == [(1, objective), (2, objective)]


def test_regularisers_differ_in_the_regulariser_alone():
    for dataset, k, groups in (("cifar10", 10, 2), ("cifar100", 100, 20)):
        plain, logits, weight = regularisers.Benchmark().compared(dataset).values()
        assert logits.objective == weight.objective == plain
        assert len(logits.groups) == k == regularisers.DATASETS[dataset]
        assert len(set(logits.groups)) == groups and logits.groups == weight.groups
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        regularisers.Benchmark(rounds=0)


@pytest.mark.parametrize(("peer", "kept"), [(3.0, True), (1.9, False)])
def test_kmeans_is_measured_against_the_faster_peer(tmp_path, monkeypatch, capsys, peer, kept):
    clock = itertools.cycle([9.0, 9.0, 9.0, 1.0, 5.0, peer, 2.0, 4.0, 2.5, 3.0, 6.0, 9.9])

    def timed(call):
        return next(clock), call()

    monkeypatch.setattr(kmeans, "timed", timed)
    tiny = kmeans.Benchmark(classes=2, points=60, features=4, rounds=3, output=tmp_path)
    if peer < 2:
        clock = itertools.cycle([9.0, 9.0, 9.0] + 3 * [2.0, 4.0, peer])
        with pytest.raises(SystemExit) as missed:
            tiny.run()
        assert missed.value.code == 1
    else:
        tiny.run()
    (path,) = tmp_path.glob("kmeans-*.json")
    found = json.loads(path.read_text())
    assert found["kept"] is kept and found["floor"] == 1
    assert [row["ratio"] for row in found["rows"]] == [1.5 if kept else 0.95] * 2
    for row, (starts, iterations) in zip(found["rows"], kmeans.SETTINGS, strict=True):
        assert (row["starts"], row["max_iterations"]) == (starts, iterations)
        ours, *peers = row["sides"].values()
        assert list(row["sides"])[0] == "jaxclus" and len(peers) == 2
        for side in peers:
            assert side["inertia"] == pytest.approx(ours["inertia"], rel=0.1)
        assert len(ours["iterations"]) == 2 and max(ours["iterations"]) <= iterations
    assert ("kept" if kept else "MISSED") in capsys.readouterr().out


def test_kmeans_points_overlap():
    points = kmeans.Benchmark(points=500).data()
    assert points.shape == (10, 500, 512) and points.dtype == np.float32
    found = jc.clustering.kmeans(jax.random.key(0), points[:1], 2)
    assert found.iterations.min() > 3
    with pytest.raises(ValueError, match="`clusters` must be at least 1, got 0"):
        kmeans.Benchmark(clusters=0)


@pytest.mark.parametrize(("median", "kept"), [(2.2, True), (2.4, False)])
def test_clustr_is_timed_against_a_plain_step(tmp_path, monkeypatch, median, kept):
    clock = iter([9.0, 9.0, 9.0, 2.0, median, 5.0])
    monkeypatch.setattr(steps, "seconds", lambda call: call() or next(clock))
    tiny = clustr.Benchmark(model="cnn", batch_size=24, num_images=96, rounds=1, output=tmp_path)
    if kept:
        tiny.run()
    else:
        with pytest.raises(SystemExit) as missed:
            tiny.run()
        assert missed.value.code == 1
    (path,) = tmp_path.glob("clustr-*.json")
    found = json.loads(path.read_text())
    assert found["kept"] is kept and found["limit"] == 1.15
    ratios = [row["ratio"] for row in found["rows"].values()]
    assert ratios == [1.0, median / 2, 2.5] and list(found["rows"])[1] == "clustr"
    with pytest.raises(ValueError, match="`num_images` must be at least 1, got 0"):
        clustr.Benchmark(num_images=0)
