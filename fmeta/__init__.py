"""Functional learned optimizers and meta-learning on torch.

Training a model is a pure function of data: a scan of `step` over batches. Everything in fmeta is a
function of that shape or a transform of one, so whatever goes into training (the parameters of an
optimizer, the initial parameters of a model, or both) can be learned by differentiating through it.
"""

__version__ = "0.1.0"
