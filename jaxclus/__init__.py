"""Adversarial robustness through clustering, in JAX and Flax.

Images are float32, NHWC, in [0, 1]; labels are int32; `eps` is on that pixel scale. A classifier
is any callable from images [b, h, w, c] to logits [b, k].
"""

from jaxclus import attacks, losses, threat
from jaxclus.threat import L1, L2, Linf

__all__ = ["L1", "L2", "Linf", "attacks", "losses", "threat"]
