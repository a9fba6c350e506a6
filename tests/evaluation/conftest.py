"""A trained network, and the images it was not trained on."""

import pytest
from networks import random_features

import jaxclus as jc


@pytest.fixture(scope="session")
def network():
    return random_features()


@pytest.fixture(scope="session")
def digits():
    return jc.data.load("digits", "test")
