"""Weights of learned optimizers, to share: one safetensors file that says which rule it is for."""

from fmeta.pretrained._files import load, save

__all__ = ["load", "save"]
