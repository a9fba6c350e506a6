"""Adversarial robustness through clustering, in JAX and Flax.

Images are float32, NHWC, in [0, 1]; labels are int32; `eps` is on that pixel scale. A classifier
is any callable from images [b, h, w, c] to logits [b, k].
"""
