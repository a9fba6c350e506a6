"""The one package that reads jaxprs.

`_walk` knows the equations that hold jaxprs themselves, `_linear` rewrites a classifier into its
linear sub-network.
"""

from jaxclus._jaxpr._linear import linear_call, nonlinear_primitives

__all__ = ["linear_call", "nonlinear_primitives"]
