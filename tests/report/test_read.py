"""Reading of run directories, and what is refused."""

import json

import numpy as np
import pytest
from synthetic_runs import write_run

from jaxclus.report._read import read_runs


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", steps=30)


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_everything_is_read(run):
    (read,) = read_runs([run])
    assert read.label == "pgd" and read.dataset == "cifar10"
    assert [evaluation.norm for evaluation in read.evaluations] == ["linf", "linf"]
    assert [evaluation.examples is None for evaluation in read.evaluations] == [False, True]
    assert read.groups[:3] == ("vehicles", "vehicles", "animals")
    variant = read.variant("with_batch_norm")
    assert variant.weight.shape == (10, 16, 16, 3) and variant.linkage.shape == (9, 4)
    assert set(read.linear.filters) == {"conv1", "block1/conv1", "block2/conv1"}
    assert read.class_name(3) == "cat" and read.class_name(10) == "10"


def test_curves_are_sorted_by_eps(run):
    path = run / "attacks" / "autoattack-linf.json"
    curve = json.loads(path.read_text())["curve"]
    change(path, curve=curve[::-1])
    (read,) = read_runs([run])
    assert [p.eps for p in read.evaluations[0].curve] == [point["eps"] for point in curve]


def test_series_take_the_later_of_two_lines_for_a_step(run):
    lines = [
        {"step": 1, "epoch": 0.5, "loss": 3.0},
        {"step": 2, "epoch": 1.0, "loss": 2.0},
        {"step": 2, "epoch": 1.0, "validation_accuracy": 0.5},
        {"step": 1, "loss": 2.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (read,) = read_runs([run])
    steps, epochs, values = read.series("loss")
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(epochs, [np.nan, 1.0])
    np.testing.assert_array_equal(values, [2.5, 2.0])
    assert read.series("accuracy")[0].size == 0


def test_a_torn_last_line_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    (read,) = read_runs([run])
    assert read.series("loss")[0].max() == 30


def test_no_run_directory(run, tmp_path):
    for path in (tmp_path / "absent", run / "attacks", run / "config.json"):
        with pytest.raises(ValueError, match=f"`runs` must hold run directories.*got {path}"):
            read_runs([run, path])


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "linear.json", "attacks/autoattack-linf.json"]
)
@pytest.mark.parametrize("content", [b"{broken\n", b"[1]\n", b"\xff\xfe\n"])
def test_unreadable_json(run, name, content):
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"`runs` holds {run / name}, which") as caught:
        read_runs([run])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"attack": None}, "'attack' is missing or wrong: None"),
        ({"norm": "l3"}, "'norm' must be linf, l2 or l1, got 'l3'"),
        ({"num_images": 0}, "'num_images' must be at least 1, got 0"),
        ({"seed": True}, "'seed' is missing or wrong: True"),
        ({"clean_accuracy": 84.0}, r"'clean_accuracy' must be in \[0, 1\], got 84.0"),
        ({"curve": [0.5]}, "'curve' must hold objects, got 0.5"),
        ({"curve": [{"eps": 0.1}]}, "'robust_accuracy' is missing or wrong: None"),
        ({"curve": [{"eps": -1, "robust_accuracy": 0}]}, "'eps' must be finite and at least 0"),
    ],
)
def test_wrong_evaluations(run, entries, message):
    path = run / "attacks" / "autoattack-linf.json"
    change(path, **entries)
    with pytest.raises(ValueError, match=f"`runs` holds {path}, where {message}"):
        read_runs([run])


@pytest.mark.parametrize(
    "brackets, message",
    [
        (None, "'brackets' is missing or wrong: None"),
        ([1], "'brackets' must hold objects, got 1"),
        ([{"attack": "FGSM()", "norm": 2}], "'norm' is missing or wrong: 2"),
    ],
)
def test_wrong_certificates(run, brackets, message):
    path = run / "certificates.json"
    change(path, brackets=brackets)
    with pytest.raises(ValueError, match=f"`runs` holds {path}, where {message}"):
        read_runs([run])
    path.unlink()
    assert read_runs([run])[0].brackets == ()


@pytest.mark.parametrize("name", ["linear.npz", "attacks/autoattack-linf.npz"])
def test_unreadable_arrays(run, name):
    (run / name).write_bytes(b"no archive")
    with pytest.raises(ValueError, match=f"`runs` holds {run / name}, which is no readable .npz"):
        read_runs([run])


def test_arrays_that_would_need_pickle_are_refused(run):
    np.savez(run / "linear.npz", feature_distance=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="which is no readable .npz"):
        read_runs([run])


def test_arrays_of_the_wrong_shape(run):
    np.savez(run / "linear.npz", **{"with_batch_norm/order": np.arange(9)})
    with pytest.raises(ValueError, match=r"'with_batch_norm/order' must have the shape \[10\]"):
        read_runs([run])
    np.savez(run / "linear.npz", **{"without_batch_norm/weight": np.zeros((10, 4, 3))})
    with pytest.raises(ValueError, match=r"must have the shape \[10, any, any, any\]"):
        read_runs([run])


def test_an_order_that_is_no_permutation(run):
    np.savez(run / "linear.npz", **{"with_batch_norm/order": np.zeros(10, int)})
    with pytest.raises(ValueError, match="'with_batch_norm/order' must hold each of 0 to 9 once"):
        read_runs([run])


def test_examples_that_lack_an_array(run):
    path = run / "attacks" / "autoattack-linf.npz"
    np.savez(path, images=np.zeros((2, 4, 4, 1)))
    with pytest.raises(ValueError, match=f"`runs` holds {path}, which lacks the array 'adversar"):
        read_runs([run])


def test_groups_of_classes_that_do_not_exist(run):
    change(run / "linear.json", groups=[["vehicles", [0, 10]]])
    with pytest.raises(ValueError, match="group 'vehicles' has class 10 of 10 classes"):
        read_runs([run])
