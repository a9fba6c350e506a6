import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclus import parallel, runs
from jaxclus.training import Checkpoints, CorruptCheckpointError

META = {"model": "cnn", "config": {"epochs": 3, "rate": 0.1}}
STATE = {
    "weights": {"blocks": {0: {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}},
    "half": jnp.arange(3, dtype=jnp.bfloat16),
    "step": np.int32(7),
    "none": None,
    "empty": (),
}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def state_at(step):
    return {"weight": jnp.arange(1000.0) + step}


def steps(checkpoints):
    """The names in the directory, without Orbax's leftovers."""
    return sorted(path.name for path in checkpoints.directory.iterdir())


def flip_a_byte(directory):
    """Changes one byte in the middle of the largest file: the array data."""
    file = max(directory.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def template(tree):
    placement = parallel.replicated(parallel.mesh(jax.devices()[:2]))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), tree
    )


def test_round_trip_into_a_template(checkpoints):
    state = STATE | {"key": jax.random.key(5)}
    checkpoints.save(3, state, META)
    found, meta = checkpoints.restore(template(state), META)
    assert meta == META
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert found["weights"]["blocks"][0]["kernel"].sharding.mesh.size == 2
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(state["key"])).all()
    for ours, theirs in zip(*map(jax.tree.leaves, (found, state)), strict=True):
        assert ours.dtype == theirs.dtype
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(ours, theirs)


def test_round_trip_to_the_host(checkpoints):
    everywhere = parallel.replicated(parallel.mesh(jax.devices()))
    checkpoints.save(3, parallel.copy_to(STATE, everywhere), META)
    found, meta = checkpoints.restore()
    assert meta == META
    assert found["none"] is None and found["empty"] == ()
    kernel = found["weights"]["blocks"]["0"]["kernel"]
    assert isinstance(kernel, np.ndarray)
    np.testing.assert_array_equal(kernel, STATE["weights"]["blocks"][0]["kernel"])
    assert found["half"].dtype == jnp.bfloat16


def test_nothing_there(checkpoints):
    assert checkpoints.restore() is None
    assert not checkpoints.directory.exists()


def test_only_the_newest_two_are_kept(checkpoints):
    for step in (9, 10, 11):
        checkpoints.save(step, state_at(step), META)
    assert steps(checkpoints) == ["10", "10.sha256.json", "11", "11.sha256.json"]
    assert checkpoints.restore()[0]["weight"][0] == 11


def test_a_step_can_be_saved_again(checkpoints):
    # SIGTERM at the end of an epoch does.
    checkpoints.save(5, state_at(5), META)
    checkpoints.save(5, state_at(6), META)
    assert checkpoints.restore()[0]["weight"][0] == 6


def test_a_flipped_byte_is_found_and_the_checkpoint_before_is_used(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, state_at(step), META)
    file = flip_a_byte(checkpoints.directory / "2")
    with pytest.warns(UserWarning, match="checkpoint passed over") as caught:
        state, _ = checkpoints.restore()
    assert state["weight"][0] == 1
    message = str(caught[0].message)
    for path in (checkpoints.directory / "2", checkpoints.directory / "2.sha256.json"):
        assert str(path) in message
    assert str(file.relative_to(checkpoints.directory / "2")) in message
    assert "\n" not in message


@pytest.mark.parametrize("damage", ["missing file", "added file", "missing directory", "manifest"])
def test_any_other_damage_is_found(checkpoints, damage):
    for step in (1, 2):
        checkpoints.save(step, state_at(step), META)
    path, manifest = checkpoints.directory / "2", checkpoints.directory / "2.sha256.json"
    if damage == "missing file":
        next(file for file in path.rglob("*") if file.is_file()).unlink()
    elif damage == "added file":
        (path / "more").write_text("")
    elif damage == "missing directory":
        shutil.rmtree(path)
    else:
        manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=re.escape(str(path))):
        assert checkpoints.restore()[0]["weight"][0] == 1


def test_all_damaged(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, state_at(step), META)
        flip_a_byte(checkpoints.directory / str(step))
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CorruptCheckpointError, match="`directory` must hold an intact") as raised,
    ):
        checkpoints.restore()
    message = str(raised.value)
    assert "\n" not in message
    for step in (1, 2):
        assert f"{checkpoints.directory / str(step)} does not match" in message


def test_a_damaged_checkpoint_is_replaced_and_does_not_push_out_an_intact_one(checkpoints):
    for step in (10, 20):
        checkpoints.save(step, state_at(step), META)
    flip_a_byte(checkpoints.directory / "20")
    # Resumed from 10, stopped at 15: two intact ones must remain.
    checkpoints.save(15, state_at(15), META)
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.restore()[0]["weight"][0] == 15
    flip_a_byte(checkpoints.directory / "15")
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.restore()[0]["weight"][0] == 10
    checkpoints.save(20, state_at(20), META)
    assert checkpoints.restore()[0]["weight"][0] == 20


def test_one_without_a_manifest_is_skipped_and_replaced(checkpoints):
    checkpoints.save(1, state_at(1), META)
    checkpoints.save(2, state_at(20), META)
    (checkpoints.directory / "2.sha256.json").unlink()
    assert checkpoints.restore()[0]["weight"][0] == 1
    checkpoints.save(2, state_at(2), META)
    assert checkpoints.restore()[0]["weight"][0] == 2


def test_a_kill_before_the_seal_leaves_the_checkpoint_before(checkpoints, monkeypatch):
    checkpoints.save(1, state_at(1), META)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runs, "write_json", killed)
        checkpoints.save(2, state_at(2), META)
    assert checkpoints.restore()[0]["weight"][0] == 1
    # What was left behind goes once two newer ones are whole.
    for step in (3, 4):
        checkpoints.save(step, state_at(step), META)
    assert steps(checkpoints) == ["3", "3.sha256.json", "4", "4.sha256.json"]


def test_stray_entries_do_no_harm(checkpoints):
    # Orbax's own manager takes any directory with a number for its newest checkpoint.
    (checkpoints.directory / "99").mkdir(parents=True)
    (checkpoints.directory / "notes.txt").write_text("mine")
    assert checkpoints.restore() is None
    for step in (1, 2, 3):
        checkpoints.save(step, state_at(step), META)
    assert checkpoints.restore()[0]["weight"][0] == 3
    flip_a_byte(checkpoints.directory / "3")
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.restore()[0]["weight"][0] == 2
    assert (checkpoints.directory / "notes.txt").exists()


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"model": "resnet"}, "was made with model = 'cnn', not 'resnet'"),
        ({"config": {"epochs": 4, "rate": 0.1}}, "was made with config.epochs = 3, not 4"),
        ({"key": [0, 1]}, r"was made with key = None, not \[0, 1\]"),
    ],
)
def test_other_settings_are_named(checkpoints, wanted, message):
    checkpoints.save(1, state_at(1), META)
    with pytest.raises(ValueError, match=message) as raised:
        checkpoints.restore(template(state_at(1)), META | wanted)
    assert str(raised.value).startswith("`directory` must be new")
    assert "\n" not in str(raised.value)
    assert checkpoints.restore(meta={"model": "cnn"}) is not None
