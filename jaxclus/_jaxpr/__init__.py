"""The one package that reads jaxprs.

`_walk` knows the equations that hold jaxprs themselves and what constants are in them, `_linear`
rewrites a classifier into its linear sub-network, `_dataflow` states a classifier as one flat list
of operations, `_influence` follows how the images reach its outputs there.
"""

from jaxclus._jaxpr._dataflow import CUSTOM, Operation, Value, dataflow
from jaxclus._jaxpr._influence import ARRANGING, Influence, Need
from jaxclus._jaxpr._linear import linear_call, nonlinear_primitives
from jaxclus._jaxpr._walk import constants

__all__ = [
    "ARRANGING",
    "CUSTOM",
    "Influence",
    "Need",
    "Operation",
    "Value",
    "constants",
    "dataflow",
    "linear_call",
    "nonlinear_primitives",
]
