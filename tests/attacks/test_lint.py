"""Each rule on a toy built for it, and silence on plain networks; programs are only traced."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxclus as jc
from jaxclus.attacks._lint import lint

X = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)
SEED = np.random.default_rng(0)
KERNEL = SEED.normal(size=(3, 3, 3, 4)).astype(np.float32)
W = SEED.normal(size=(4, 5)).astype(np.float32)
MESH = jax.sharding.Mesh(jax.devices()[:2], ("data",))
HEAD = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
CODEBOOK = SEED.normal(size=(7, 4)).astype(np.float32)
CLUSTERS = jc.clustr.ClusterClassifier(jnp.asarray(CODEBOOK[:6]), (0, 1, 2, 0, 1, 2), variance=1.0)
NEAREST = dataclasses.replace(CLUSTERS, nearest=3)


def features(x):
    h = jc.models._ops.conv_general_dilated(
        x, jnp.asarray(KERNEL), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(h).mean((1, 2))


def logits(x):
    return features(x) @ W


def behind(part):
    """The toy network behind a function of images."""
    return lambda x: logits(part(x))


def embedded(part):
    """The toy network with a function of its features [b, 4] -> [b, 4]."""
    return lambda x: part(features(x)) @ W


def headed(part):
    """The toy network with a function on top of its logits."""
    return lambda x: part(logits(x))


def found(model):
    return {finding.name: finding.severity for finding in lint(model, X)}


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


@jax.custom_jvp
def guided(x):
    return jnp.maximum(x, 0)


@guided.defjvp
def _(primals, tangents):
    return guided(*primals), tangents[0]


rounded_by_jax = jax.custom_jvp(jnp.floor)
rounded_by_jax.defjvps(lambda t, out, x: t)


# Whatever must be found ------------------------------------------------------------------------


def distances(h):
    return ((h[:, None] - CODEBOOK[None]) ** 2).sum(-1)


def nearest(h):
    return jax.nn.one_hot(distances(h).argmin(-1), len(CODEBOOK))


def until_small(x):
    return lax.while_loop(lambda x: jnp.abs(x).max() > 0.5, lambda x: 0.9 * x, x)


def purified(x):
    energy = jax.grad(lambda z: ((z - x) ** 2).sum() + (logits(z) ** 2).sum())
    return lax.fori_loop(0, 3, lambda _, z: z - 0.1 * energy(z), x + 0.1)


def noise(x):
    return x + 0.1 * jax.random.normal(jax.random.key(0), x.shape)


CERTAIN = {
    "round": ("rounding", behind(lambda x: jnp.round(255 * x) / 255)),
    "floor": ("rounding", behind(jnp.floor)),
    "ceil": ("rounding", behind(jnp.ceil)),
    "fake quantisation": ("rounding", behind(lambda x: jnp.clip(jnp.floor(8 * x + 0.5), 0, 7) / 7)),
    "rounded factor": ("rounding", embedded(lambda h: h * jnp.round(h))),
    "rounding of a custom_jvp by jax": ("rounding", behind(rounded_by_jax)),
    "rounding in jit": ("rounding", behind(jax.jit(lambda x: jnp.round(x)))),
    "rounding in remat": ("rounding", behind(jax.checkpoint(jnp.round))),
    "rounding in vmap": ("rounding", behind(jax.vmap(jnp.round))),
    "rounding in shard_map": (
        "rounding",
        behind(jax.shard_map(jnp.round, mesh=MESH, in_specs=P("data"), out_specs=P("data"))),
    ),
    "rounding in a branch": (
        "rounding",
        lambda x: logits(lax.cond(W.sum() > 0, jnp.round, lambda x: x, x)),
    ),
    "rounding in scan": (
        "rounding",
        behind(lambda x: lax.scan(lambda h, w: (jnp.round(h * w), None), x, jnp.ones(3))[0]),
    ),
    "rounding carried around": (
        "rounding",
        behind(
            lambda x: lax.scan(lambda c, _: ((jnp.round(x), c[0]), None), (x, x), None, 3)[0][1]
        ),
    ),
    "rounding in stacked outputs": (
        "rounding",
        behind(lambda x: lax.scan(lambda c, row: (c, jnp.round(row)), 0, x)[1]),
    ),
    "rounding in while": (
        "rounding",
        behind(lambda x: lax.fori_loop(0, jnp.asarray(W).argmax(), lambda _, h: jnp.round(h), x)),
    ),
    "sign": ("sign", embedded(jnp.sign)),
    "one_hot of argmin": ("argmax", embedded(lambda h: nearest(h) @ CODEBOOK)),
    "index into a table": (
        "argmax",
        embedded(lambda h: jnp.asarray(CODEBOOK)[distances(h).argmin(-1)]),
    ),
    "vote": ("argmax", lambda x: jax.nn.one_hot(logits(x).argmax(-1), 5)),
    "argsort": ("argmax", embedded(lambda h: jnp.argsort(h, -1).astype(jnp.float32))),
    "top_k": ("argmax", embedded(lambda h: lax.top_k(h, 4)[1] * 1.0)),
    "binarised": ("step function", behind(lambda x: jnp.where(x > 0.5, 1.0, 0.0))),
    "thermometer": ("step function", behind(lambda x: (x > 0.3) / 2 + (x > 0.6) / 2)),
    "jump": ("step function", embedded(lambda h: h + (h > 1))),
    "branch by the image": (
        "step function",
        behind(lambda x: lax.cond(x.sum() > 0, jnp.ones_like, jnp.zeros_like, x)),
    ),
    "uint8": ("integer cast", behind(lambda x: (255 * x).astype(jnp.uint8) / 255)),
    "bits": (
        "integer cast",
        embedded(lambda h: lax.bitcast_convert_type(h, jnp.int32).astype(jnp.float32)),
    ),
    "stop_gradient": ("stop_gradient", embedded(lax.stop_gradient)),
    "stopped factor": ("stop_gradient", embedded(lambda h: h * lax.stop_gradient(h))),
    "stopped mean": ("stop_gradient", behind(lambda x: x / lax.stop_gradient(x.max()))),
    "draws": ("random numbers", behind(noise)),
    "old-style key": (
        "random numbers",
        behind(lambda x: x + jax.random.uniform(jax.random.PRNGKey(0), x.shape)),
    ),
    "dropout": (
        "random numbers",
        embedded(lambda h: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0)),
    ),
    "nnx.Dropout": (
        "random numbers",
        nnx.Sequential(features, nnx.Dropout(0.5, rngs=nnx.Rngs(0)), HEAD),
    ),
    "jc.Stochastic": ("random numbers", jc.Stochastic(lambda key, x: logits(noise(x)))),
    "loop until": ("data-dependent loop", behind(until_small)),
    "softmax": ("softmax head", headed(jax.nn.softmax)),
    "hand-written softmax": (
        "softmax head",
        headed(lambda z: jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True)),
    ),
    "probabilities of clusters": (
        "softmax head", lambda x: CLUSTERS.probabilities(features(x))
    ),
    "probabilities of the nearest clusters": (
        "softmax head", lambda x: NEAREST.probabilities(features(x))
    ),
    "compiled softmax": ("softmax head", jax.jit(headed(jax.jit(jax.nn.softmax)))),
    "exp of log_softmax": ("softmax head", headed(lambda z: jnp.exp(jax.nn.log_softmax(z)))),
    "tempered softmax": ("softmax head", headed(lambda z: 10 * jax.nn.softmax(z / 100) - 1)),
    "mean of softmaxes": (
        "softmax head",
        headed(lambda z: jax.nn.softmax(jnp.stack([z, 2 * z])).mean(0)),
    ),
}  # fmt: skip
SUSPECTED = {
    "straight-through": (
        "custom gradient",
        behind(lambda x: x + lax.stop_gradient(jnp.round(x) - x)),
    ),
    "straight-through, as JAX's docs have it": (
        "custom gradient",
        behind(lambda x: x - lax.stop_gradient(x) + lax.stop_gradient(jnp.round(x))),
    ),
    "LinBP": ("custom gradient", behind(jc.models.linbp)),
    "custom_vjp": ("custom gradient", behind(straight_through)),
    "custom_jvp": ("custom gradient", behind(guided)),
    "custom_vjp in scan": (
        "custom gradient",
        behind(lambda x: lax.scan(lambda h, _: (straight_through(h), None), x, None, 2)[0]),
    ),
    "gradient steps": ("inner gradient", behind(purified)),
    "forward mode": ("inner gradient", behind(lambda x: jax.jvp(jnp.sin, (x,), (x,))[1])),
    "log_softmax": ("log-softmax head", headed(jax.nn.log_softmax)),
    "z - logsumexp(z)": (
        "log-softmax head",
        headed(lambda z: z - jax.nn.logsumexp(z, axis=-1, keepdims=True)),
    ),
    "log of softmax": ("log-softmax head", headed(lambda z: jnp.log(jax.nn.softmax(z) + 1e-9))),
    "sigmoid": ("saturating head", headed(jax.nn.sigmoid)),
    "scaled tanh": ("saturating head", headed(lambda z: 10 * jnp.tanh(z))),
    "erf": ("saturating head", headed(jax.scipy.special.erf)),
    "scores of clusters": ("saturating head", lambda x: CLUSTERS.scores(features(x))),
    "scores of the nearest clusters": ("saturating head", lambda x: NEAREST.scores(features(x))),
    "radial basis": (
        "saturating head", embedded(lambda h: jnp.exp(-jnp.square(h[:, :4])) @ CODEBOOK[:4])
    ),
    "exponential": ("saturating head", headed(lambda z: 2 * jnp.exp(z) - 1)),
}  # fmt: skip


@pytest.mark.parametrize("toy", CERTAIN)
def test_certain_finding(toy):
    name, model = CERTAIN[toy]
    assert found(model) == {name: "certain"}


@pytest.mark.parametrize("toy", SUSPECTED)
def test_suspected_finding(toy):
    name, model = SUSPECTED[toy]
    assert found(model) == {name: "suspected"}


# Whatever must not be found --------------------------------------------------------------------


def group_sort(h):
    return jnp.sort(h.reshape(len(h), -1, 2), axis=-1).reshape(h.shape)


def soft_threshold(h):
    return jnp.sign(h) * jnp.maximum(jnp.abs(h) - 0.1, 0)


def largest(h):
    return jnp.take_along_axis(h, h.argmax(-1, keepdims=True), axis=-1) * jnp.ones_like(h)


def attention(h):
    return jax.nn.softmax(h @ W[:, :4]) @ CODEBOOK[:4]


def with_unused_rounding(x):
    return logits(x), jnp.round(x)


PLAIN = {
    "relu": embedded(jax.nn.relu),
    "where": embedded(lambda h: jnp.where(h > 0, h, 0.1 * h)),
    "mask": embedded(lambda h: h * (h > 0)),
    "slopes": embedded(lambda h: h * jnp.where(h > 0, 1.0, 0.1)),
    "sign of itself": embedded(lambda h: h * jnp.sign(h)),
    "soft threshold": embedded(soft_threshold),
    "elu": embedded(jax.nn.elu),
    "gelu": embedded(jax.nn.gelu),
    "exact gelu": embedded(functools.partial(jax.nn.gelu, approximate=False)),
    "silu": embedded(jax.nn.silu),
    "softplus": embedded(jax.nn.softplus),
    "hard_silu": embedded(jax.nn.hard_silu),
    "clip": embedded(lambda h: jnp.clip(h, 0, 1)),
    "tanh within": embedded(jnp.tanh),
    "gate": embedded(lambda h: h * jax.nn.sigmoid(h)),
    "group sort": embedded(group_sort),
    "median": embedded(lambda h: h - jnp.median(h, axis=-1, keepdims=True)),
    "largest by index": embedded(largest),
    "largest k": embedded(lambda h: jnp.where(h >= lax.top_k(h, 2)[0][:, -1:], h, 0)),
    "sorted by index": embedded(lambda h: jnp.take_along_axis(h, jnp.argsort(h, -1), -1)),
    "attention": embedded(attention),
    "logsumexp": headed(lambda z: jax.nn.logsumexp(jnp.stack([z, 2 * z]), axis=0)),
    "gelu head": headed(jax.nn.gelu),
    "logits of clusters": lambda x: CLUSTERS(features(x)),
    "temperature of its own": embedded(lambda h: h * jnp.exp(CODEBOOK[0, 0])),
    "bump of a feature": headed(lambda z: z * jnp.exp(-jnp.square(z))),
    "layer norm": embedded(lambda h: jax.nn.standardize(h)),
    "safe norm": embedded(
        lambda h: h / jnp.where((n := jnp.linalg.norm(h)) > 1e-6, n, 1.0)
    ),
    "max-pooling": behind(lambda x: nnx.max_pool(x, (2, 2), (2, 2), "SAME")),
    "our max-pooling": behind(
        lambda x: jc.models._ops.max_pool(x, (2, 2), (2, 2), ((0, 0), (0, 0)))
    ),
    "resizing": behind(lambda x: jax.image.resize(x, (2, 9, 9, 3), "bilinear")),
    "bfloat16": behind(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)),
    "rounded weights": lambda x: features(x) @ jnp.round(W),
    "straight-through weights": lambda x: features(x) @ straight_through(jnp.asarray(W)),
    "unused rounding": lambda x: with_unused_rounding(x)[0],
    "loop of weights alone": lambda x: features(x) @ until_small(jnp.asarray(W)),
    "dropout at rest": nnx.Sequential(features, nnx.Dropout(0.5, deterministic=True), HEAD),
    "jax.checkpoint": behind(jax.checkpoint(lambda x: jnp.maximum(x, 0))),
    "scan": behind(lambda x: lax.scan(lambda h, w: (jax.nn.relu(h * w), None), x, jnp.ones(3))[0]),
    "branch by the image": embedded(lambda h: lax.cond(h.sum() > 0, lambda h: h, jnp.sin, h)),
    "a chain": jc.Chain(lambda x: 2 * x, logits),
}  # fmt: skip


@pytest.mark.parametrize("toy", PLAIN)
def test_plain_network_has_no_finding(toy):
    assert lint(PLAIN[toy], X) == ()


FAMILIES = {
    "cnn": {"widths": (4, 8), "hidden": 8},
    "resnet8": {"width": 4},
    "resnet20": {"width": 4},
    "resnet18": {"width": 4},
    "resnet34": {"width": 4, "stem": "imagenet"},
    "resnet50": {"width": 4, "stem": "imagenet", "activation": "gelu"},
    "preact_resnet18": {"width": 4},
    "wide_resnet_10_1": {"activation": "silu"},
    "vgg11": {"width": 4},
    "vgg13": {"width": 4, "blocks": (1, 2), "batch_norm": False},
    "vgg16": {"width": 4, "blocks": (1, 1)},
    "vgg19": {"width": 4, "blocks": (2,)},
    "densenet121": {"growth": 2, "blocks": (1, 1)},
    "alexnet": {"widths": (4, 4, 4, 4, 4), "hidden": (4,)},
    "lipschitz_resnet8": {"width": 4},
    "lipschitz_resnet18": {"width": 4},
}


def test_the_table_names_every_family():
    assert {name.replace("10_1", "DEPTH_WIDTH") for name in FAMILIES} == set(jc.models.names())


@pytest.mark.parametrize("name", FAMILIES)
def test_families_have_no_finding_of_their_own(name):
    arguments = tuple(sorted(FAMILIES[name].items()))
    spec = jc.models.ModelSpec(name, 5, (16, 16, 3), mean=(0.5,) * 3, arguments=arguments)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spec.abstract())
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    assert lint(zeros, x) == ()
    rounded = jc.Chain(jnp.round, zeros, jax.nn.softmax)
    assert [finding.name for finding in lint(rounded, x)] == ["rounding", "softmax head"]


def test_the_gradient_of_a_rectifier_network_is_a_step_function():
    slope = jax.grad(lambda x: jax.nn.relu(x - 0.5).sum())
    assert found(behind(slope)) == {"step function": "certain", "inner gradient": "suspected"}


# The report ------------------------------------------------------------------------------------


def test_findings_say_where_and_what_next():
    def quantise(x):
        return jnp.round(x)

    (finding,) = lint(behind(quantise), X)
    line = quantise.__code__.co_firstlineno + 1
    assert finding.detail.startswith(f"round in test_lint.py:{line}:")
    assert "quantise" in finding.detail and "BPDA" in finding.advice
    (finding,) = lint(behind(straight_through), X)
    assert "straight_through (test_lint.py:" in finding.detail


def test_a_rule_reports_once_and_counts_its_places():
    def five(x):
        for step in range(5):
            x = jnp.sin(jnp.round(x)) + jnp.cos(x) if step % 2 else jnp.floor(x) + jnp.cos(x)
        return x

    def nine(x):
        steps = [jnp.round, jnp.floor, jnp.ceil, lambda x: jnp.round(x), lambda x: jnp.floor(x)]
        return sum(step(x) for step in steps)

    (finding,) = lint(behind(five), X)
    assert finding.detail.count(" in ") == 2  # one for each primitive and line
    (finding,) = lint(behind(nine), X)
    assert finding.detail.count(" in ") == 3 and finding.detail.endswith("and 2 more")


def test_several_findings_come_certain_ones_first():
    model = headed(lambda z: jnp.tanh(jnp.sign(z) + z))
    names = [(finding.name, finding.severity) for finding in lint(model, X)]
    assert names == [("sign", "certain"), ("saturating head", "suspected")]


def test_changed_code_is_traced_anew():
    parts = [lambda x: x]

    def model(x):
        return logits(parts[0](x))

    assert lint(model, X) == ()
    parts[0] = jnp.round
    assert [finding.name for finding in lint(model, X)] == ["rounding"]


def test_bad_arguments():
    with pytest.raises(TypeError, match="^`model` must be a callable from images to logits, got <"):
        inspect.unwrap(lint)(3, X)
    with pytest.raises(ValueError, match=r"`x` must be images \[b, h, w, c\], got shape \(2, 3\)"):
        lint(logits, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"`x` must be images .* got shape \(\)"):
        lint(logits, 1.0)
    with pytest.raises(TypeError, match="`x` must be of a floating-point dtype, got uint8"):
        lint(logits, np.zeros((2, 6, 6, 3), np.uint8))
    with pytest.raises(ValueError, match="`model` must return one array of logits, got 2"):
        lint(with_unused_rounding, X)
