"""Predictions over many images against the model itself, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclus as jc
from jaxclus import parallel
from jaxclus.evaluation._predict import predict
from jaxclus.threat import image_keys

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def mesh():
    return parallel.mesh(jax.devices()[:2])


@pytest.mark.parametrize("microbatch", [1, 4, 20])
def test_logits_in_batches_of_any_size(network, digits, mesh, microbatch):
    images = digits.images[:13]
    logits, predicted = predict(KEY, network, images, mesh, microbatch=microbatch)
    wanted = np.asarray(network(jc.data.to_float(images)))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    np.testing.assert_array_equal(predicted, wanted.argmax(axis=1))


def test_float_images_are_taken_as_they_are(network, digits, mesh):
    images = digits.images[:10]
    floats = np.asarray(jc.data.to_float(images))
    for one, other in zip(
        predict(KEY, network, images, mesh), predict(KEY, network, floats, mesh), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert np.abs(predict(KEY, network, floats / 2, mesh)[0] - network(floats)).max() > 0.1


def _noise(key, x):
    return jax.random.normal(key, (x.shape[0], 5))


def test_an_image_keeps_the_randomness_of_its_number(digits, mesh):
    model = jc.Stochastic(_noise, passes=3)
    images = digits.images[:30]
    logits, predicted = predict(KEY, model, images, mesh, microbatch=8)
    assert len(np.unique(logits, axis=0)) == 30
    chosen = np.array([29, 4, 11])
    again, same = predict(KEY, model, images[chosen], mesh, index=chosen, microbatch=3)
    np.testing.assert_allclose(again, logits[chosen], atol=1e-6)
    np.testing.assert_array_equal(same, predicted[chosen])


def test_augmentation_uses_the_images_keys(network, digits, mesh):
    images, augmentation = digits.images[:20], jc.data.Augmentation(2)
    found, _ = predict(KEY, network, images, mesh, augmentation=augmentation, microbatch=6)
    augmented = augmentation(image_keys(KEY, jnp.arange(20)), jnp.asarray(images))
    wanted = np.asarray(network(jc.data.to_float(augmented)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found - predict(KEY, network, images, mesh)[0]).max() > 0.1
