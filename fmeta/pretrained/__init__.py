"""Weights of learned optimizers, to share: one safetensors file that says which rule it is for."""

from fmeta.pretrained._files import load, save
from fmeta.pretrained._google import from_google
from fmeta.pretrained._pylo import from_pylo

__all__ = ["from_google", "from_pylo", "load", "save"]
