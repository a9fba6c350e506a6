"""Models in and out of files: `export` to one safetensors file, `load` from it or from a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclus import _checks, _pytree, runs
from jaxclus._version import __version__
from jaxclus.clustr import ClusterClassifier
from jaxclus.compose import Chain
from jaxclus.models import Classifier, ModelSpec, features, parts
from jaxclus.prototypes import PrototypeHead
from jaxclus.training import Checkpoints
from jaxclus.zoo import _cards

_FORMAT = "jaxclus"  # the key of our entry in the file's metadata
_HEAD = ":head"  # no module of a network has that name
# What can stand for a network's own head, by the name in the record.
_HEADS = {cls.__name__: cls for cls in (ClusterClassifier, PrototypeHead)}


#: A network, or a network's embeddings under a head of `_HEADS`.
Model = Classifier | Chain


def export(
    model: Model, path: Path | str, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Writes weights, statistics and the model's record to one safetensors file, atomically.

    Args:
        model: a model that `jc.models.create`, `jc.load` or `jc.training.fit` made, or
            `jc.Chain(jc.models.features(network), head)` with such a network and a
            `jc.clustr.ClusterClassifier` or `jc.prototypes.PrototypeHead`.
        path: a file name ending in .safetensors.
        dtype: type of the stored numbers; "bfloat16" halves the file (ResNet-18 then takes 22 MB)
            and rounds them to 8 bits.

    Returns:
        The path.

    Raises:
        ValueError: for a model that was changed since (its record no longer describes it),
            another file ending, or an unknown dtype.
        OSError: if the file cannot be written.
    """
    from safetensors.flax import save

    path = Path(path)
    _checks.one_of("dtype", dtype, ("float32", "bfloat16"))
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in .safetensors, got {path}")
    network, head = parts(model)
    if head is not None and type(head) not in _HEADS.values():
        raise ValueError(f"`model` must have a head of {', '.join(_HEADS)}, got {type(head)}")
    spec = getattr(network, "spec", None)
    if spec is None:
        raise ValueError("`model` must be one that jc.models.create made and nobody changed since")
    _, state = nnx.split(network)
    named = _named(nnx.to_pure_dict(state))
    arrays = {name: jnp.asarray(leaf, dtype) for name, leaf in named.items()}
    arrays |= _head_arrays(head)  # small, and radii depend on it: float32 always
    record = {"version": __version__, "spec": spec.to_json(), "head": _pytree.record(head)}
    try:
        runs.write_atomic(path, save(arrays, metadata={_FORMAT: json.dumps(record)}))
    except OSError as error:
        raise OSError(
            f"`path` must be one that can be written to, got {path}: {error.strerror}"
        ) from error
    return path


def load(path: Path | str) -> Model:
    """A trained model, in eval mode and float32.

    A network, or what was trained with a head of its own, as by `jc.clustr.ClusTR`:
    `jc.Chain(jc.models.features(network), head)`.

    Args:
        path: a safetensors file of `jc.export`; or the directory of a training run: then its
            newest intact checkpoint, with the weights that `jc.training.fit` would return; or,
            where there is nothing of that name, one of `jc.zoo.list()`.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if what is there is no such file or run, or none of its checkpoints is intact;
            or if a network of the zoo is not the one of its model card.
    """
    path = Path(path)
    if path.is_dir():
        return _load_run(path)
    if path.exists():
        return _load_file(path)
    if str(path) in _cards.names():
        return load_shipped(str(path))
    raise FileNotFoundError(
        f"`path` must be a model file, a run directory or a network of the zoo "
        f"({', '.join(_cards.names())}), found no {path}"
    )


def load_shipped(name: str) -> Classifier:
    """A network of the zoo, whatever stands under its name in the working directory."""
    return parts(_load_file(_cards.checked_path(name)))[0]


def _load_file(path: Path) -> Model:
    from safetensors import SafetensorError, safe_open
    from safetensors.flax import load_file

    try:
        with safe_open(path, framework="numpy") as file:
            record = (file.metadata() or {}).get(_FORMAT)
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`path` must be a safetensors file, got {path}: {error}") from error
    if record is None:
        raise ValueError(f"`path` must be a file that jc.export wrote, got {path}")
    spec = _spec(lambda: json.loads(record)["spec"], path)
    names = [name for name in arrays if name.startswith(f"{_HEAD}/")]
    mine = {name.removeprefix(f"{_HEAD}/"): arrays.pop(name) for name in names}
    return _with_head(_filled(spec, arrays, path), json.loads(record).get("head"), mine, path)


def _load_run(path: Path) -> Model:
    restored = Checkpoints(path / "checkpoints").restore()
    if restored is None:
        raise ValueError(
            f"`path` must be a model file or a run directory; {path} has no complete checkpoint"
        )
    state, meta = restored
    if meta["model"] is None:
        raise ValueError(f"`path` holds a model that jc.models.create did not make: {path}")
    last = {"weights": state["average"] or state["weights"], "head": state.get("head")}
    chosen = state["best"] or last
    arrays = _named(chosen["weights"]["params"]) | _named(chosen["weights"]["stats"])
    network = _filled(_spec(lambda: meta["model"], path), arrays, path)
    return _with_head(network, meta.get("head"), chosen.get("head") or {}, path)


def _head_arrays(head: Any) -> dict[str, Any]:
    """The arrays of a head by name."""
    if head is None:
        return {}
    leaves = jax.tree_util.tree_leaves_with_path(head)
    return {f"{_HEAD}/{_name(path)}": leaf for path, leaf in leaves}


def _with_head(network: Classifier, record: Any, arrays: dict[str, Any], path: Path) -> Model:
    """The network, or its embeddings under the head of a record and arrays."""
    if record is None:
        return network
    try:
        made = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
        head = _pytree.rebuild(_HEADS[record["class"]], record, made)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`path` must hold a head that jaxclus {__version__} knows, got {path}: {error}"
        ) from error
    return Chain(features(network), head)


def _spec(read: Callable[[], Any], path: Path) -> ModelSpec:
    """The model's record; raises if a newer version wrote it, or something else."""
    try:
        return ModelSpec.from_json(read())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`path` must hold a model that jaxclus {__version__} knows, got {path}: "
            f"{' '.join(str(error).split())}"
        ) from error


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(tree: Any) -> dict[str, Any]:
    """The arrays of nested dicts by name, the keys joined by slashes."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _filled(spec: ModelSpec, arrays: dict[str, Any], path: Path) -> Classifier:
    """The model of a record with the given arrays, all of which must fit."""
    graph, state = nnx.split(spec.abstract())
    template = nnx.to_pure_dict(state)
    wanted = {name: leaf.shape for name, leaf in _named(template).items()}
    found = {name: np.shape(array) for name, array in arrays.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(f"`path` must hold the arrays of {spec.name}; {path} differs in {shown}")
    return nnx.merge(
        graph,
        jax.tree_util.tree_map_with_path(
            lambda place, _: jnp.asarray(arrays[_name(place)], jnp.float32), template
        ),
    )
