"""Every check accepts what it says, and refuses the rest in one line that names the argument."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclus import _checks

IMAGES = np.full((2, 4, 3, 1), 0.5, np.float32)
KEY = jax.random.key(0)


def refuses(error, message, check, *args):
    with pytest.raises(error, match=message) as raised:
        check(*args)
    text = str(raised.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("value", [1, 0.1, 1e-30, np.float32(2), np.int64(3), np.array(0.5)])
@pytest.mark.parametrize("check", [_checks.positive, _checks.not_negative])
def test_numbers(check, value):
    check("a", value)
    check("a", jnp.asarray(value, jnp.float32))


def test_zero():
    _checks.not_negative("a", 0.0)
    refuses(ValueError, "^`a` must be a finite number above 0", _checks.positive, "a", 0.0)


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, -math.inf, np.float32(-1)])
@pytest.mark.parametrize("check", [_checks.positive, _checks.not_negative])
def test_numbers_out_of_range(check, value):
    text = refuses(ValueError, "^`a` must be a finite number", check, "a", value)
    assert repr(value) in text


@pytest.mark.parametrize("value", [True, np.True_, "1", None, [1.0], (1.0,), {}, 1j])
@pytest.mark.parametrize("check", [_checks.positive, _checks.not_negative])
def test_no_numbers(check, value):
    text = refuses(TypeError, "^`a` must be a number", check, "a", value)
    assert repr(value) in text


@pytest.mark.parametrize("check", [_checks.positive, _checks.not_negative])
def test_arrays_are_no_numbers(check):
    for value in (np.ones(2), jnp.ones((1, 1))):
        refuses(TypeError, r"array of shape \(", check, "a", value)


def test_numbers_inside_a_transformation_are_not_read():
    def f(value):
        assert not _checks.is_concrete(value)
        _checks.positive("a", value)
        _checks.not_negative("a", value)
        return value

    assert jax.jit(f)(-1.0) == -1
    assert jax.grad(f)(-1.0) == 1
    assert _checks.is_concrete(1.0, jnp.ones(2), None)


def test_at_least():
    for value in (3, 4, np.int32(3)):
        _checks.at_least("a", value, 3)
    refuses(ValueError, "^`a` must be at least 3, got 2$", _checks.at_least, "a", 2, 3)
    for value in (3.0, True, "3", None, math.nan, np.float32(3)):
        message = "^`a` must be an integer of at least 3, got "
        refuses(TypeError, message, _checks.at_least, "a", value, 3)


def test_within():
    for value in (0, 0.5, 1.0):
        _checks.within("a", value, 0, 1)
    for value in (-0.1, 1.1, math.nan, math.inf):
        message = rf"^`a` must be in \[0, 1\], got {value}$"
        refuses(ValueError, message, _checks.within, "a", value, 0, 1)


def test_one_of():
    _checks.one_of("a", "x", ["y", "x"])
    for value in ("z", None, 1):
        message = rf"^`a` must be one of x, y; got {value!r}$"
        refuses(ValueError, message, _checks.one_of, "a", value, {"y": 1, "x": 2})


def test_images():
    for value in (IMAGES, jnp.asarray(IMAGES), np.zeros_like(IMAGES), np.ones_like(IMAGES)):
        out = _checks.images("x", value)
        assert isinstance(out, jax.Array) and out.dtype == jnp.float32
        np.testing.assert_array_equal(out, value)
    assert _checks.images("x", np.float64(IMAGES)).dtype == jnp.float32


def with_pixel(value):
    images = IMAGES.copy()
    images[1, 2, 1, 0] = value
    return images


BAD_IMAGES = {
    "NaN": (with_pixel(np.nan), ValueError, "`x` must be finite and in [0, 1]"),
    "infinity": (with_pixel(np.inf), ValueError, "`x` must be finite and in [0, 1]"),
    "-infinity": (with_pixel(-np.inf), ValueError, "`x` must be finite and in [0, 1]"),
    "above 1": (with_pixel(1.001), ValueError, "`x` must be in [0, 1], got values from 0.5 to 1"),
    "below 0": (with_pixel(-0.1), ValueError, "`x` must be in [0, 1], got values from -0.1 to 0.5"),
    "0..255": (IMAGES * 255, ValueError, "`x` must be in [0, 1], got values from 127.5 to 127.5"),
    "uint8": (np.uint8(IMAGES), TypeError, "`x` must be float32 images in [0, 1] (uint8 pixels: "),
    "bool": (IMAGES > 0, TypeError, "`x` must be float32 images"),
    "float16": (np.float16(IMAGES), TypeError, "`x` must be float32 images"),
    "bfloat16": (jnp.bfloat16(IMAGES), TypeError, "`x` must be float32 images"),
    "one image": (IMAGES[0], ValueError, "`x` must have the shape [b, h, w, c], got (4, 3, 1)"),
    "rank 5": (IMAGES[None], ValueError, "`x` must have the shape [b, h, w, c]"),
    "empty": (IMAGES[:0], ValueError, "`x` must hold at least one image, got the shape (0, 4, 3, "),
    "list": (IMAGES.tolist(), TypeError, "`x` must be an array of float32 images in [0, 1], got "),
    "None": (None, TypeError, "`x` must be an array of float32 images"),
    "str": ("images", TypeError, "`x` must be an array of float32 images"),
    "number": (0.5, TypeError, "`x` must be an array of float32 images"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(name):
    value, error, message = BAD_IMAGES[name]
    refuses(error, "^" + re.escape(message), _checks.images, "x", value)


def test_constants_inside_jit_are_checked_like_all_values():
    x, y = jnp.asarray(IMAGES), jnp.array([0, 2])
    total = jax.jit(lambda s: s * _checks.images("x", x).sum() + _checks.integers("y", y, 2).sum())
    assert total(2.0) == 26.0
    bad = x + 1
    refuses(ValueError, "`x` must be in", jax.jit(lambda s: s * _checks.images("x", bad)), 2.0)


def test_images_inside_a_transformation():
    jax.jit(lambda x: _checks.images("x", x))(jnp.full((1, 2, 2, 1), 7.0))
    with pytest.raises(ValueError, match="must have the shape"):
        jax.jit(lambda x: _checks.images("x", x))(jnp.ones((2, 2)))


@pytest.mark.parametrize("value", ["abc", None, {"a": 1.0}])
def test_vectors_must_be_an_array(value):
    refuses(TypeError, r"`h` must be an array \[n, d\], got <class", _checks.vectors, "h", value)


def test_integers():
    for dtype in (np.int32, np.int64, np.uint8, np.int8):
        out = _checks.integers("y", np.array([0, 2, 1], dtype), 3, 3)
        assert isinstance(out, jax.Array) and out.dtype == jnp.int32
        np.testing.assert_array_equal(out, [0, 2, 1])
    assert _checks.integers("y", np.array([2**31 - 1]), 1)[0] == 2**31 - 1


BAD_INTEGERS = {
    "too large": ([0, 3], ValueError, "`y` must be in [0, 2], got values from 0 to 3"),
    "negative": ([-1, 0], ValueError, "`y` must be in [0, 2], got values from -1 to 0"),
    "wraps to 0": (
        [0, 2**32],
        ValueError,
        "`y` must be in [0, 2], got values from 0 to 4294967296",
    ),
    "float64": ([0.0, 1.0], TypeError, "`y` must be integers in [0, 2], got dtype float"),
    "bool": ([True, False], TypeError, "`y` must be integers in [0, 2], got dtype bool"),
    "short": ([0], ValueError, "`y` must have the shape (2,), one entry for each image, got (1,)"),
    "long": ([0, 1, 2], ValueError, "`y` must have the shape (2,), one entry for each image, got "),
    "one-hot": ([[1, 0], [0, 1]], ValueError, "`y` must have the shape (2,), one entry for each "),
    "text": (["a", "b"], TypeError, "`y` must be an array of integers in [0, 2], got dtype <U1"),
    "objects": (
        [None, 1],
        TypeError,
        "`y` must be an array of integers in [0, 2], got dtype object",
    ),
}


@pytest.mark.parametrize("name", BAD_INTEGERS)
def test_bad_integers(name):
    value, error, message = BAD_INTEGERS[name]
    refuses(error, "^" + re.escape(message), _checks.integers, "y", np.array(value), 2, 3)


@pytest.mark.parametrize("value", [None, 0, [0, 1], "ab"])
def test_integers_must_be_an_array(value):
    message = r"^`y` must be an array of integers in \[0, 2\], got "
    refuses(TypeError, message, _checks.integers, "y", value, 2, 3)


def test_index_beyond_int32():
    message = r"^`index` must be in \[0, 2147483647\]"
    refuses(ValueError, message, _checks.integers, "index", np.array([2**31]), 1)


def test_integers_inside_a_transformation():
    jax.jit(lambda y: _checks.integers("y", y, 2, 3))(jnp.array([7, -1]))
    with pytest.raises(ValueError, match="must have the shape"):
        jax.jit(lambda y: _checks.integers("y", y, 3, 3))(jnp.array([0, 1]))


def test_typed_key():
    assert _checks.typed_key("key", KEY) is KEY
    jax.jit(lambda key: _checks.typed_key("key", key))(KEY)
    for value in (jax.random.key_data(KEY), 0, None, "key", np.zeros(2, np.uint32)):
        message = r"^`key` must be a typed key, as jax.random.key\(0\) makes, got "
        refuses(TypeError, message, _checks.typed_key, "key", value)
    message = r"^`key` must be one key, got an array of keys \(2,\)$"
    refuses(ValueError, message, _checks.typed_key, "key", jax.random.split(KEY))
