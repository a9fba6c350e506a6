import pytest
from tfds_writer import Prepared, write_tfds


@pytest.fixture(autouse=True)
def own_directories(tmp_path, tmp_path_factory, monkeypatch):
    """No test reads the user's data sets or cache, or can reach the network."""
    monkeypatch.setenv("JAXCLUS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))

    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)


@pytest.fixture
def tiny(tmp_path) -> Prepared:
    """The set "tiny" in $TFDS_DATA_DIR: 7 and 4 images 6 x 5 x 3 of cat, dog and owl."""
    return write_tfds(tmp_path / "tfds", "tiny")
