"""ClusTR's objectives on a linear embedding, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from clustr_problems import full_magnet, magnet, nearest_own
from flax import nnx
from objective_problem import (
    BALL,
    CENTRES,
    CLEAN,
    IDS,
    IMAGES,
    KEY,
    KEYS,
    KINDS,
    LABELS,
    PER_CLASS,
    RNG,
    SETTINGS,
    SHAPE,
    STATE,
    TO,
    VARIANCE,
    WEIGHT,
    X_ADV,
    B,
    Embedding,
    M,
    N,
    X,
    Y,
    assert_gradient,
    embed,
    gap,
    log_softmax,
    loss_and_gradient,
    numeric,
    scores_of,
    state_of,
)

import jaxclus as jc
from jaxclus.clustr import QTRADES, ClusTR, ClusTRTRADES, FreeClusTR
from jaxclus.training.objectives import AWP, Seen, over_images


def test_the_first_state_holds_the_clusters_of_each_class():
    h = embed(IMAGES / 255)
    assert STATE.head.centre_classes == (0, 0, 1, 1, 2, 2, 3, 3)
    cluster = np.asarray(STATE.members.cluster)
    np.testing.assert_array_equal(cluster // PER_CLASS, LABELS)
    for n in range(N):
        own = CENTRES[2 * LABELS[n] : 2 * LABELS[n] + 2]
        assert cluster[n] % 2 == np.sum((own - h[n]) ** 2, axis=1).argmin()
    for j in range(8):
        np.testing.assert_allclose(CENTRES[j], h[cluster == j].mean(axis=0), atol=1e-5)
    own = nearest_own(h, LABELS, CENTRES, STATE.head.centre_classes)
    assert pytest.approx(own.sum() / (N - 1), rel=1e-5) == VARIANCE
    wanted = full_magnet(h, LABELS, CENTRES, STATE.head.centre_classes, 1.0).mean()
    assert STATE.full_loss == pytest.approx(wanted, rel=1e-5)
    assert (np.asarray(STATE.losses) == -1).all()
    published = state_of(dataclasses.replace(KINDS["clustr"], as_published=True))
    wanted = full_magnet(h, LABELS, CENTRES, STATE.head.centre_classes, 1.0, True).mean()
    assert published.full_loss == pytest.approx(wanted, rel=1e-5)


def test_a_refresh_keeps_losses_and_finds_clusters_of_the_new_embeddings():
    state = dataclasses.replace(STATE, losses=jnp.arange(96.0))
    images, labels = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    new = KINDS["clustr"].refresh(KEY, Embedding(2 * WEIGHT), images, labels, state)
    np.testing.assert_allclose(new.head.centres, 2 * CENTRES, rtol=1e-4, atol=1e-5)
    assert float(new.head.variance) == pytest.approx(4 * VARIANCE, rel=1e-4)
    np.testing.assert_array_equal(new.losses, state.losses)


def test_a_batch_is_a_seed_and_its_nearest_clusters_of_other_classes():
    cluster, seeds = np.asarray(STATE.members.cluster), []
    losses = np.where(cluster == 3, 5.0, np.where(cluster == 6, 15.0, 0.0))
    state = dataclasses.replace(STATE, losses=jnp.asarray(losses, jnp.float32))
    gaps = np.linalg.norm(CENTRES[:, None] - CENTRES, axis=2)
    draw = jax.jit(lambda key: KINDS["clustr"].batch(key, jnp.int32(0), state, B))
    for key in jax.random.split(KEY, 60):
        index = np.asarray(draw(key))
        of = cluster[index].reshape(M, B // M)
        assert (of == of[:, :1]).all()
        seed, *others = of[:, 0].tolist()
        rivals = [j for j in np.argsort(gaps[seed]) if j // 2 != seed // 2]
        assert sorted(others) == sorted(rivals[: M - 1])
        for j, chosen in zip(of[:, 0], index.reshape(M, -1), strict=True):
            assert len(set(chosen.tolist())) == min(B // M, (cluster == j).sum())
        seeds.append(seed)
    assert set(seeds) == {3, 6} and 30 <= seeds.count(6) <= 57


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_loss_is_the_mean_magnet_loss(weight, as_published):
    objective = ClusTR(**SETTINGS, cross_entropy_weight=weight, as_published=as_published)
    found, gradient = loss_and_gradient(objective)
    z = scores_of(X_ADV)

    def reference(w):
        h = embed(X_ADV, w)
        total = magnet(h, IDS, Y, 1.0).mean()
        z = scores_of(X_ADV, w)
        z = z if as_published else np.log(z)
        return total - weight * log_softmax(z)[np.arange(B), Y].mean()

    assert found.loss == pytest.approx(reference(WEIGHT), rel=1e-4)
    np.testing.assert_allclose(found.noted, magnet(embed(X_ADV), IDS, Y, 1.0), rtol=1e-4)
    np.testing.assert_allclose(found.logits, np.log(z), rtol=1e-4, atol=1e-4)
    assert found.metrics["accuracy"] == pytest.approx((z.argmax(axis=1) == Y).mean())
    assert found.metrics["magnet_loss"] == pytest.approx(magnet(embed(X_ADV), IDS, Y, 1.0).mean())
    assert KINDS["clustr"].summary(STATE) == {"full_magnet_loss": STATE.full_loss}
    assert_gradient(gradient, reference)


def test_losses_are_stored_at_their_images():
    index = jnp.asarray(np.arange(B) * 2)
    seen = Seen(index, CLEAN, CLEAN, jnp.zeros(X.shape), jnp.arange(24.0))
    losses = np.asarray(KINDS["clustr"].update(STATE, seen).losses)
    np.testing.assert_array_equal(losses[:48:2], np.arange(24))
    assert (losses[1:48:2] == -1).all() and (losses[48:] == -1).all()


@pytest.mark.parametrize("name", ["qtrades", "trades"])
def test_the_consistency_term(name):
    found, gradient = loss_and_gradient(KINDS[name])

    def reference(w):
        # The Magnet loss sees the clean images here.
        return magnet(embed(X, w), IDS, Y, 1.0).mean() + 2 * gap(X, scores_of(X_ADV, w), w).mean()

    assert found.loss == pytest.approx(reference(WEIGHT), rel=1e-4)
    assert found.metrics["consistency"] == pytest.approx(gap(X, scores_of(X_ADV)).mean(), rel=1e-4)
    assert_gradient(gradient, reference)
    # Objectives around it act on the adversarial images.
    np.testing.assert_allclose(found.logits, STATE.head(embed(X_ADV).astype("f4")), rtol=1e-4)


def test_qtrades_takes_one_step_up_the_cross_entropy():
    for size in (None, 0.03):
        objective = dataclasses.replace(KINDS["qtrades"], step_size=size)
        found = np.asarray(objective.perturb(KEYS, Embedding(), CLEAN, TO, STATE))
        start = np.asarray(BALL.random_start(KEYS, CLEAN), np.float64)
        slope = numeric(lambda x: gap(X, scores_of(x)).sum(), start)
        wanted = start + (0.125 if size is None else size) * np.sign(slope)
        wanted = np.clip(np.clip(wanted, X - 0.1, X + 0.1), 0, 1)
        sure = np.abs(slope) > 1e-5
        assert sure.mean() > 0.95
        np.testing.assert_allclose(found[sure], wanted[sure], atol=1e-6)


def test_the_adversary_of_trades_raises_the_divergence():
    x_adv = np.asarray(KINDS["trades"].perturb(KEYS, Embedding(), CLEAN, TO, STATE))
    assert np.abs(x_adv - X).max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1

    def divergence(x):
        clean, moved = log_softmax(scores_of(X)), log_softmax(scores_of(x))
        return (np.exp(clean) * (clean - moved)).sum(axis=1)

    random = np.asarray(BALL.random_start(KEYS, CLEAN))
    assert (divergence(x_adv) > divergence(random)).mean() > 0.9
    # One step: up the divergence from softmax(S), which is not the cross-entropy from p.
    once = dataclasses.replace(KINDS["trades"], steps=1, step_size=0.03)
    x_adv = np.asarray(once.perturb(KEYS, Embedding(), CLEAN, TO, STATE))
    noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(KEYS)
    start = np.clip(X + 0.001 * np.asarray(noise, np.float64), 0, 1)
    slope = numeric(lambda x: divergence(x).sum(), start)
    moved = np.clip(start + 0.03 * np.sign(slope), 0, 1)
    sure = np.abs(slope) > 1e-2 * np.abs(slope).max()
    assert sure.mean() > 0.5
    np.testing.assert_allclose(x_adv[sure], moved[sure], atol=1e-5)
    other = np.sign(numeric(lambda x: gap(X, scores_of(x)).sum(), start))
    assert (other[sure] != np.sign(slope)[sure]).mean() > 0.1


def test_free_training_carries_its_perturbation():
    objective = KINDS["free"]
    state = state_of(objective)
    assert objective.steps_per_batch == 2 and state.free.perturbation.shape == X.shape
    slope = RNG.normal(size=X.shape).astype(np.float32)
    x_adv = objective.perturb(KEYS, Embedding(), CLEAN, TO, state)
    np.testing.assert_array_equal(x_adv, X)
    seen = Seen(jnp.arange(B), CLEAN, x_adv, jnp.asarray(slope), jnp.ones(B))
    state = objective.update(state, seen)
    np.testing.assert_allclose(state.free.perturbation, 0.1 * np.sign(slope), rtol=1e-6)
    x_adv = objective.perturb(KEYS, Embedding(), CLEAN, TO, state)
    np.testing.assert_allclose(x_adv, np.clip(X + 0.1 * np.sign(slope), 0, 1), rtol=1e-6)
    images, labels = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    assert state.free.replay == 1 and (np.asarray(state.losses) == -1).all()
    refreshed = objective.refresh(KEY, Embedding(), images, labels, state)
    np.testing.assert_array_equal(refreshed.free.perturbation, state.free.perturbation)


def test_the_replays_of_a_batch_see_the_same_images():
    objective, state, rng = KINDS["free"], state_of(KINDS["free"]), np.random.default_rng(0)
    state = dataclasses.replace(state, losses=jnp.asarray(rng.uniform(0, 5, N), jnp.float32))
    for number, key in enumerate(jax.random.split(KEY, 8)):
        batches = []
        for _ in range(objective.replays):
            batches.append(np.asarray(objective.batch(key, jnp.int32(number), state, B)))
            losses = jnp.asarray(rng.uniform(0, 50, B), jnp.float32)
            seen = Seen(jnp.asarray(batches[-1]), CLEAN, CLEAN, jnp.zeros(X.shape), losses)
            state = objective.update(state, seen)
        np.testing.assert_array_equal(*batches)
        assert set(np.asarray(state.losses)[batches[-1]]) <= set(np.asarray(losses))  # the last's


def test_heads_come_through_wrappers():
    wrapped = AWP(KINDS["clustr"], 0.01)
    state = state_of(wrapped)
    assert wrapped.head(state) is state.inner.head
    assert KINDS["qtrades"].validation_attack() == jc.attacks.PGD(BALL, steps=10)
    assert KINDS["clustr"].validation_attack() is None


def test_over_images_splits_over_devices():
    images = np.random.default_rng(0).integers(0, 256, (700, *SHAPE), np.uint8)
    network = Embedding()
    whole = embed(images / 255)
    for devices in (jax.devices()[:1], jax.devices()):
        placed = jax.device_put(images, jc.parallel.replicated(jc.parallel.mesh(devices)))
        placed_network = jax.device_put(network, jc.parallel.replicated(jc.parallel.mesh(devices)))
        found = over_images(_features, placed_network, placed)
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-4)
        assert len(found.sharding.device_set) == len(devices)


def _features(model, images):
    return model.features(jc.data.to_float(images))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clusters_per_class": 0}, "`clusters_per_class` must be at least 1"),
        ({"clusters_per_class": 25}, "`clusters_per_class` .* got 25 for 24 images of class 0"),
        ({"clusters_per_batch": 1}, "`clusters_per_batch` must be at least 2"),
        ({"clusters_per_batch": 8}, r"`clusters_per_batch` must be in \[2, 7\], .* got 8"),
        ({"clusters_per_batch": 5}, "`batch_size` must be a multiple .* 5, got 24"),
        ({"nearest": 9}, r"`nearest` must be in \[1, 8\], .* got 9"),
        ({"nearest": 0}, "`nearest` must be at least 1"),
        ({"alpha": -1.0}, "`alpha` must be"),
        ({"cross_entropy_weight": -1.0}, "`cross_entropy_weight` must be"),
        ({"num_init": 0}, "`num_init` must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        state_of(ClusTR(**(SETTINGS | change)))


@pytest.mark.parametrize(
    "kind, change, message",
    [
        (QTRADES, {"threat": 0.1}, "`threat` must be one as Linf"),
        (QTRADES, {"beta": -1.0}, "`beta` must be"),
        (QTRADES, {"step_size": 0.0}, "`step_size` must be"),
        (ClusTRTRADES, {"steps": 0}, "`steps` must be at least 1"),
        (FreeClusTR, {"threat": jc.L2(1.0)}, "`threat` must be one as Linf"),
        (FreeClusTR, {"replays": 0}, "`replays` must be at least 1"),
    ],
)
def test_bad_adversaries_are_refused(kind, change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**change)


def test_networks_that_cannot_be_embedded_are_refused():
    with pytest.raises(ValueError, match="got 2 for 0 images of class 3"):
        few = LABELS != 3
        KINDS["clustr"].init(
            KEY, Embedding(), jnp.asarray(IMAGES[few]), jnp.asarray(LABELS[few]), B
        )
    with pytest.raises(ValueError, match="`model` must give finite embeddings"):
        nan = Embedding(np.full_like(WEIGHT, np.nan))
        KINDS["clustr"].init(KEY, nan, jnp.asarray(IMAGES), jnp.asarray(LABELS), B)
    with pytest.raises(TypeError, match="`model` must have `features`"):
        linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        KINDS["clustr"].init(KEY, linear, jnp.asarray(IMAGES), jnp.asarray(LABELS), B)
    with pytest.raises(ValueError, match="most embeddings coincide"):
        same = Embedding(np.zeros_like(WEIGHT))
        objective = dataclasses.replace(KINDS["clustr"], clusters_per_batch=6)
        objective.init(KEY, same, jnp.asarray(IMAGES), jnp.asarray(LABELS), B)
