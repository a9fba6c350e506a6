import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

import jaxclus as jc
from jaxclus.training import Checkpoints, TrainingConfig, _fit
from jaxclus.training.objectives import Standard

ONE = jax.devices()[:1]


def create(name="cnn", shape=(8, 8, 1), **arguments):
    """A model whose statistics are not those it starts with."""
    if name == "cnn":
        arguments = {"widths": (4,), "hidden": 8} | arguments
    model = jc.models.create(name, 10, shape, jax.random.key(0), **arguments)
    for path, stat in nnx.iter_graph(model):
        if isinstance(stat, nnx.BatchStat):
            stat[...] = stat[...] + 0.1 * len(str(path))
    return model


def arrays(model):
    state = nnx.to_pure_dict(nnx.split(model)[1])
    named = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}


def assert_same(model, other):
    ours, theirs = arrays(model), arrays(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return jc.export(create(), tmp_path_factory.mktemp("exported") / "model.safetensors")


@pytest.mark.parametrize(
    "arguments",
    [
        {"mean": (0.3,), "std": (0.2,), "activation": "silu"},
        {"batch_norm": False},
        {"name": "resnet8", "shape": (8, 8, 3), "width": 4},
        {"name": "preact_resnet18", "shape": (4, 4, 3), "width": 2},
        {"name": "lipschitz_resnet8", "shape": (4, 4, 3), "width": 2, "hidden": 6},
    ],
)
def test_round_trip_is_exact(arguments, tmp_path):
    model = create(**arguments)
    path = jc.export(model, tmp_path / "model.safetensors")
    assert path == tmp_path / "model.safetensors"
    loaded = jc.load(str(path))
    assert_same(loaded, model)
    assert type(loaded) is type(model) and loaded.spec == model.spec
    assert arrays(loaded)  # and not nothing
    # One graph: the loaded model runs the code compiled for the other, in eval mode.
    assert nnx.graphdef(loaded) == nnx.graphdef(model)


def test_bfloat16_halves_the_file_and_rounds(exported, tmp_path):
    model = create()
    path = jc.export(model, tmp_path / "model.safetensors", dtype="bfloat16")
    found = arrays(jc.load(path))
    for name, array in arrays(model).items():
        assert found[name].dtype == np.float32
        rounded = np.asarray(jnp.asarray(array, jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(found[name], rounded)
    size = sum(array.nbytes for array in found.values())
    assert exported.stat().st_size - path.stat().st_size == size // 2


def test_the_file_is_plain_safetensors_with_a_record(exported):
    from safetensors import safe_open

    with safe_open(exported, framework="numpy") as file:
        record = json.loads(file.metadata()["jaxclus"])
        kernel = file.get_tensor("blocks/0/conv/kernel")
        names = set(file.keys())
    assert record["version"] == jc.__version__
    assert record["spec"]["name"] == "cnn" and record["spec"]["arguments"]["widths"] == [4]
    np.testing.assert_array_equal(kernel, create().blocks[0].conv.kernel[...])
    assert {"head/bias", "blocks/0/norm/mean", "blocks/0/norm/var"} < names


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """Run directories by (validated, averaged), with what training returned."""
    made = {}

    def train(validated, averaged):
        if (validated, averaged) not in made:
            digits = jc.data.load("digits")
            config = TrainingConfig(epochs=3, batch_size=32, ema_decay=0.5 if averaged else None)
            # The second epoch is the best.
            scores = iter([0.5, 0.9, 0.7])
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(
                    _fit, "validation_scores", lambda *_: {"validation_accuracy": next(scores)}
                )
                made[validated, averaged] = jc.training.fit(
                    jax.random.key(0), create(), digits.take(64), Standard(), config,
                    validation=digits.subset(np.arange(100, 150)) if validated else None,
                    directory=tmp_path_factory.mktemp("run"), devices=jax.devices(),
                    progress=False,
                )  # fmt: skip
        return made[validated, averaged]

    return train


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("averaged", [True, False])
def test_a_run_directory_gives_the_model_that_training_returned(run_directory, validated, averaged):
    run = run_directory(validated, averaged)
    assert_same(jc.load(run.directory), run.model)
    assert jc.load(run.directory).spec == run.model.spec
    state, _ = Checkpoints(run.directory / "checkpoints").restore()
    others = [state["weights"]] + ([state["average"]] if averaged and validated else [])
    if validated or averaged:
        kernel = run.model.head.kernel[...]
        assert all((kernel != other["params"]["head"]["kernel"]).any() for other in others)


def test_a_run_on_eight_devices_is_loaded_on_one(run_directory, tmp_path):
    run = run_directory(False, False)
    copy = tmp_path / "copy.safetensors"
    script = (
        "import jax, jaxclus as jc; assert len(jax.devices()) == 1; "
        f"jc.export(jc.load({str(run.directory)!r}), {str(copy)!r})"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
    assert_same(jc.load(copy), run.model)


def test_a_run_exports_as_it_loads(run_directory, tmp_path):
    run = run_directory(False, False)
    path = jc.export(run.model, tmp_path / "model.safetensors")
    assert_same(jc.load(path), jc.load(run.directory))


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_export_needs_a_model_with_a_record(tmp_path):
    bare = jc.models.without_batch_norm(create())
    with pytest.raises(ValueError, match="`model` must be one that jc.models.create made") as error:
        jc.export(bare, tmp_path / "model.safetensors")
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_export_needs_the_ending(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in .safetensors, got .*model.npz"):
        jc.export(create(), tmp_path / "model.npz")


def test_export_knows_two_types(tmp_path, monkeypatch):
    # In the tests annotations are checked before our own checks.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="`dtype` must be one of bfloat16, float32; got 'int8'"):
        jc.export(create(), tmp_path / "model.safetensors", dtype="int8")


def test_export_names_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "model.safetensors"
    with pytest.raises(OSError, match=f"`path` must be one that can be .* got {path}: ") as error:
        jc.export(create(), path)
    one_line(error)


def test_load_names_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`path` must be .* found no {tmp_path}/none"):
        jc.load(tmp_path / "none")
    with pytest.raises(ValueError, match=f"`path` .* {tmp_path} has no complete checkpoint"):
        jc.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no model", bytes(100)])
def test_load_needs_a_safetensors_file(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"`path` must be a safetensors file, got {path}") as error:
        jc.load(path)
    one_line(error)


def test_a_truncated_file_is_refused(tmp_path, exported):
    path = tmp_path / "model.safetensors"
    path.write_bytes(exported.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"`path` must be a safetensors file, got {path}"):
        jc.load(path)


def rewritten(exported, path, change, metadata=None):
    """The exported file with changed arrays or another record."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(exported, framework="numpy") as file:
        kept = file.metadata()
    arrays = load_file(exported)
    change(arrays)
    save_file(arrays, path, metadata=kept if metadata is None else metadata)
    return path


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_load_needs_our_record(tmp_path, exported, metadata):
    path = rewritten(exported, tmp_path / "other.safetensors", lambda arrays: None, metadata)
    with pytest.raises(ValueError, match=f"`path` must be a file that jc.export wrote, got {path}"):
        jc.load(path)


@pytest.mark.parametrize(
    "record", ["no JSON", "[]", "{}", '{"spec": {"name": "cnn"}}', '{"spec": {"arguments": {}}}']
)
def test_load_needs_a_record_that_it_understands(tmp_path, exported, record):
    path = rewritten(exported, tmp_path / "m.safetensors", lambda _: None, {"jaxclus": record})
    message = f"`path` must hold a model that jaxclus {jc.__version__} knows, got {path}: "
    with pytest.raises(ValueError, match=message) as error:
        jc.load(path)
    one_line(error)


def test_a_model_of_another_version_is_named(tmp_path, exported):
    spec = dataclasses.asdict(create().spec) | {"name": "transformer9000", "arguments": {}}
    record = json.dumps({"version": "9.9", "spec": spec})
    path = rewritten(exported, tmp_path / "m.safetensors", lambda _: None, {"jaxclus": record})
    with pytest.raises(ValueError, match="got 'transformer9000'") as error:
        jc.load(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda arrays: arrays.pop("head/bias"), "differs in head/bias"),
        (lambda arrays: arrays.update(more=np.zeros(2, np.float32)), "differs in more"),
        (
            lambda arrays: arrays.update({"head/bias": np.zeros(11, np.float32)}),
            "differs in head/bias",
        ),
        (
            lambda arrays: arrays.clear(),
            "blocks/0/conv/kernel, blocks/0/norm/bias, blocks/0/norm/mean and 6 more",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, exported, change, named):
    path = rewritten(exported, tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError, match=f"`path` must hold the arrays of cnn; .*{named}") as error:
        jc.load(path)
    assert str(path) in one_line(error)


def test_a_run_of_a_model_without_a_record(tmp_path):
    digits = jc.data.load("digits").take(16)
    bare = jc.models.without_batch_norm(create())
    config = TrainingConfig(epochs=1, batch_size=16, learning_rate=0.01)
    jc.training.fit(
        jax.random.key(0), bare, digits, Standard(), config, directory=tmp_path, devices=ONE,
        progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"`path` .* did not make: {tmp_path}") as error:
        jc.load(tmp_path)
    one_line(error)
