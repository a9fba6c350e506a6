"""The training methods of the command line: their names, their settings, their objectives."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from jaxclus import attacks, clustr, prototypes, threat
from jaxclus.training import objectives

Method = Literal[
    "standard", "pgd", "trades", "mart", "fast", "free",
    "clustr", "clustr_qtrades", "clustr_trades", "clustr_free",
    "prototypes", "prototypes_pgd", "prototypes_trades", "prototypes_learned",
]  # fmt: skip

#: Methods that leave the head of the network as it was.
WITHOUT_OWN_HEAD = {
    name
    for name in get_args(Method)
    if name.startswith(("clustr", "prototypes")) and name != "prototypes_learned"
}
_BALL = {"norm", "eps"}
_CLUSTERS = {
    "clusters_per_class", "clusters_per_batch", "alpha", "nearest", "cross_entropy_weight",
    "num_init", "max_iter", "as_published",
}  # fmt: skip
_PROTOTYPES = {"generator", "generator_steps", "distance", "rule", "scale", "as_published"}
# The settings that each method reads.
_SETTINGS: dict[str, set[str]] = {
    "standard": set(),
    "pgd": _BALL | {"attack_steps", "step_size"},
    "trades": _BALL | {"attack_steps", "step_size", "tradeoff"},
    "mart": _BALL | {"attack_steps", "step_size", "tradeoff"},
    "fast": _BALL | {"step_size"},
    "free": {"eps", "step_size"},
    "clustr": _CLUSTERS,
    "clustr_qtrades": _CLUSTERS | _BALL | {"step_size", "tradeoff"},
    "clustr_trades": _CLUSTERS | _BALL | {"attack_steps", "step_size", "tradeoff"},
    "clustr_free": _CLUSTERS | {"eps"},
    "prototypes": _PROTOTYPES,
    "prototypes_pgd": _PROTOTYPES | _BALL | {"attack_steps", "step_size"},
    "prototypes_trades": _PROTOTYPES | _BALL | {"attack_steps", "step_size", "tradeoff"},
    "prototypes_learned": {"rule"},
}
#: All settings that some method reads.
NAMES = sorted(set().union(*_SETTINGS.values()))


def refuse_what_it_does_not_read(method: Method, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting is given that the method has no use for."""
    for name, value in settings.items():
        # That linf was asked for cannot be told from its being the default.
        default = value is None or value is False or (name, value) == ("norm", "linf")
        if not default and name not in _SETTINGS[method]:
            readers = [method for method, names in _SETTINGS.items() if name in names]
            raise ValueError(
                f"`{name}` is a setting of --method {', '.join(readers)}, not of {method}"
            )


def objective(method: Method, settings: Mapping[str, Any]) -> objectives.Objective:
    """What the method minimises.

    Args:
        method: its name.
        settings: a value for each of `NAMES`, None where it was not given.
    """
    if method == "standard":
        return objectives.Standard()

    def given(*names: str) -> dict[str, Any]:
        return {name: settings[name] for name in names if settings[name] is not None}

    own = given(*(_CLUSTERS if method.startswith("clustr") else _PROTOTYPES))
    if method == "clustr":
        return clustr.ClusTR(**own)
    if method == "prototypes":
        return prototypes.PrototypeTraining(**own)
    if method == "prototypes_learned":
        return prototypes.LearnedPrototypes(**given("rule"))
    if settings["eps"] is None:
        raise ValueError(f"`eps` must be given for --method {method}, as --eps 8/255")
    eps = settings["eps"]
    ball, step = threat.create(settings["norm"], eps), {"step_size": settings["step_size"]}
    steps = {"steps": 10 if settings["attack_steps"] is None else settings["attack_steps"]}
    weight = {} if settings["tradeoff"] is None else {"beta": settings["tradeoff"]}
    makers = {
        "pgd": lambda: objectives.Adversarial(attacks.PGD(ball, **steps, **step)),
        "fast": lambda: objectives.FastAdversarial(ball, **step),
        "free": lambda: objectives.FreeAdversarial(threat.Linf(eps), **step),
        "trades": lambda: objectives.TRADES(ball, **steps, **step, **weight),
        "mart": lambda: objectives.MART(ball, **steps, **step, **weight),
        "clustr_free": lambda: clustr.FreeClusTR(threat=threat.Linf(eps), **own),
        "clustr_qtrades": lambda: clustr.QTRADES(threat=ball, **step, **weight, **own),
        "clustr_trades": lambda: clustr.ClusTRTRADES(threat=ball, **steps, **step, **weight, **own),
        "prototypes_pgd": lambda: prototypes.AdversarialPrototypes(
            threat=ball, **steps, **step, **own
        ),
        "prototypes_trades": lambda: prototypes.PrototypeTRADES(
            threat=ball, **steps, **step, **weight, **own
        ),
    }
    return makers[method]()
