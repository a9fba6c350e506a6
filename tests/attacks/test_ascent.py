"""FGSM, PGD and MI-FGSM on linear models, where every number they give is known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxclus import losses
from jaxclus.attacks import FGSM, MIFGSM, PGD
from jaxclus.threat import L1, L2, Linf, image_keys

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
ATTACKS = {"fgsm": FGSM, "pgd": PGD, "mi-fgsm": MIFGSM}


def predict(params, x):
    """Logits (0, <w, x> + bias): for label 0 the margin loss is <w, x> + bias itself."""
    score = x.reshape(x.shape[0], -1) @ params["w"].reshape(-1) + params["bias"]
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def linear(bias=-3.0, seed=0):
    """A linear model with slopes between 0.05 and 0.35 of both signs."""
    rng = np.random.default_rng(seed)
    w = rng.permuted(np.linspace(0.05, 0.35, 16)) * rng.choice([-1, 1], size=16)
    params = {"w": jnp.float32(w.reshape(SHAPE)), "bias": jnp.float32(bias)}
    return Partial(predict, params), w.reshape(1, *SHAPE)


def images(low=0.0, high=1.0, size=6, seed=1):
    x = np.random.default_rng(seed).uniform(low, high, size=(size, *SHAPE))
    return jnp.asarray(x, jnp.float32), jnp.zeros(size, jnp.int32)


def score(w, x, bias=-3.0):
    return (np.float64(x) * w).reshape(len(x), -1).sum(axis=1) + bias


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("name", ATTACKS)
def test_linf_optimum(name, loss):
    """x + eps sign(w), cut by the box."""
    (x, y), (model, w) = images(), linear()
    result = ATTACKS[name](Linf(0.1), loss=loss).run(KEY, model, x, y)
    expected = np.clip(x + 0.1 * np.sign(w), 0, 1)
    np.testing.assert_allclose(result.x_adv, expected, rtol=0, atol=1e-6)
    assert not np.any(result.success)


L2_ATTACKS = {"fgsm": FGSM(L2(0.3)), "mi-fgsm": MIFGSM(L2(0.3), loss="margin")}
L2_ATTACKS["pgd"] = PGD(L2(0.3), steps=30, step_size=0.3, loss="margin")


@pytest.mark.parametrize("name", ATTACKS)
def test_l2_optimum_inside_the_box(name):
    """x + eps w / |w|; the loss is flat there: 1e-3 in an image changes it by 1e-6."""
    (x, y), (model, w) = images(0.4, 0.6), linear()
    result = L2_ATTACKS[name].run(KEY, model, x, y)
    expected = x + 0.3 * w / np.linalg.norm(w)
    assert expected.min() > 0 and expected.max() < 1
    tolerance = 1e-3 if name == "pgd" else 1e-6  # PGD starts anywhere
    np.testing.assert_allclose(result.x_adv, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(score(w, result.x_adv), score(w, expected), rtol=0, atol=2e-6)
    last = jax.jit(L2_ATTACKS[name].perturb)(image_keys(KEY, jnp.arange(len(x))), model, x, y)
    np.testing.assert_allclose(last, expected, rtol=0, atol=1e-5)


def l1_optimum(w, x, eps):
    """The largest slopes first, each pixel as far as the box lets it go."""
    out = np.float64(x).copy()
    for image in out.reshape(len(x), -1):
        left = eps
        for i in np.argsort(-np.abs(w.reshape(-1))):
            room = 1 - image[i] if w.reshape(-1)[i] > 0 else image[i]
            image[i] += np.sign(w.reshape(-1)[i]) * min(room, left)
            left -= min(room, left)
    return out


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(L1(0.2)),
        MIFGSM(L1(0.2)),
        PGD(L1(0.2), steps=20, step_size=0.2, loss="margin"),
    ],
    ids=ATTACKS,
)
def test_l1_optimum_of_one_pixel(attack):
    (x, y), (model, w) = images(0.25, 0.75), linear()
    result = attack.run(KEY, model, x, y)
    np.testing.assert_allclose(result.x_adv, l1_optimum(w, x, 0.2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "attack",
    [MIFGSM(L1(1.5), steps=200), PGD(L1(1.5), steps=2000, step_size=0.02, loss="margin")],
    ids=["mi-fgsm", "pgd"],
)
def test_l1_optimum_of_several_pixels(attack):
    """Within 2 % of the possible rise, for steps are quanta.

    PGD takes many: only one pixel in a hundred moves, and what the random start put elsewhere
    drains slowly.
    """
    (x, y), (model, w) = images(0.25, 0.75), linear()
    rise = score(w, attack(KEY, model, x, y)) - score(w, x)
    possible = score(w, l1_optimum(w, x, 1.5)) - score(w, x)
    assert np.all(rise <= possible + 1e-6)
    assert np.all(rise >= 0.98 * possible)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3), L1(0.2)], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ATTACKS)
def test_perturb_is_the_last_iterate(name, threat):
    """A loop written out here, with the known gradient; verdicts do not matter."""
    # L1 away from the box: whether a pixel stands at its edge is a question of the last bit.
    (x, y), (model, w) = images(*((0.3, 0.7) if threat.name == "l1" else (0, 1))), linear(bias=0.0)
    y = y.at[::2].set(1)  # some images are misclassified from the start
    assert 0 < np.sum(np.argmax(model(x), axis=1) != y) < len(x)
    attack = ATTACKS[name](threat, loss="margin")
    keys = image_keys(KEY, jnp.arange(len(x)))
    grad = jnp.where(y[:, None, None, None] == 0, 1, -1) * jnp.float32(w)
    steps, length = {
        "fgsm": (1, threat.eps),
        "pgd": (10, threat.eps / 4),
        "mi-fgsm": (10, threat.eps / 10),
    }[name]

    @jax.jit
    def expected():
        iterate = threat.random_start(keys, x) if name == "pgd" else x
        for _ in range(steps):
            iterate = threat.project(iterate + length * threat.step(grad, iterate), x)
        return iterate

    perturbed = jax.jit(attack.perturb)(keys, model, x, y)
    np.testing.assert_allclose(perturbed, expected(), rtol=0, atol=1e-6)


def test_queries_of_fgsm():
    """Clean verdict, iterates 0 and 1, final verdict; one gradient."""
    x = jnp.full((3, 1, 1, 1), 0.5)
    params = {"w": jnp.ones((1, 1, 1)), "bias": jnp.float32(-0.55)}
    x = x.at[0].set(0.6).at[2].set(0.2)  # wrong from the start; broken by the step; never
    result = FGSM(Linf(0.1)).run(KEY, Partial(predict, params), x, jnp.zeros(3, int))
    np.testing.assert_array_equal(result.success, [True, True, False])
    np.testing.assert_array_equal(result.queries.forward, [1, 4, 4])
    np.testing.assert_array_equal(result.queries.gradient, [0, 1, 1])
    np.testing.assert_allclose(result.x_adv.ravel(), [0.6, 0.6, 0.3], atol=1e-6)


def test_queries_of_mi_fgsm():
    """Image i breaks at iterate i of 0 to 4 (steps of 0.1); the last one never.

    The gradient at an iterate comes with its logits, so breaking at iterate j took j + 1 of both,
    but for the last, j = 4, where no gradient is asked for any more.
    """
    x = 0.55 - 0.1 * jnp.arange(1, 6).reshape(5, 1, 1, 1)
    x = jnp.concatenate([jnp.full((1, 1, 1, 1), 0.9), x])
    params = {"w": jnp.ones((1, 1, 1)), "bias": jnp.float32(-0.5)}
    result = MIFGSM(Linf(0.4), steps=4).run(KEY, Partial(predict, params), x, jnp.zeros(6, int))
    np.testing.assert_array_equal(result.success, [True, True, True, True, True, False])
    np.testing.assert_array_equal(result.queries.forward, [1, 4, 5, 6, 7, 7])
    np.testing.assert_array_equal(result.queries.gradient, [0, 2, 3, 4, 4, 4])
    # The first success is kept, else the iterate of highest loss.
    np.testing.assert_allclose(result.norm, [0, 0.1, 0.2, 0.3, 0.4, 0.4], atol=1e-6)


def test_queries_of_pgd():
    """The start of each restart is known, so is the first iterate above the threshold."""
    steps, size, eps, count = 3, 0.05, 0.2, 40
    attack = PGD(Linf(eps), steps=steps, step_size=size, restarts=2)
    x = jnp.asarray(np.random.default_rng(0).uniform(0.25, 0.49, (count, 1, 1, 1)), jnp.float32)
    params = {"w": jnp.ones((1, 1, 1)), "bias": jnp.float32(-0.5)}
    result = attack.run(KEY, Partial(predict, params), x, jnp.zeros(count, int), trace=True)
    keys = image_keys(KEY, jnp.arange(count))
    paths = []  # [restarts, steps + 1, b]
    for restart in range(2):
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys, restart)
        start = attack.threat.random_start(folded, x)
        moves = [jnp.minimum(start + i * size, x + eps).ravel() for i in range(steps + 1)]
        paths.append(jnp.stack(moves))
    paths = np.stack(paths)
    margins = np.log1p(np.exp(np.float64(paths) - 0.5))
    np.testing.assert_allclose(result.trace, margins, rtol=0, atol=1e-6)
    flat = paths.reshape(-1, count)
    assert np.abs(flat - 0.5).min() > 1e-5
    kinds = set()
    for i in range(count):
        above = np.flatnonzero(flat[:, i] > 0.5)
        asked = above[0] + 1 if len(above) else len(flat)
        gradients = asked - asked // (steps + 1)  # the last iterate of a restart has none
        kinds.add((len(above) > 0, asked > steps + 1))
        assert result.success[i] == (len(above) > 0)
        assert result.queries.forward[i] == 1 + asked + 1
        assert result.queries.gradient[i] == gradients
        kept = flat[above[0], i] if len(above) else flat[:, i].max()
        np.testing.assert_allclose(result.x_adv[i].item(), kept, rtol=0, atol=1e-6)
    assert len(kinds) == 3  # broken in the first restart, in the second, never


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ATTACKS)
def test_trace_rises_on_a_linear_loss(name, threat):
    (x, y), (model, w) = images(), linear()
    attack = ATTACKS[name](threat, loss="margin")
    result = attack.run(KEY, model, x, y, trace=True)
    assert result.trace.shape == (1, 2 if name == "fgsm" else 11, len(x))
    assert np.all(np.diff(result.trace, axis=1) >= -1e-6)
    np.testing.assert_allclose(score(w, result.x_adv), result.trace.max(axis=(0, 1)), atol=1e-6)
    if name != "pgd":
        np.testing.assert_allclose(result.trace[0, 0], score(w, x), atol=1e-6)


def test_trace_of_every_restart():
    (x, y), (model, w) = images(), linear()
    attack = PGD(Linf(0.3), steps=4, restarts=3, loss="margin")
    result = attack.run(KEY, model, x, y, jnp.arange(6) + 10, trace=True)
    assert result.trace.shape == (3, 5, 6)
    for restart in range(3):
        keys = jax.vmap(jax.random.fold_in, (0, None))(image_keys(KEY, jnp.arange(6) + 10), restart)
        start = attack.threat.random_start(keys, x)
        np.testing.assert_allclose(result.trace[restart, 0], score(w, start), atol=1e-6)
    np.testing.assert_allclose(score(w, result.x_adv), result.trace.max(axis=(0, 1)), atol=1e-6)


def test_momentum():
    """g <- decay g + grad / |grad|_1, by hand on a loss whose gradient turns."""

    def turning(params, x):
        a, b = x[:, 0, 0, 0], x[:, 0, 1, 0]
        return jnp.stack([jnp.zeros_like(a), 4 * a - 6 * a**2 + b - 10], axis=-1)

    eps, steps, decay = 0.3, 6, 0.9
    attack = MIFGSM(L2(eps), steps=steps, decay=decay, loss="margin")
    x = np.array([0.2, 0.5])
    z, memory = x.copy(), np.zeros(2)
    for _ in range(steps):
        grad = np.array([4 - 12 * z[0], 1.0])
        memory = decay * memory + grad / np.abs(grad).sum()
        z = z + eps / steps * memory / np.linalg.norm(memory)  # never outside the ball
    model, batch = Partial(turning, {"unused": jnp.zeros(1)}), jnp.float32(x).reshape(1, 1, 2, 1)
    keys = image_keys(KEY, jnp.arange(1))
    out = attack.perturb(keys, model, batch, jnp.array([0])).ravel()
    np.testing.assert_allclose(out, z, atol=1e-6)
    plain = dataclasses.replace(attack, decay=0.0).perturb(keys, model, batch, jnp.array([0]))
    assert abs(plain.ravel()[0] - z[0]) > 0.04


def test_zero_gradients_leave_the_image():
    x, y = images()
    flat = Partial(predict, {"w": jnp.zeros(SHAPE), "bias": jnp.float32(-1.0)})
    for threat in (Linf(0.1), L2(0.3), L1(0.5)):
        for attack in (FGSM(threat), MIFGSM(threat)):
            result = attack.run(KEY, flat, x, y)
            np.testing.assert_allclose(result.x_adv, x, rtol=0, atol=1e-6)
            assert np.all(np.isfinite(result.x_adv)) and not np.any(result.success)


def test_default_step_size():
    (x, y), (model, _) = images(), linear()
    given = PGD(Linf(0.1), steps=5, step_size=0.05).run(KEY, model, x, y, trace=True)
    default = PGD(Linf(0.1), steps=5).run(KEY, model, x, y, trace=True)
    np.testing.assert_allclose(default.trace, given.trace, atol=1e-6)


def test_own_loss():
    """A callable is a loss too; minus the margin descends."""
    (x, y), (model, w) = images(), linear()
    attack = FGSM(Linf(0.1), loss=lambda logits, y: -losses.margin(logits, y))
    last = attack.perturb(image_keys(KEY, jnp.arange(len(x))), model, x, y)
    np.testing.assert_allclose(last, np.clip(x - 0.1 * np.sign(w), 0, 1), atol=1e-6)


def validated(cls, **values):
    """An object that passed only the checks of `cls`; in tests its annotations come before them."""
    attack = dataclasses.replace(cls(Linf(0.1)))
    for name, value in values.items():
        object.__setattr__(attack, name, value)
    attack.__post_init__()


@pytest.mark.parametrize(
    "cls, name, value, error, message",
    [
        *[(cls, "steps", 0, ValueError, "must be at least 1, got 0") for cls in (PGD, MIFGSM)],
        *[(cls, "steps", 2.0, TypeError, "must be an integer of at") for cls in (PGD, MIFGSM)],
        *[(cls, "steps", True, TypeError, "must be an integer of at") for cls in (PGD, MIFGSM)],
        (PGD, "restarts", 0, ValueError, "must be at least 1, got 0"),
        (PGD, "restarts", "2", TypeError, "must be an integer of at least 1, got '2'"),
        (PGD, "step_size", 0.0, ValueError, "must be a finite number above 0, got 0.0"),
        (PGD, "step_size", -0.1, ValueError, "must be a finite number above 0, got -0.1"),
        (PGD, "step_size", math.nan, ValueError, "must be a finite number above 0, got nan"),
        (PGD, "step_size", math.inf, ValueError, "must be a finite number above 0, got inf"),
        (PGD, "step_size", True, TypeError, "must be a number above 0, got True"),
        (PGD, "step_size", "0.1", TypeError, "must be a number above 0, got '0.1'"),
        (MIFGSM, "decay", -1.0, ValueError, "must be a finite number of at least 0, got -1.0"),
        (MIFGSM, "decay", math.nan, ValueError, "must be a finite number of at least 0"),
        (MIFGSM, "decay", None, TypeError, "must be a number of at least 0, got None"),
        *[
            (cls, "loss", "hinge", ValueError, "must be one of cross_entropy, dlr, margin; got ")
            for cls in (FGSM, PGD, MIFGSM)
        ],
        *[(cls, "threat", 0.1, TypeError, "must be one as Linf") for cls in (FGSM, PGD, MIFGSM)],
    ],
)
def test_bad_hyper_parameters(cls, name, value, error, message):
    with pytest.raises(error, match=f"^`{name}` {message}") as raised:
        validated(cls, **{name: value})
    assert "\n" not in str(raised.value)
    with pytest.raises((error, TypeError), match=name):
        cls(**{"threat": Linf(0.1), name: value})


def test_good_hyper_parameters():
    validated(PGD, steps=1, restarts=1, step_size=1)
    validated(PGD, steps=np.int64(3), step_size=np.float32(0.1))
    validated(MIFGSM, steps=1, decay=0)
    with pytest.raises(TypeError):
        FGSM(Linf(0.1), steps=3)
