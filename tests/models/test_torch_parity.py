"""The networks compute what PyTorch's do: stored logits and statistics, and full-size shapes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxclus.models as models

REFERENCE = Path(__file__).with_name("torch_reference.npz")
CASES = ["resnet18", "resnet50_imagenet", "preact_resnet18", "wide_resnet"]
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def torch_name(path, blocks):
    """The name in torchvision's manner of the variable at `path` of our model."""
    *modules, leaf = path
    leaf = LEAVES[leaf]
    if modules == ["conv"]:
        return f"conv1.{leaf}"
    if modules == ["norm"]:
        return f"bn1.{leaf}"
    if modules == ["head"]:
        return f"fc.{leaf}"
    _, index, *rest = modules
    stage = 0
    while index >= blocks[stage]:
        index, stage = index - blocks[stage], stage + 1
    inner = {
        ("shortcut", "conv"): "downsample.0",
        ("shortcut", "norm"): "downsample.1",
        ("shortcut",): "shortcut",
        ("norm1",): "bn1",
        ("norm2",): "bn2",
        ("conv1",): "conv1",
        ("conv2",): "conv2",
    }.get(tuple(rest))
    if inner is None:
        kind, number = rest
        inner = f"{ {'convs': 'conv', 'norms': 'bn'}[kind] }{number + 1}"
    return f"layer{stage + 1}.{index}.{inner}.{leaf}"


def named_variables(model, blocks):
    """Torch's names and our variables; a pre-activation network's last BatchNorm is `bn`."""
    final = "bn." if isinstance(model, models.PreActResNet) else "bn1."
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        name = torch_name(path, blocks)
        yield (final + name[4:] if name.startswith("bn1.") else name), variable


def to_torch_layout(value):
    """HWIO -> OIHW, [in, out] -> [out, in]."""
    return value.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim])


def from_torch_layout(value):
    return value.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim])


def blocks_of(spec):
    return dict(spec.arguments).get("blocks", (1, 1, 1))


@pytest.fixture(params=CASES, scope="module")
def case(request):
    with np.load(REFERENCE) as stored:
        prefix = f"{request.param}/"
        data = {k.removeprefix(prefix): stored[k] for k in stored if k.startswith(prefix)}
    spec = models.ModelSpec.from_json(json.loads(str(data.pop("spec"))))
    model = spec.build(jax.random.key(0))
    used = set()
    for name, variable in named_variables(model, blocks_of(spec)):
        value = from_torch_layout(data[f"weights/{name}"])
        assert value.shape == variable.shape
        variable[...] = jnp.asarray(value)
        used.add(f"weights/{name}")
    assert used == {name for name in data if name.startswith("weights/")}
    return model, blocks_of(spec), data


def test_logits_equal_torch(case):
    model, _, data = case
    logits = jax.jit(lambda model, x: model(x))(model, jnp.asarray(data["x"]))
    np.testing.assert_allclose(logits, data["logits"], rtol=0, atol=1e-4)


def test_a_pass_in_train_mode_equals_torch(case):
    model, blocks, data = case

    @jax.jit
    def run(model, x):
        train = nnx.view(model, use_running_average=False)
        return train(x), train

    logits, after = run(model, jnp.asarray(data["x"]))
    np.testing.assert_allclose(logits, data["train_logits"], rtol=0, atol=1e-4)
    compared = 0
    for name, variable in named_variables(after, blocks):
        if "running" in name:
            expected = data[f"after/{name}"]
            np.testing.assert_allclose(variable[...], expected, rtol=1e-4, atol=1e-5)
            assert (np.abs(expected - data[f"weights/{name}"]) > 1e-4).any()
            compared += 1
    assert compared == sum(name.startswith("after/") for name in data)


@pytest.mark.parametrize(
    "name, classes, blocks, arguments",
    [
        ("resnet18", 10, (2, 2, 2, 2), {}),
        ("resnet50", 1000, (3, 4, 6, 3), {"stem": "imagenet"}),
        ("preact_resnet18", 10, (2, 2, 2, 2), {}),
        ("wide_resnet_28_10", 10, (4, 4, 4), {}),
    ],
)
def test_full_size_shapes_equal_torch(name, classes, blocks, arguments):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import make_torch_reference

    with torch.device("meta"):
        peer = make_torch_reference.build(name, classes, 3, **arguments)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in peer.state_dict().items()
        if "num_batches" not in name
    }
    spec = models.ModelSpec(name, classes, (32, 32, 3), arguments=tuple(arguments.items()))
    ours = {
        name: jax.eval_shape(to_torch_layout, variable.get_value()).shape
        for name, variable in named_variables(spec.abstract(), blocks)
    }
    assert ours == expected
