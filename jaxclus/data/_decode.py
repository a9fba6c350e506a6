"""Encoded images (PNG, JPEG, ...) to one uint8 array, always with Pillow.

Decoders of JPEG differ in the last bits, so one decoder is used for every source, and its version
is part of the cache's file names.
"""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np

_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
_MODE_OF_CHANNELS = {channels: mode for mode, channels in _CHANNELS.items()}

# Pillow's mode -> mode without loss; others (16 bits, CMYK, transparency) are refused.
_LOSSLESS = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}


def decode_image(label: str, file: str | io.BytesIO, channels: int | None = None) -> np.ndarray:
    """One image as uint8 [h, w, c].

    Args:
        label: what to call the image in errors.
        file: path, or the encoded bytes.
        channels: 1, 3 or 4; by default 1 for grey images and 3 for coloured ones.

    Raises:
        ValueError: not an image that Pillow reads, or of a mode other than 8-bit grey or colour.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            mode = _LOSSLESS.get(image.mode) if channels is None else _MODE_OF_CHANNELS[channels]
            if mode is None:
                raise ValueError(
                    f"{label} must be an 8-bit grey or RGB image without transparency, "
                    f"got Pillow's mode {image.mode}"
                )
            pixels = np.asarray(image.convert(mode))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{label} cannot be decoded: {error}") from error
    return pixels.reshape(*pixels.shape[:2], _CHANNELS[mode])


def stack_images(images: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
    """The labelled images as one array [n, h, w, c]; raises naming the first of another shape."""
    pixels: list[np.ndarray] = []
    first: Any = None
    for label, image in images:
        first = first or (label, image.shape)
        if image.shape != first[1]:
            raise ValueError(
                f"all images must have one shape [h, w, c]: {label} is {image.shape}, "
                f"but {first[0]} is {first[1]}"
            )
        pixels.append(image)
    return np.stack(pixels)
