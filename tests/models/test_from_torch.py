"""Weights of PyTorch networks: logits equal to theirs, every kind of file, every error."""

import json
import sys
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxclus as jc

REFERENCE = Path(__file__).with_name("from_torch_reference.npz")
TORCHVISION = Path(__file__).with_name("torch_reference.npz")
CASES = ["resnet", "preact", "preact_raw", "wide", "deepmind_wide", "deepmind_preact"]
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

logits_of = jax.jit(lambda model, x: model(x))


def read(path, case):
    with np.load(path) as stored:
        return {
            key.removeprefix(f"{case}/"): stored[key]
            for key in stored
            if key.startswith(f"{case}/")
        }


def weights_of(data):
    prefix = "weights/"
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def reference(case):
    data = read(REFERENCE, case)
    name, arguments = json.loads(str(data["call"]))
    return weights_of(data), name, arguments, data["x"], data["logits"]


def assert_equals_torch(model, x, logits):
    np.testing.assert_allclose(logits_of(model, jnp.asarray(x)), logits, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def resnet():
    """Weights, images and logits of one network, for tests of everything around it."""
    weights, _, _, x, logits = reference("resnet")
    return weights, x, logits


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_torch_with_the_names_of_robustbench(case):
    weights, name, arguments, x, logits = reference(case)
    model = jc.models.from_torch(weights, name, **arguments)
    assert_equals_torch(model, x, logits)
    assert model.spec.num_classes == 5 and model.spec.input_shape == (32, 32, 3)


@pytest.mark.parametrize(
    "case", ["resnet18", "resnet50_imagenet", "preact_resnet18", "wide_resnet"]
)
def test_logits_equal_torch_with_the_names_of_torchvision(case):
    data = read(TORCHVISION, case)
    spec = json.loads(str(data["spec"]))
    shown = ("width", "stem", "stem_width") if case != "wide_resnet" else ()
    model = jc.models.from_torch(
        weights_of(data),
        spec["name"],
        mean=spec["mean"],
        std=spec["std"],
        input_shape=spec["input_shape"],
        **{key: value for key, value in spec["arguments"].items() if key not in shown},
    )
    assert_equals_torch(model, data["x"], data["logits"])


@pytest.mark.parametrize("case", ["preact_raw", "deepmind_wide", "deepmind_preact"])
def test_the_variants_of_robustbench_differ(case):
    """A variant that the file does not tell, or that its names do, changes the logits."""
    weights, name, arguments, x, logits = reference(case)
    usual = {
        "preact_raw": {"shortcut_input": "activated"},
        "deepmind_wide": {"stride_padding": "both"},
        "deepmind_preact": {"shortcut_input": "activated"},
    }
    model = jc.models.from_torch(weights, name, **(arguments | usual[case]))
    assert np.abs(logits_of(model, jnp.asarray(x)) - logits).max() > 1e-2


def test_the_spec_is_that_of_create(resnet):
    weights, _, _ = resnet
    model = jc.models.from_torch(weights, "resnet8")
    assert model.spec == jc.models.ModelSpec(
        name="resnet8",
        num_classes=5,
        input_shape=(32, 32, 3),
        mean=tuple(np.float32(MEAN).tolist()),
        std=tuple(np.float32(STD).tolist()),
        arguments=(("width", 3),),
    )
    arguments = dict(jc.models.from_torch(*reference("preact")[:2]).spec.arguments)
    assert arguments == {"final_norm": True, "width": 2}
    weights, name, given, _, _ = reference("deepmind_preact")
    assert dict(jc.models.from_torch(weights, name, **given).spec.arguments) == {
        "activation": "silu",
        "final_norm": True,
        "shortcut_input": "raw",
        "shortcut_size": 3,
        "stride_padding": "after",
        "width": 2,
    }


def test_usual_shapes_leave_no_arguments():
    weights = torch_shapes("resnet18", 7, (32, 32, 1))
    spec = jc.models.from_torch(weights, "resnet18").spec
    assert spec == jc.models.ModelSpec("resnet18", 7, (32, 32, 1))


def test_imagenet_stem_is_seen_and_sets_the_image_size():
    arguments = (("blocks", (1, 1)), ("stem", "imagenet"), ("width", 2))
    weights = torch_shapes("resnet50", 9, (64, 64, 3), arguments)
    spec = jc.models.from_torch(weights, "resnet50", blocks=(1, 1)).spec
    assert spec == jc.models.ModelSpec("resnet50", 9, (224, 224, 3), arguments=arguments)


def torch_shapes(name, classes, shape, arguments=()):
    """Ones for the arrays of a ResNet, under torchvision's names."""
    from test_torch_parity import blocks_of, named_variables, to_torch_layout

    spec = jc.models.ModelSpec(name, classes, shape, arguments=arguments)
    blocks = blocks_of(spec) if arguments else (2, 2, 2, 2)
    return {
        key: np.ones(jax.eval_shape(to_torch_layout, variable.get_value()).shape, np.float32)
        for key, variable in named_variables(spec.abstract(), blocks)
    }


def prefixed(weights, prefix):
    return {prefix + key: value for key, value in weights.items()}


def in_sequence(weights):
    """Sequential(normalise, net) in DataParallel."""
    rest = {key: value for key, value in weights.items() if key not in ("mu", "sigma")}
    return {
        "module.0.mean": weights["mu"],
        "module.0.std": weights["sigma"],
        **prefixed(rest, "module.1."),
    }


def in_named_sequence(weights):
    rest = {key: value for key, value in weights.items() if key not in ("mu", "sigma")}
    constants = {"normalize.mean": weights["mu"], "normalize.std": np.ravel(weights["sigma"])}
    return constants | prefixed(rest, "model.")


VARIANTS = {
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "net": lambda w: {"net": w, "acc": 0.5},
    "model": lambda w: {"model": w, "optimizer": {"state": {0: 1}}},
    "model_state_dict": lambda w: {"model_state_dict": w, "unaveraged_model_state_dict": w},
    "nested": lambda w: {"model": {"state_dict": prefixed(w, "module.")}},
    "module": lambda w: prefixed(w, "module."),
    "module.model": lambda w: prefixed(w, "module.model."),
    "sequence": in_sequence,
    "named sequence": in_named_sequence,
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "ordered": OrderedDict,
    "jax": lambda w: {k: jnp.asarray(v) for k, v in w.items() if "num_batches" not in k},
    "double": lambda w: {k: v.astype(np.float64) for k, v in w.items()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrappers_and_prefixes(variant, resnet):
    weights, x, logits = resnet
    model = jc.models.from_torch(VARIANTS[variant](weights), "resnet8")
    assert_equals_torch(model, x, logits)


def without_constants(weights):
    return {key: value for key, value in weights.items() if key not in ("mu", "sigma")}


def test_normalisation_given_for_a_network_that_has_it_in_code(resnet):
    weights, x, logits = resnet
    bare = without_constants(weights)
    assert_equals_torch(jc.models.from_torch(bare, "resnet8", mean=MEAN, std=STD), x, logits)
    model = jc.models.from_torch(bare, "resnet8")
    assert model.spec.mean is None and model.spec.std is None
    normalised = (x - np.float32(MEAN)) / np.float32(STD)
    assert_equals_torch(model, normalised, logits)


def test_normalisation_given_as_in_the_file_or_beside_it(resnet):
    weights, x, logits = resnet
    half = {key: value for key, value in weights.items() if key != "sigma"}
    for source, given in [(weights, {"mean": MEAN, "std": STD}), (half, {"std": np.array(STD)})]:
        assert_equals_torch(jc.models.from_torch(source, "resnet8", **given), x, logits)


def test_one_constant_counts_for_all_channels(resnet):
    weights, _, _ = resnet
    constants = {"mean": np.full((1, 1, 1, 1), 0.5), "std": np.array([0.25])}
    spec = jc.models.from_torch(without_constants(weights) | constants, "resnet8").spec
    assert spec.mean == (0.5,) * 3 and spec.std == (0.25,) * 3


def test_the_model_keeps_its_own_copy(resnet):
    weights, x, logits = resnet
    mine = {key: value.copy() for key, value in weights.items()}
    model = jc.models.from_torch(mine, "resnet8")
    for value in mine.values():
        value[...] = 0
    assert_equals_torch(model, x, logits)


@pytest.mark.parametrize("form", ["plain", "bfloat16"])
def test_safetensors_file_needs_no_torch(tmp_path, monkeypatch, resnet, form):
    weights, x, logits = resnet
    monkeypatch.setitem(sys.modules, "torch", None)
    if form == "bfloat16":
        weights = {key: value.astype(jnp.bfloat16) for key, value in weights.items()}
    save_file(weights, tmp_path / "net.safetensors")
    model = jc.models.from_torch(tmp_path / "net.safetensors", "resnet8")
    if form == "plain":
        assert_equals_torch(model, x, logits)
    else:
        expected = weights["linear.weight"].astype(np.float32).T
        np.testing.assert_array_equal(model.head.kernel[...], expected)


def test_the_model_is_one_like_any_other(tmp_path, resnet):
    weights, x, logits = resnet
    model = jc.models.from_torch(weights, "resnet8")
    again = jc.load(jc.export(model, tmp_path / "model.safetensors"))
    assert again.spec == model.spec
    assert_equals_torch(again, x, logits)
    y = jnp.asarray(logits.argmax(axis=1), jnp.int32)
    attacked = jc.attacks.FGSM(jc.Linf(0.1))(jax.random.key(0), model, jnp.asarray(x), y)
    losses = [
        jc.losses.cross_entropy(each, y)
        for each in (jnp.asarray(logits), logits_of(model, attacked))
    ]
    assert (losses[1] > losses[0]).all()


def test_the_variants_survive_export(tmp_path):
    weights, name, arguments, x, logits = reference("deepmind_preact")
    model = jc.models.from_torch(weights, name, **arguments)
    again = jc.load(jc.export(model, tmp_path / "model.safetensors"))
    assert again.spec == model.spec
    assert_equals_torch(again, x, logits)


def changed(weights, drop=(), **values):
    return {key: value for key, value in weights.items() if key not in drop} | values


def test_names_and_shapes_that_do_not_fit_are_listed(resnet):
    weights, _, _ = resnet
    wrong = changed(
        weights,
        drop=("layer2.0.bn1.running_var", "linear.bias"),
        extra=np.ones(3),
        **{"layer1.0.conv2.weight": np.ones((2, 7, 3, 3)), "layer3.0.bn2.bias": np.ones((3, 1))},
    )
    with pytest.raises(ValueError) as raised:
        jc.models.from_torch(prefixed(wrong, "module."), "resnet8")
    assert str(raised.value) == (
        "`source` must hold the arrays of resnet8; "
        "missing: layer2.0.bn1.running_var, linear.bias; "
        "left over: extra; "
        "misshaped: layer1.0.conv2.weight (2, 7, 3, 3) instead of (3, 3, 3, 3), "
        "layer3.0.bn2.bias (3, 1) instead of (12,)"
    )


def test_long_lists_are_cut_and_use_the_names_of_the_file():
    weights, _, arguments, _, _ = reference("wide")
    with pytest.raises(ValueError) as raised:
        jc.models.from_torch(weights, "wide_resnet_22_1", **arguments)
    message = str(raised.value)
    assert "missing: block1.layer.2.bn1.bias, " in message and "left over" not in message
    assert message.count("block") == 5 and message.endswith(" and 25 more")
    with pytest.raises(ValueError, match="left over: block1.layer.1.*and 25 more$"):
        jc.models.from_torch(weights, "wide_resnet_10_1", **arguments)


def test_a_wide_name_fixes_the_width():
    weights, name, _, _, _ = reference("wide")
    with pytest.raises(
        ValueError, match=r"misshaped: .*layer\.0\.bn2\.bias \(3,\) instead of \(16,\)"
    ):
        jc.models.from_torch(weights, name)


@pytest.mark.parametrize("drop", ["conv1.weight", "linear.weight", "layer1.0.conv1.weight"])
@pytest.mark.parametrize("case", ["resnet", "preact"])
def test_arrays_that_tell_sizes_may_be_missing_too(case, drop):
    weights, name, _, _, _ = reference(case)
    with pytest.raises(ValueError, match=rf"missing: .*{drop}"):
        jc.models.from_torch(changed(weights, drop=(drop,)), name)
    with pytest.raises(ValueError, match=rf"misshaped: .*{drop} \(\) instead of"):
        jc.models.from_torch(weights | {drop: np.ones(())}, name)


def test_sub_block1_belongs_to_wide_networks_only(resnet):
    weights, _, _ = resnet
    with pytest.raises(ValueError, match="left over: sub_block1.layer.0.bn1.weight$"):
        extra = {"sub_block1.layer.0.bn1.weight": np.ones(2)}
        jc.models.from_torch(weights | extra, "resnet8")


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        ({}, {"name": "resnet19"}, "`name` must be one of cnn, .*wide_resnet_DEPTH_WIDTH; got 'r"),
        (
            {},
            {"name": "cnn"},
            "`name` must be that of a network known in PyTorch, not of a CNN, got 'c",
        ),
        ({}, {"mean": (0.5, 0.5, 0.5)}, r"`mean` must be left out or as in the file, \[0.49"),
        ({}, {"mean": (0.5,)}, r"`mean` must be left out or as in the file, \[0.49"),
        ({}, {"std": (0.2, 0.2, 0.2)}, r"`std` must be left out or as in the file, \[0.25"),
        ({"net.mean": np.ones(3)}, {}, "must hold one mean to normalise with, got also mean"),
        ({"sigma": np.ones(2)}, {}, "`std` must be 3 finite numbers"),
        ({"module.mu": np.ones(3)}, {}, "must hold each array once, got mu also as module.mu"),
        ({"weights": {}}, {}, "must map names to arrays, .*one of state_dict, .* at 'weights'"),
        ({0: np.ones(3)}, {}, "must map names to arrays, .* at 0"),
        ({"net": {}, "model": {}}, {}, "weights of one network, got net and model: pass the"),
        ({}, {"input_shape": (32, 32, 1)}, "`mean` must be 1 finite numbers"),
    ],
)
def test_bad_sources_and_arguments(change, arguments, message, resnet):
    weights, _, _ = resnet
    with pytest.raises(ValueError, match=message):
        jc.models.from_torch(**({"source": weights | change, "name": "resnet8"} | arguments))


def test_half_a_normalisation_is_not_guessed(resnet):
    weights, _, _ = resnet
    with pytest.raises(ValueError, match="`std` must be given, as the file holds only mean"):
        jc.models.from_torch(changed(weights, drop=("sigma",)), "resnet8")


def test_images_of_other_channels_do_not_fit(resnet):
    weights, _, _ = resnet
    bare = without_constants(weights)
    with pytest.raises(ValueError, match=r"conv1.weight \(3, 3, 3, 3\) instead of \(3, 1, 3, 3\)"):
        jc.models.from_torch(bare, "resnet8", input_shape=(32, 32, 1))


@pytest.mark.parametrize("case", ["deepmind_wide", "deepmind_preact"])
def test_deepmind_networks_need_what_their_files_do_not_tell(case):
    weights, name, arguments, x, logits = reference(case)
    with pytest.raises(ValueError, match="`activation` must be given for DeepMind's networks"):
        jc.models.from_torch(weights, name, **changed(arguments, drop=("activation",)))
    bare = changed(weights, drop=("mean", "std"))
    with pytest.raises(ValueError, match="`mean` must be given for DeepMind's networks"):
        jc.models.from_torch(bare, name, **arguments)
    with pytest.raises(ValueError, match="`std` must be given for DeepMind's networks"):
        jc.models.from_torch(bare, name, mean=MEAN, **arguments)
    model = jc.models.from_torch(bare, name, mean=MEAN, std=STD, **arguments)
    assert_equals_torch(model, x, logits)


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"shortcut_input": "none"}, "`shortcut_input` must be one of activated, raw; got 'none'"),
        ({"shortcut_size": 2}, "`shortcut_size` must be 1 or 3, got 2"),
        ({"stride_padding": "same"}, "`stride_padding` must be one of after, both; got 'same'"),
    ],
)
def test_bad_variants(argument, message):
    weights, name, arguments, _, _ = reference("preact")
    with pytest.raises(ValueError, match=message):
        jc.models.from_torch(weights, name, **(arguments | argument))


def test_unknown_argument(resnet):
    with pytest.raises(TypeError, match="`depth` is no argument of resnet8"):
        jc.models.from_torch(resnet[0], "resnet8", depth=18)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="`source` must be a file of weights, found no"):
        jc.models.from_torch(tmp_path / "none.pt", "resnet8")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors in here")
    with pytest.raises(ValueError, match="`source` must be a safetensors file, got"):
        jc.models.from_torch(str(broken), "resnet8")


def test_torch_file_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "net.pt").write_bytes(b"")
    with pytest.raises(ImportError, match=r'needs PyTorch: pip install "jaxclus\[torch\]"'):
        jc.models.from_torch(tmp_path / "net.pt", "resnet8")


# From here on PyTorch itself takes part.


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.parametrize("ending", ["pt", "pth", "pth.tar", "safetensors"])
def test_files_of_torch(tmp_path, torch, ending):
    import make_from_torch_reference as peer

    _, name, arguments = peer.CASES["wide"]
    module = peer.seeded("wide")
    path = tmp_path / f"net.{ending}"
    if ending == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(module.state_dict(), path)
    else:
        torch.save({"state_dict": torch.nn.DataParallel(module).state_dict(), "epoch": 1}, path)
    x = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)
    with torch.no_grad():
        logits = module(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    assert_equals_torch(jc.models.from_torch(path, name, **arguments), x, logits)


@pytest.mark.parametrize("name", ["resnet8", "preact_resnet18", "wide_resnet_10_2"])
def test_modules_of_torch(torch, name):
    import make_from_torch_reference as peer

    make, arguments = {
        "resnet8": (lambda: peer.Staged(10, (1, 1, 1), 16, peer.PlainBlock), ()),
        "preact_resnet18": (
            lambda: peer.Staged(10, (2, 2, 2, 2), 8, peer.PreActBlock),
            (("width", 8),),
        ),
        "wide_resnet_10_2": (lambda: peer.WideResNet(10, 1, 16, 32), ()),
    }[name]
    torch.manual_seed(0)
    module = make()
    x = torch.rand(4, 3, 32, 32)
    module.train()(x)  # statistics off their initial values
    with torch.no_grad():
        logits = module.eval()(x).numpy()
    model = jc.models.from_torch(module.state_dict(), name)
    assert_equals_torch(model, x.permute(0, 2, 3, 1).numpy(), logits)
    assert model.spec.arguments == arguments


def test_tensors_of_half_precision(torch, resnet):
    weights, _, _ = resnet
    tensors = {key: torch.from_numpy(value).bfloat16() for key, value in weights.items()}
    kernel = jc.models.from_torch(tensors, "resnet8").head.kernel[...]
    np.testing.assert_array_equal(kernel, tensors["linear.weight"].float().numpy().T)


def test_files_that_torch_cannot_read_safely(tmp_path, torch):
    contents = {"module": torch.nn.Linear(2, 2), "object": {"net": {}, "path": Path("x")}}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "garbage.pt").write_bytes(b"no tensors in here")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ["module", "object", "garbage", "empty"]:
        with pytest.raises(
            ValueError, match=r"that torch.load\(weights_only=True\) reads: tensors"
        ):
            jc.models.from_torch(tmp_path / f"{name}.pt", "resnet8")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="`source` must hold a state_dict, got <class 'list'>"):
        jc.models.from_torch(tmp_path / "list.pt", "resnet8")
