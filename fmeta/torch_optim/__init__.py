"""fmeta's optimizers as `torch.optim.Optimizer`, for the training loop that one already has."""

from fmeta.torch_optim._adapter import LearnedOptimizer

__all__ = ["LearnedOptimizer"]
