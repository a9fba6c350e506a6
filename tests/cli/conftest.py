import pytest


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of a file's own: the user's stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCLUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TFDS_DATA_DIR", raising=False)
        yield
