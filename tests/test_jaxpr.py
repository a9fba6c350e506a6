import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxclus import _jaxpr

W = jax.random.normal(jax.random.key(0), (3, 4, 4))
X = jax.random.normal(jax.random.key(1), (2, 4))


def identity(x):
    return x


def nested_jit(act):
    return lambda w, x: jax.jit(lambda x: act(jax.jit(lambda x: act(x @ w[0]))(x)) @ w[1])(x)


def remat(act):
    return lambda w, x: jax.checkpoint(lambda x: act(x @ w[0]))(x) @ w[1]


def scan_over_layers(act):
    return lambda w, x: lax.scan(lambda h, w: (act(h @ w), None), x, w)[0]


def scan_with_outputs(act):
    # The body has a constant, carried values, scanned values and stacked outputs.
    def fn(w, x):
        def step(h, wi):
            h = act(h @ wi + x)
            return h, 2 * act(h @ w[0])

        h, stacked = lax.scan(step, x, w, reverse=True)
        return h + stacked.sum(0)

    return fn


def scan_of_a_delayed_value(act):
    # The first carried value depends on the images from the second round on.
    def fn(w, x):
        def step(carry, wi):
            a, b, count = carry
            return (b, act(a) + x @ wi, count + 1), None

        return lax.scan(step, (jnp.zeros_like(x), jnp.zeros_like(x), 0), w)[0][1]

    return fn


def fori_loop(act):
    return lambda w, x: lax.fori_loop(0, 3, lambda i, h: act(h @ w[i]), x)


def while_loop(act):
    def fn(w, x):
        def body(carry):
            i, h = carry
            return i + 1, act(h @ w[i])

        return lax.while_loop(lambda carry: carry[0] < 2, body, (0, x))[1]

    return fn


def cond(act):
    return lambda w, x: lax.cond(
        w[0, 0, 0] > 5.0, lambda x: x, lambda x: act(x @ w[1]) @ w[2] + w[0, :1], x
    )


def switch(act):
    return lambda w, x: lax.switch(2, [lambda x: x, act, lambda x: act(-x)], x)


def custom_vjp(act):
    def fn(w, x):
        @jax.custom_vjp
        def layer(x):
            return act(x @ w[0])

        layer.defvjp(lambda x: (layer(x), None), lambda _, g: (g @ w[0].T,))
        return layer(x)

    return fn


def custom_jvp(act):
    def fn(w, x):
        @jax.custom_jvp
        def layer(x):
            return act(x @ w[0])

        layer.defjvp(lambda primals, tangents: (layer(*primals), tangents[0] @ w[0]))
        return layer(x)

    return fn


NESTED = [
    nested_jit, remat, scan_over_layers, scan_with_outputs, scan_of_a_delayed_value, fori_loop,
    while_loop, cond, switch, custom_vjp, custom_jvp,
]  # fmt: skip


@pytest.mark.parametrize("form", NESTED)
def test_nested_programs_are_rewritten_inside(form):
    exact = form(jax.nn.relu)(W, X)
    wanted = form(identity)(W, X)
    assert np.abs(exact - wanted).max() > 0.1  # there is something to rewrite
    out = jax.jit(lambda w, x: _jaxpr.linear_call(form(jax.nn.relu), w, x))(W, X)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    names = _jaxpr.nonlinear_primitives(form(identity), W, X)
    assert names == (("while",) if form is while_loop else ())
    assert "max" in _jaxpr.nonlinear_primitives(form(jax.nn.relu), W, X)


def test_activations_of_weights_alone_stay():
    def fn(w, x):
        scale = lax.fori_loop(0, 2, lambda i, s: s + jax.nn.relu(w[i]), jnp.tanh(w[2]))
        return jax.nn.relu(x @ jax.nn.gelu(scale) @ jnp.maximum(w[1], 0))

    scale = jax.nn.relu(W[0]) + jax.nn.relu(W[1]) + jnp.tanh(W[2])
    wanted = X @ jax.nn.gelu(scale) @ jnp.maximum(W[1], 0)
    np.testing.assert_allclose(_jaxpr.linear_call(fn, W, X), wanted, rtol=1e-5, atol=1e-5)


def test_calls_with_nothing_to_rewrite_keep_their_derivative():
    def fn(w, x):
        @jax.custom_vjp
        def layer(w, x):
            return x @ w

        layer.defvjp(lambda w, x: (layer(w, x), w), lambda w, g: (w, 100 * g))
        return jax.nn.relu(layer(w[0], x))

    gradient = jax.grad(lambda x: _jaxpr.linear_call(fn, W, x).sum())(X)
    np.testing.assert_array_equal(gradient, jnp.full_like(X, 100))


def test_rematerialisation_stays():
    rewritten = jax.make_jaxpr(lambda w, x: _jaxpr.linear_call(remat(jax.nn.relu), w, x))(W, X)
    assert [eqn.primitive.name for eqn in rewritten.eqns].count("remat2") == 1


def test_a_branch_or_a_length_that_depends_on_the_images_is_named():
    def branch(w, x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ w[0], lambda x: x, x)

    def rounds(w, x):
        start = (x[0, 0], w[0])
        return x @ lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ w[1]), start)[1]

    assert "cond" in _jaxpr.nonlinear_primitives(branch, W, X)
    # The matrix is multiplied as often as the image says, so the product has two such factors.
    assert set(_jaxpr.nonlinear_primitives(rounds, W, X)) >= {"while", "dot_general"}


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: 2 * x - x / 3 + w[0, :2] * x - 1,
        lambda w, x: jnp.concatenate([x, -x], axis=1).reshape(4, 4).T[::-1],
        lambda w, x: jnp.pad(x, 1)[:, 1:4].sum(0) + jnp.cumsum(x, axis=1).mean(),
        lambda w, x: x[:, jnp.array([3, 1])],
        lambda w, x: lax.dynamic_slice(x, (0, 1), (2, 2)),
        lambda w, x: lax.dynamic_update_slice(x, 3 * x[:1, :2], (1, 1)),
        lambda w, x: jnp.zeros((5, 4)).at[jnp.array([0, 0])].add(x).at[3].set(x[0]),
        lambda w, x: jnp.where(w[0, :2] > 0, x, 2 * x),
        lambda w, x: jnp.einsum("bi,ij->bj", x, w[0]),
        lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * 2, axis=1),
        lambda w, x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "SAME"),
        lambda w, x: jnp.tile(jnp.repeat(x, 2, axis=0), (1, 2)),
    ],
)
def test_affine_programs_have_no_primitive_in_the_way(fn):
    assert _jaxpr.nonlinear_primitives(fn, W, X) == ()
    zero = fn(W, jnp.zeros_like(X))
    np.testing.assert_allclose(fn(W, 3 * X) - zero, 3 * (fn(W, X) - zero), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (lambda w, x: jnp.tanh(x), {"tanh"}),
        (lambda w, x: x * x[:, ::-1], {"mul"}),
        (lambda w, x: w[0, :2] / x, {"div"}),
        (lambda w, x: x @ x.T, {"dot_general"}),
        (lambda w, x: jnp.sort(x, axis=1), {"sort"}),
        (lambda w, x: jnp.round(x), {"round"}),
        (lambda w, x: jnp.where(x > 0, w[0, :2], w[1, :2]), {"gt", "select_n"}),
        (lambda w, x: x.astype(int).astype(jnp.float32), {"convert_element_type"}),
        (lambda w, x: lax.stop_gradient(x), {"stop_gradient"}),
        (lambda w, x: jax.nn.softmax(x), {"exp", "div"}),
        (lambda w, x: lax.dynamic_slice(x, (0, x[0, 0].astype(int)), (2, 2)), {"dynamic_slice"}),
        (lambda w, x: jax.jit(jax.checkpoint(jnp.sin))(x), {"sin"}),
    ],
)
def test_what_is_not_affine_is_named(fn, names):
    assert names <= set(_jaxpr.nonlinear_primitives(fn, W, X))


def test_dead_code_is_not_named():
    def fn(w, x):
        jnp.exp(x)
        return x @ w[0]

    assert _jaxpr.nonlinear_primitives(fn, W, X) == ()


def influence(fn):
    return _jaxpr.Influence(_jaxpr.dataflow(fn, W, X))


def need_of(name, found):
    """What the outputs of the operations of one name are needed for."""
    return {found.need(op) for op in found.flow.operations if op.name == name}


@pytest.mark.parametrize("form", NESTED)
def test_nested_programs_are_flattened(form):
    found = influence(form(jnp.sin))
    (output,) = found.flow.outputs
    assert output in found.dependent and output in found.smooth
    wanted = {_jaxpr.Need.VALUE}
    if form in (custom_vjp, custom_jvp):  # the rule's own derivative passes by what is inside
        wanted = {_jaxpr.Need.SELECTION}
    assert need_of("sin", found) == wanted
    sines = [op for op in found.flow.operations if op.name == "sin"]
    assert all(found.depends(op) and op.place.startswith("test_jaxpr.py:") for op in sines)
    blind = _jaxpr.Influence(_jaxpr.dataflow(lambda w, x: form(jnp.sin)(w, w[2, :2]), W, X))
    assert blind.dependent == {blind.flow.images}


@pytest.mark.parametrize(
    ("fn", "name", "need"),
    [
        (lambda w, x: jnp.where(x > 0, x, 0), "gt", "SELECTION"),
        (lambda w, x: jnp.where(x > 0, w[0, :2], 0), "gt", "VALUE"),
        (lambda w, x: lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x + 1, x), "gt", "SELECTION"),
        (lambda w, x: lax.cond(x[0, 0] > 0, lambda: w[0], lambda: w[1]), "gt", "VALUE"),
        (lambda w, x: x * (x > 0), "gt", "FACTOR"),
        (lambda w, x: x @ (x > 0).T, "gt", "FACTOR"),
        (lambda w, x: x * (1.0 - (x > 0) * 0.5), "gt", "FACTOR"),
        (lambda w, x: x + (x > 0), "gt", "VALUE"),
        (lambda w, x: x + x * (x > 0), "gt", "FACTOR"),
        (lambda w, x: x[jnp.argmax(x[:, 0])], "argmax", "SELECTION"),
        (lambda w, x: w[jnp.argmax(x[0])], "argmax", "VALUE"),
        (lambda w, x: jnp.asarray(x).at[jnp.argmax(x[:, 0])].set(0), "argmax", "SELECTION"),
        (lambda w, x: w[0].at[jnp.argmax(x[0])].set(0.0), "argmax", "VALUE"),
        (lambda w, x: jnp.take_along_axis(x, jnp.argsort(x), 1), "sort", "SELECTION"),
        (lambda w, x: jnp.sort(x), "sort", "VALUE"),
        (
            lambda w, x: lax.dynamic_slice(x, (jnp.argmax(x[:, 0]), 0), (1, 2)),
            "argmax",
            "SELECTION",
        ),
        (
            lambda w, x: lax.while_loop(lambda h: h[0, 0] > 0, lambda h: h - 1, x),
            "gt",
            "SELECTION",
        ),
        (lambda w, x: lax.while_loop(lambda i: x[0, 0] > i, lambda i: i + 1, 0), "gt", "VALUE"),
        (lambda w, x: x + lax.stop_gradient(jnp.sin(x)), "sin", "SELECTION"),
        (lambda w, x: lax.stop_gradient(jnp.sin(x)), "sin", "VALUE"),
        (lambda w, x: (x, jnp.sin(x))[0], "sin", "NOTHING"),
    ],
)
def test_what_a_value_is_needed_for(fn, name, need):
    assert need_of(name, influence(fn)) == {_jaxpr.Need[need]}


@pytest.mark.parametrize(
    ("fn", "smooth"),
    [
        (lambda w, x: jnp.round(x), False),
        (lambda w, x: jnp.round(x) + 1e-3 * x, True),
        (lambda w, x: x.astype(int).astype(float), False),
        (lambda w, x: jnp.sort(x), True),
        (lambda w, x: jnp.argsort(x), False),
        (lambda w, x: jnp.where(x > 0, 1.0, 0.0), False),
        (lambda w, x: lax.stop_gradient(x), False),
        (lambda w, x: custom_vjp(jnp.round)(w, x), True),  # as its rule has it
        (lambda w, x: lax.scan(lambda h, wi: (jnp.round(h @ wi), None), x, w)[0], True),
        (lambda w, x: jnp.round(lax.scan(lambda h, wi: (h @ wi, None), x, w)[0]), False),
    ],
)
def test_where_a_derivative_ends(fn, smooth):
    found = influence(fn)
    (output,) = found.flow.outputs
    assert output in found.dependent and (output in found.smooth) == smooth
