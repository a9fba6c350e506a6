import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclus.data import NO_AUGMENTATION, Augmentation, default_augmentation


def make_images(b=6, dtype=np.uint8):
    # No zeros, so that padding can be told from pixels, and no image equal to a shift of itself.
    images = np.random.default_rng(0).integers(1, 256, (b, 5, 6, 2))
    return jnp.asarray(images.astype(dtype) / (1 if dtype == np.uint8 else 255), dtype)


@functools.partial(jax.jit, static_argnums=0)
def apply(augmentation, key, images):
    return augmentation(key, images)


def every_crop(image, p, flip):
    """All results that the definition allows, from NumPy."""
    padded = np.pad(np.asarray(image), ((p, p), (p, p), (0, 0)))
    h, w, _ = image.shape
    crops = [padded[t : t + h, s : s + w] for t in range(2 * p + 1) for s in range(2 * p + 1)]
    return crops + [crop[:, ::-1] for crop in crops] if flip else crops


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("p", "flip"), [(2, True), (1, False), (0, True)])
def test_every_result_is_a_crop_and_all_occur(p, flip, dtype):
    image = make_images(1, dtype)
    allowed = every_crop(image[0], p, flip)
    result = apply(Augmentation(p, flip), jax.random.key(0), jnp.tile(image, (1000, 1, 1, 1)))
    assert result.dtype == dtype and result.shape == (1000, 5, 6, 2)
    matches = np.array(
        [(np.asarray(result) == option).all(axis=(1, 2, 3)) for option in allowed]
    )  # [options, 1000]
    np.testing.assert_array_equal(matches.sum(axis=0), 1)
    counts, expected = matches.sum(axis=1), 1000 / len(allowed)
    # Uniform over the options: chi-squared within five standard deviations of its mean.
    degrees = len(allowed) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def test_without_crop_and_flip_nothing_changes():
    images = make_images()
    np.testing.assert_array_equal(apply(NO_AUGMENTATION, jax.random.key(0), images), images)


def test_jit_and_eager_agree_and_the_augmentation_is_static():
    images, key = make_images(), jax.random.key(3)
    before = apply._cache_size()
    result = apply(Augmentation(3), key, images)
    np.testing.assert_array_equal(result, Augmentation(3)(key, images))
    apply(Augmentation(3), jax.random.key(4), images)
    assert apply._cache_size() == before + 1


def test_an_image_does_not_depend_on_its_batch():
    augment = functools.partial(apply, Augmentation())
    key, images = jax.random.key(5), make_images()
    together = augment(key, images)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(6))
    np.testing.assert_array_equal(augment(keys, images), together)
    np.testing.assert_array_equal(augment(keys[4:], images[4:]), together[4:])
    assert not np.array_equal(augment(jax.random.key(6), images), together)


def test_flips_do_not_depend_on_the_crop():
    images, key = make_images(20), jax.random.key(1)
    flipped = np.asarray(apply(Augmentation(0, True), key, images) != images).any(axis=(1, 2, 3))
    both = np.asarray(apply(Augmentation(1, True), key, images))
    cropped = np.asarray(apply(Augmentation(1, False), key, images))
    mirrored = np.where(flipped[:, None, None, None], cropped[:, :, ::-1], cropped)
    assert 0 < flipped.sum() < 20
    np.testing.assert_array_equal(both, mirrored)


def test_bad_padding():
    with pytest.raises(ValueError, match="`crop_padding` must be at least 0, got -1"):
        Augmentation(crop_padding=-1)


def test_bad_keys_and_images():
    augment, key, images = Augmentation(), jax.random.key(0), make_images()
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        augment(jax.random.key_data(key), images)
    with pytest.raises(ValueError, match=r"`key` must be one key or keys \[6\].*\(5,\)"):
        augment(jax.random.split(key, 5), images)
    with pytest.raises(ValueError, match="`images` must be float32 or uint8.*int32"):
        augment(key, images.astype(jnp.int32))


def test_defaults():
    assert default_augmentation("cifar10") == Augmentation(crop_padding=4, flip=True)
    assert default_augmentation("cifar100") == Augmentation(crop_padding=4, flip=True)
    assert default_augmentation("fashion_mnist") == Augmentation(crop_padding=0, flip=True)
    for name in ("digits", "mnist", "svhn_cropped", "my_folder"):
        assert default_augmentation(name) == NO_AUGMENTATION
