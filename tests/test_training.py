"""The fit loop learns, schedules end, seeds repeat, and progress leaves nothing on stderr."""

import math
import random
import time
from itertools import pairwise

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from tokenbook import training


def linear_problem():
    generator = training.seed_everything(0)
    x = torch.randn(256, 4, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0])
    model = torch.nn.Linear(4, 1)
    return model, lambda step: ((model(x).squeeze(1) - y) ** 2).mean()


def test_fit_lowers_the_loss_and_leaves_eval_mode():
    model, loss_at = linear_problem()
    fit = training.fit(model, loss_at, 200, lr=0.1)
    assert len(fit.losses) == len(fit.grad_norms) == 200
    assert fit.final_loss(5) < 1e-2 * fit.losses[0]
    assert not model.training


def test_fit_with_one_seed_is_the_same_twice():
    runs = [training.fit(*linear_problem(), 20, lr=0.1).losses for _ in range(2)]
    assert runs[0] == runs[1]


def test_fit_clips_the_step_not_the_reported_norm():
    model, loss_at = linear_problem()
    before = [p.clone() for p in model.parameters()]
    fit = training.fit(model, loss_at, 1, lr=0.1, weight_decay=0.0, warmup=0, clip=1e-3)
    assert fit.grad_norms[0] > 1.0
    assert all(p.grad.norm() < 1.1e-3 for p in model.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_zero_steps_leave_the_model_as_it_was():
    model, loss_at = linear_problem()
    before = model.weight.clone()
    assert math.isnan(training.fit(model, loss_at, 0, lr=0.1).final_loss())
    assert torch.equal(model.weight, before)


def test_a_loss_that_is_not_finite_stops_the_fit():
    model, _ = linear_problem()
    with pytest.raises(FloatingPointError, match="loss of step 0 is nan"):
        training.fit(model, lambda step: model.weight.sum() * float("nan"), 3, lr=0.1)


@pytest.mark.parametrize(("name", "value"), [("schedule", "cosin"), ("n_steps", -1)])
def test_bad_arguments_are_named(name, value):
    model, loss_at = linear_problem()
    options = {"n_steps": 1, "lr": 0.1} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        training.fit(model, loss_at, **options)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_warm_up_then_fall_to_the_floor(schedule):
    factors = [training.learning_rate_factor(s, 100, 10, schedule, floor=0.1) for s in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_seeds_reach_every_generator():
    draws = []
    for _ in range(2):
        generator = training.seed_everything(7)
        legacy = np.random.rand()  # noqa: NPY002 - the global state is what is tested
        draws.append(
            [random.random(), legacy, torch.rand(1).item(), torch.rand(1, generator=generator).item()]
        )
    assert draws[0] == draws[1]


def test_windows_are_contiguous_and_reach_both_ends():
    ids = torch.arange(20)
    windows = training.random_windows(ids, 18, 200, torch.Generator().manual_seed(0))
    assert windows.shape == (200, 18)
    assert (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="at most the corpus' 20 ids, got 21"):
        training.random_windows(ids, 21, 1, torch.Generator())


def test_progress_in_a_notebook_ends_as_one_plain_line_and_keeps_stderr_clean():
    source = (
        "import time\nfrom tokenbook import training\n"
        "for _ in training.progress(range(3), 'working'):\n    time.sleep(0.3)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert [o.output_type for o in outputs] == ["display_data"]
    assert outputs[0].data == {"text/plain": "working: 3 of 3"}


def test_progress_outside_a_notebook_is_silent_without_a_terminal(capsys):
    assert list(training.progress(range(3), "working")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def small_fit(seed):
    """The losses of a short fit that draws from its own generator only."""
    model = torch.nn.Linear(4, 1)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 4, generator=draw))
        model.bias.zero_()

    def loss_at(step):
        return model(torch.randn(8, 4, generator=draw)).square().mean()

    return training.fit(model, loss_at, 20, lr=0.01, show_progress=False).losses


def test_side_by_side_gives_what_one_by_one_gives_in_the_order_asked_for():
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = training.side_by_side({s: lambda s=s: small_fit(s) for s in (3, 1, 2)}, torch.device("cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(n_threads)
    assert list(found) == [3, 1, 2]
    assert found == {s: small_fit(s) for s in (1, 2, 3)}


def test_side_by_side_raises_the_first_error_and_begins_nothing_more():
    begun = []

    def fail():
        raise FloatingPointError("the loss of step 3 is nan")

    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        jobs = {"bad": fail, **{n: lambda n=n: begun.append(n) or time.sleep(0.05) for n in range(50)}}
        with pytest.raises(FloatingPointError, match="step 3"):
            training.side_by_side(jobs, torch.device("cpu"))
    finally:
        torch.set_num_threads(n_threads)
    assert len(begun) < 50
