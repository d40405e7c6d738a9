"""A compiled step compiles once: over steps, schedules of the rate, and what is loaded.

Graphs are run as they were traced (no C++ compiler); that they are the same as the step in values
is what is tested, and how many there are.
"""

import copy

import pytest
import torch

from fmeta import optimizers
from fmeta.torch_optim import LearnedOptimizer


class Counting:
    """A backend that runs a graph as it is and counts."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(len(graph.graph.nodes))
        return graph.forward


@pytest.fixture(autouse=True)
def _forgotten():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(kit, rule, how, counting=None, **options):
    """Six steps with a schedule, and a state that is loaded after three of them."""
    model = kit.net()
    if how == "option":
        options["compile"] = {"backend": counting, "fullgraph": True}
    groups = [
        {"params": list(model[0].parameters()), "weight_decay": 0.1},
        {"params": list(model[2].parameters())},
    ]
    opt = LearnedOptimizer(groups, rule, num_steps=9, **options)
    step = torch.compile(opt.step, backend=counting) if how == "outside" else None
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    kit.train(model, opt, 0, 3, scheduler, step)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    kit.train(model, opt, 3, 6, scheduler, step)
    return model, opt


# The scheduler looks for its own wrapper around opt.step, which the compiled one goes past.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize(
    ("rule", "how"),
    [
        ("adam", "option"),
        ("adam", "outside"),
        ("lstm", "option"),
        ("normalized_mlp", "outside"),
        ("adafactor_mlp", "option"),
        ("basis_mlp", "option"),
    ],
)
def test_one_graph_for_all_steps(rule, how, kit):
    counting = Counting()
    model, opt = trained(kit, rule, how, counting)
    assert len(counting.graphs) == 1
    plain, other = trained(kit, rule, "not")
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for k, x in opt.state[p].items():
            torch.testing.assert_close(x, other.state[q][k], rtol=1e-5, atol=1e-7)


def test_rates_that_are_tensors_and_masked_steps(kit):
    counting = Counting()
    model, _ = trained(kit, "adam", "option", counting, lr=torch.tensor(0.5), nonfinite="skip")
    assert len(counting.graphs) == 1
    plain, _ = trained(kit, "adam", "not", lr=torch.tensor(0.5))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_parameters_in_bfloat16_with_functionalised_graphs(kit):
    """The backend that a real compiler sits behind: in-place changes become outputs."""

    def run(**options):
        model = kit.net(dtype=torch.bfloat16)
        opt = LearnedOptimizer(model.parameters(), optimizers.adam(0.01), lr=0.5, **options)
        kit.train(model, opt, 0, 3)
        return model, opt

    model, opt = run(compile={"backend": "aot_eager"}, weight_decay=0.1)
    plain, other = run(weight_decay=0.1)
    assert kit.same(model, plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(opt.state[p]["m"], other.state[q]["m"])


def test_copies_compile_for_themselves(kit):
    counting = Counting()
    model = kit.net()
    opt = LearnedOptimizer(
        model.parameters(), "adam", compile={"backend": counting, "fullgraph": True}
    )
    kit.train(model, opt, 0, 1)
    twin_model, twin = copy.deepcopy((model, opt))
    kit.train(model, opt, 1, 3)
    kit.train(twin_model, twin, 1, 3)
    assert kit.same(model, twin_model)
