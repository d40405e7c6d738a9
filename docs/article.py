"""The meta-learner and training loop of T. Wolf's article (2018), on scikit-learn's digits.

Rule: parameter += weight @ [gradient, parameter]. Adam learns it from the sum of inner losses.
"""

import torch
from torch import nn

import fmeta
from fmeta.tasks import digits, loss_of_task, sample_task

START = torch.tensor([[-0.1, 0.0]])  # untrained, the rule is gradient descent with rate 0.1

net = nn.Linear(2, 1, bias=False)
net.weight.data = START
by_module = fmeta.coordinatewise(net)  # the rule as a module, shared by all coordinates ...


class Linear:  # ... and the same rule by hand, for one coordinate
    def init(self, generator):
        return {"weight": START}

    def init_hidden(self, opt_params, param):
        return {}

    def step(self, opt_params, param, grad, hidden):
        return param + opt_params["weight"][0] @ torch.stack([grad, param]), hidden


by_hand = fmeta.coordinatewise(Linear())
family = digits(widths=(32,))
loss_fn = loss_of_task(family)
task, params, batches = sample_task(family, 20, 0)  # a classifier, 20 batches of 128 images


def meta_loss(opt_params, optimizer, order):  # the meta-forward pass
    run = fmeta.unroll(
        optimizer, loss_fn, opt_params, params, batches, loss_args=(task,), first_order=order
    )
    return run.losses.sum(), run.losses


def train(optimizer, order, meta_epochs=15):
    outer, opt_params, history = fmeta.optimizers.adam(lr=0.02), optimizer.init(), []
    hidden = outer.init_hidden({}, opt_params)
    meta_backward = torch.func.grad_and_value(meta_loss, has_aux=True)
    for _ in range(meta_epochs):
        grads, (loss, _) = meta_backward(opt_params, optimizer, order)
        opt_params, hidden = outer.step({}, opt_params, grads, hidden)
        history.append(float(loss))
    return history


if __name__ == "__main__":
    for name, order in (("on", False), ("off", "inputs")):  # "inputs": what the article detaches
        print(f"second derivatives {name}\n  epoch   by module     by hand")
        both = zip(train(by_module, order), train(by_hand, order), strict=True)
        for epoch, (a, b) in enumerate(both):
            print(f"  {epoch:5d} {a:11.6f} {b:11.6f}")
            assert abs(a - b) <= 1e-6 * abs(a)
