"""Every law of families catches one that breaks it, and a sound one passes."""

import itertools

import pytest
import torch

from fmeta.tasks import TaskFamily, mixture, quadratic
from fmeta.testing import FAMILY_LAWS, Report, check_family

SPLITS = ("train", "validation", "test")


def sample(generator):
    return {"c": torch.randn(3, generator=generator)}


def init(config, generator):
    return {"x": torch.randn(3, generator=generator)}


def batches(config, generator, steps, split="train"):
    return {"z": torch.randn(steps, 3, generator=generator)}


def loss(data, config, params, batch):
    return data["scale"] * (params["x"] - config["c"] - batch["z"]).square().sum()


def metrics(data, config, params, batch):
    return {"distance": (params["x"] - config["c"]).norm()}


def extras(data, config, params, batch):
    return {"noise": batch["z"], "activations": [(config["c"], params["x"] * data["scale"])]}


def build(data=None, **changed):
    """A sound family written by hand, but for what is given."""
    data = {"scale": torch.tensor(2.0)} if data is None else data
    return TaskFamily(data, sample, init, batches, loss, metrics, extras)._replace(**changed)


def test_a_sound_one_passes():
    assert check_family(build()) == Report(dict.fromkeys(FAMILY_LAWS, SPLITS), {})


def extras_that_edit(data, config, params, batch):
    batch["z"].add_(1.0)
    return {"x": params["x"]}


def noisy_extras(data, config, params, batch):
    return {"x": params["x"] + torch.randn(3)}


def extras_doubled_by_vmap(data, config, params, batch):
    batched = torch._C._functorch.is_batchedtensor(params["x"])
    return {"x": params["x"] * (2 if batched else 1)}


def extras_of_the_task(data, config, params, batch):
    return {f"x{int(1000 * config['c'][0])}": params["x"]}


class Counter:
    """A loss that is another one at each call."""

    def __init__(self):
        self.n = 0

    def __call__(self, *arguments):
        self.n += 1
        return self.n * loss(*arguments)


def integer_params(config, generator):
    return {"x": torch.randn(3, generator=generator), "n": torch.tensor(3)}


def global_config(generator):
    return {"c": torch.randn(3)}


SEEDS = itertools.count()


def unseeded(config, generator):
    return {"x": torch.randn(3, generator=torch.Generator().manual_seed(next(SEEDS)))}


def same_batches(config, generator, steps, split="train"):
    return {"z": torch.zeros(steps, 3)}


def with_shared(config, generator, steps, split="train"):
    return {**batches(config, generator, steps), "mean": torch.zeros(3)}


def three_at_most(config, generator, steps, split="train"):
    return {"z": batches(config, generator, steps)["z"][:3]}


def of_the_task(config, generator, steps, split="train"):
    return {"z": config["c"].expand(steps, 3)}


def drops_out(data, config, params, batch):
    return loss(data, config, params, batch) * torch.rand(())


def noisy_metrics(data, config, params, batch):
    return {"distance": torch.rand(())}


def edits(data, config, params, batch):
    found = loss(data, config, params, batch)
    batch["z"].zero_()
    return found


def edits_data(data, config, params, batch):
    data["scale"].add_(1)
    return {"distance": params["x"].sum()}


def keeps_data(data, config, params, batch):
    data["seen"] = batch["z"]
    return loss(data, config, params, batch)


def edits_config(config, generator, steps, split="train"):
    found = batches(config, generator, steps)
    config["c"].mul_(2)
    return found


def init_edits(config, generator):
    found = init(config, generator)
    config["c"].sub_(1)
    return found


def detached(data, config, params, batch):
    return loss(data, config, {"x": params["x"].detach()}, batch)


def rooted(data, config, params, batch):
    """Its gradient at the initial parameters is infinite."""
    return (
        loss(data, config, params, batch) + (params["x"] - params["x"].detach()).abs().sqrt().sum()
    )


def kinked(data, config, params, batch):
    """As its gradient, the second derivative is infinite at the initial parameters."""
    gap = params["x"] - params["x"].detach()
    return loss(data, config, params, batch) + gap.abs().pow(1.5).sum()


class Once(torch.autograd.Function):
    """The square; torch.func takes its slope for a constant, and says nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square(), 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        return g * ctx.saved_tensors[0]


def differentiable_once(data, config, params, batch):
    return Once.apply(params["x"] - config["c"])[0].sum() + batch["z"].sum()


class Square(torch.autograd.Function):
    """A square whose gradient has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x.detach()


def once_differentiable(data, config, params, batch):
    return data["scale"] * Square.apply(params["x"] - config["c"] - batch["z"]).sum()


def float32_only(data, config, params, batch):
    return loss(data, config, {"x": params["x"].float()}, batch).sin()


def reads_values(data, config, params, batch):
    return loss(data, config, params, batch) * (2.0 if params["x"].sum() > 0 else 1.0)


class Same(torch.autograd.Function):
    """The identity, with a rule for `vmap` that doubles."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def vmap(info, in_dims, x):
        return 2 * x, in_dims[0]


class SameForward(torch.autograd.Function):
    """The identity, with a gradient that `vmap` doubles."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return Same.apply(g)


def doubled_by_vmap(data, config, params, batch):
    return Same.apply(loss(data, config, params, batch))


def steeper_by_vmap(data, config, params, batch):
    return SameForward.apply(loss(data, config, params, batch))


ON_CPU = torch.ones(3)


def closes_over(data, config, params, batch):
    return loss(data, config, {"x": params["x"] * ON_CPU}, batch)


def makes_on_cpu(data, config, params, batch):
    return loss(data, config, params, batch).new_ones((), device="cpu") * torch.zeros(())


def told(**found):
    return build(metrics=lambda data, config, params, batch: found)


def names_of_the_task(data, config, params, batch):
    name = "positive" if config["c"].sum() > 0 else "negative"
    return {name: params["x"].sum()}


BROKEN = [
    ("made_of_tensors", build({"scale": 2.0}), r"data\['scale'\] is a float, not a tensor"),
    ("made_of_tensors", build(init=integer_params), r"model_params\['n'\] is int64: parameters"),
    ("drawn_from_generator_alone", build(sample=global_config), "sample used torch's global"),
    ("drawn_from_generator_alone", build(init=unseeded), "init\\['x'\\] with an equal gen"),
    ("drawn_from_generator_alone", build(batches=same_batches), "the same for another generator"),
    ("steps_lead", build(batches=with_shared), r"batches\['mean'\] has shape \(3,\) for 1 steps"),
    ("steps_lead", build(batches=three_at_most), r"batches\['z'\] has shape \(3, 3\) for 5 steps"),
    ("steps_lead", build(batches=lambda *_, **__: ()), "batches hold no tensor"),
    ("splits_differ", build(batches=of_the_task), "the batches are those of split"),
    ("loss_is_scalar", build(loss=lambda d, c, p, b: p["x"]), r"loss has shape \(3,\)"),
    ("loss_is_scalar", build(loss=lambda *_: 1.0), "loss is a float, not a tensor"),
    ("loss_is_scalar", build(loss=lambda *_: torch.tensor(1)), "loss is int64: it must be float"),
    ("loss_is_scalar", build({"scale": torch.tensor(1e39)}), "loss is inf at the initial"),
    ("loss_deterministic", build(loss=drops_out), "loss used torch's global generator"),
    ("loss_deterministic", build(loss=Counter()), "loss called once more"),
    ("loss_deterministic", build(metrics=noisy_metrics), "metrics used torch's global generator"),
    ("inputs_unchanged", build(loss=edits), r"loss changed its argument batch\['z'\] in place"),
    ("inputs_unchanged", build(loss=keeps_data), "loss changed its argument data in place"),
    (
        "inputs_unchanged",
        build(metrics=edits_data),
        r"metrics changed its argument data\['scale'\]",
    ),
    (
        "inputs_unchanged",
        build(batches=edits_config),
        r"batches changed its argument config\['c'\]",
    ),
    (
        "inputs_unchanged",
        build(init=init_edits),
        r"init changed its argument config\['c'\] in place",
    ),
    ("twice_differentiable", build(loss=detached), "the gradient of the loss is zero everywhere"),
    ("twice_differentiable", build(loss=rooted), r"gradient\['x'\] is not finite"),
    ("twice_differentiable", build(loss=kinked), r"second derivative\['x'\] is not finite"),
    (
        "twice_differentiable",
        build(loss=differentiable_once),
        "the second derivative along a random direction is 0, differences of the gradient give",
    ),
    ("twice_differentiable", build(loss=once_differentiable), "is 0, differences .* give 1"),
    ("twice_differentiable", build(loss=float32_only), "differences of the gradient give"),
    ("vmap_equals_loop", build(loss=reads_values), "the family raised RuntimeError"),
    ("vmap_equals_loop", build(loss=doubled_by_vmap), "loss of task 0 under vmap"),
    ("vmap_equals_loop", build(loss=steeper_by_vmap), r"gradient\['x'\] of task 0 under vmap"),
    ("runs_on_meta", build(loss=closes_over), "on the meta device, loss raised"),
    ("runs_on_meta", build(loss=makes_on_cpu), "loss is on cpu, its arguments on meta"),
    ("metrics_are_scalars", build(metrics=lambda *_: torch.ones(())), "a Tensor, not a dict"),
    ("metrics_are_scalars", told(distance=torch.ones(2)), r"'distance'\] has shape \(2,\)"),
    ("metrics_are_scalars", told(distance=0.5), r"'distance'\] is a float, not a tensor"),
    ("metrics_are_scalars", told(right=torch.tensor(5)), r"'right'\] is int64, not floating"),
    ("metrics_are_scalars", told(loss=torch.tensor(torch.nan)), r"'loss'\] is nan"),
    (
        "metrics_are_scalars",
        build(metrics=lambda *_: {3: torch.ones(())}),
        "the key 3: it must be a string",
    ),
    ("metrics_are_scalars", build(metrics=names_of_the_task), "metrics are .*, of another task"),
    ("inputs_unchanged", build(extras=extras_that_edit), "extras"),
    ("loss_deterministic", build(extras=noisy_extras), "extras used torch's global generator"),
    (
        "vmap_equals_loop",
        build(extras=extras_doubled_by_vmap),
        r"extras\['x'\] of task 0 under vmap",
    ),
    ("runs_on_meta", build(extras=lambda *_: {"x": torch.ones(2)}), r"extras\['x'\] is on cpu"),
    ("extras_are_tensors", build(extras=lambda *_: torch.ones(())), "a Tensor, not a dict"),
    ("extras_are_tensors", build(extras=lambda *_: {3: torch.ones(())}), "must be a string"),
    ("extras_are_tensors", build(extras=lambda *_: {"x": 0.5}), r"'x'\] is a float, not a tensor"),
    (
        "extras_are_tensors",
        build(extras=lambda d, c, p, b: {"x": p["x"] / 0}),
        r"extras\['x'\] is not finite",
    ),
    ("extras_are_tensors", build(extras=extras_of_the_task), "extras have other names, shapes"),
]


@pytest.mark.parametrize(("law", "family", "message"), BROKEN)
def test_a_law_catches_what_breaks_it(law, family, message):
    with pytest.raises(AssertionError, match=rf"law {law}: .*{message}.* \[split 'train'\]"):
        FAMILY_LAWS[law](family)
    with pytest.raises(AssertionError, match="law "):
        check_family(family)


def test_every_law_is_broken_by_one():
    assert {law for law, _, _ in BROKEN} == set(FAMILY_LAWS)


def test_every_split_is_checked():
    def nothing_to_validate_on(config, generator, steps, split="train"):
        if split == "validation":
            raise KeyError(split)
        return batches(config, generator, steps)

    family = build(batches=nothing_to_validate_on)
    words = r"law made_of_tensors: the family raised KeyError: 'validation' \[split 'validation'\]"
    with pytest.raises(AssertionError, match=words):
        check_family(family)
    report = check_family(family, splits=("train", "test"))
    assert set(report.held.values()) == {("train", "test")}


def test_the_config_may_not_depend_on_the_split():
    def remembers(config, generator, steps, split="train"):
        calls.append(split)
        return batches(config, generator, steps)

    calls = []
    drifting = lambda generator: {"c": sample(generator)["c"] + len(calls)}
    with pytest.raises(AssertionError, match=r"config.*in split 'validation'"):
        FAMILY_LAWS["splits_differ"](build(sample=drifting, batches=remembers))


def test_what_does_not_apply_is_not_run():
    report = check_family(build(metrics=None, extras=None), splits=["train"])
    assert report.not_run == {
        "extras_are_tensors": "the family has no extras",
        "metrics_are_scalars": "the family has no metrics",
        "splits_differ": "there is one split only",
    }


def test_laws_are_chosen_by_name():
    broken = build(loss=drops_out)
    report = check_family(broken, laws=["steps_lead"])
    assert report.held == {"steps_lead": SPLITS}
    assert report.not_run["loss_deterministic"] == "not among `laws`"
    report = check_family(quadratic(), exclude=["runs_on_meta"])
    assert report.not_run["runs_on_meta"] == "excluded"
    with pytest.raises(ValueError, match="there is no law 'fast'; there are made_of_tensors"):
        check_family(build(), laws=["fast"])


@pytest.mark.parametrize("options", [{"splits": ()}, {"steps": 0}, {"num_tasks": 0}])
def test_a_check_of_nothing_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"nothing to check with {name} of 0"):
        check_family(build(), **options)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match="takes a TaskFamily, got a Mixture: of a mixture, check"):
        check_family(mixture([build()]))
