"""The article's script runs, its two forms agree, and its claims about second derivatives hold."""

import itertools
import re
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "docs" / "article.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def meta_gradient(script, optimizer, order, weight=None):
    opt_params = optimizer.init() if weight is None else {"weight": weight}
    grads, (_, losses) = torch.func.grad_and_value(script["meta_loss"], has_aux=True)(
        opt_params, optimizer, order
    )
    return grads["weight"], losses


def test_it_is_at_most_60_lines():
    assert len(SCRIPT.read_text().splitlines()) <= 60


def test_it_prints_equal_and_falling_meta_losses(capsys):
    runpy.run_path(str(SCRIPT), run_name="__main__")
    tables = capsys.readouterr().out.split("second derivatives")[1:]
    assert [t.split()[0] for t in tables] == ["on", "off"]
    for table in tables:
        rows = re.findall(r"^ +\d+ +([\d.]+) +([\d.]+)$", table, flags=re.MULTILINE)
        by_module = [float(a) for a, _ in rows]
        by_hand = [float(b) for _, b in rows]
        assert len(rows) == 15
        assert by_module == pytest.approx(by_hand, rel=1e-6)
        assert by_module[-1] < 0.6 * by_module[0]
        assert all(b < a for a, b in itertools.pairwise(by_module))


@pytest.mark.parametrize("order", [False, "inputs"])
def test_both_forms_and_the_built_in_rule_have_equal_meta_gradients(script, order):
    import fmeta

    weight = torch.tensor([[-0.2, -0.01]])
    grads, losses = meta_gradient(script, script["by_module"], order, weight)
    for other in (script["by_hand"], fmeta.optimizers.linear()):
        other_grads, other_losses = meta_gradient(script, other, order, weight)
        torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other_grads, grads, rtol=1e-4, atol=1e-4)


def test_second_order_changes_the_meta_gradient_but_not_the_inner_losses(script):
    exact, losses = meta_gradient(script, script["by_module"], False)
    for order in ("gradients", "inputs"):
        grads, same_losses = meta_gradient(script, script["by_module"], order)
        assert torch.equal(same_losses, losses)
        assert (grads - exact).norm() > 1e-2 * exact.norm()


def test_off_is_what_the_article_detaches(script):
    """Against a loop as the article has it: inputs as data, the path through param + dW open."""
    task, params, batches = script["task"], script["params"], script["batches"]
    weight = torch.tensor([[-0.1, 0.0]], requires_grad=True)
    losses = []
    for batch in batches:
        leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
        inner = script["loss_fn"](leaves, batch, task)
        found = dict(zip(leaves, torch.autograd.grad(inner, list(leaves.values())), strict=True))
        losses.append(script["loss_fn"](params, batch, task))
        params = {
            k: p + (torch.stack([found[k], leaves[k].detach()], -1) @ weight[0])
            for k, p in params.items()
        }
    sum(losses).backward()
    grads, same_losses = meta_gradient(script, script["by_module"], "inputs")
    torch.testing.assert_close(same_losses, torch.stack(losses).detach())
    torch.testing.assert_close(grads, weight.grad, rtol=1e-4, atol=1e-4)
