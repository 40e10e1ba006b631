"""One fit loop for the small models, a progress display that leaves no trace on stderr, and seeds."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SCHEDULES = ("cosine", "linear", "constant")


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and torch (all devices); return a CPU generator with the same seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries underneath draw from the global state
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def progress(iterable: Iterable, description: str, total: int | None = None) -> Iterator:
    """Iterate with a progress bar; in a notebook it ends as the plain line `description: n of total`.

    A notebook gets nothing on stderr, and its saved output holds no time: two runs save the same.
    On a terminal tqdm draws the bar; where stderr is no terminal nothing is drawn.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if not _in_notebook():
        from tqdm import tqdm

        yield from tqdm(iterable, desc=description, total=total, disable=not sys.stderr.isatty())
        return
    from IPython.display import display

    handle = display({"text/plain": description}, raw=True, display_id=True)
    n_done, start, drawn = 0, time.monotonic(), 0.0
    for item in iterable:
        yield item
        n_done += 1
        now = time.monotonic()
        if now - drawn > 0.5:  # two updates a second: each is a message to every client
            handle.update(_bar(description, n_done, total, now - start), raw=True)
            drawn = now
    handle.update({"text/plain": f"{description}: {n_done}" + (f" of {total}" if total else "")}, raw=True)


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _bar(description: str, n_done: int, total: int | None, seconds: float) -> dict[str, str]:
    count = f"{n_done}/{total}" if total else f"{n_done}"
    text = f"{description}: {count}, {seconds:.0f} s"
    return {
        "text/plain": text,
        "text/html": f"<progress value='{n_done}' max='{total or 0}'></progress> {text}",
    }


def learning_rate_factor(step: int, n_steps: int, warmup: int, schedule: str, floor: float = 0.0) -> float:
    """Factor on the learning rate at `step`: linear warm-up, then the schedule down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, n_steps - warmup)
    shape = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
    return floor + (1.0 - floor) * shape


@dataclass(frozen=True)
class Fit:
    """What a fit leaves behind: the loss (nats) and the gradient's norm of every step, and the time taken."""

    losses: list[float]
    grad_norms: list[float]
    seconds: float

    def final_loss(self, n: int = 20) -> float:
        """Mean loss of the last `n` steps, nats (nan when no step was made)."""
        return float(np.mean(self.losses[-n:])) if self.losses else math.nan


def fit(
    model: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    n_steps: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float = 0.01,
    warmup: int | None = None,
    schedule: str = "cosine",
    clip: float | None = 1.0,
    description: str = "training",
    show_progress: bool = True,
) -> Fit:
    """Train the parameters of `model` that require a gradient with AdamW; the model is left in eval mode.

    `loss_at(step)` draws the batch of that step and returns its scalar loss.  `warmup` is in steps (default:
    5 % of `n_steps`), `clip` bounds the gradient's norm (None: no bound); `show_progress=False` for fits that
    run `side_by_side`.  Raises FloatingPointError at the first loss that is not finite, ValueError on an
    unknown schedule or a negative number of steps.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if n_steps < 0:
        raise ValueError(f"n_steps must be at least 0, got {n_steps}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    n_warmup = max(1, round(0.05 * n_steps)) if warmup is None else warmup
    schedule_lr = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, n_steps, n_warmup, schedule)
    )
    losses, grad_norms, start = [], [], time.perf_counter()
    model.train()
    steps = range(n_steps)
    for step in progress(steps, description, n_steps) if show_progress else steps:
        loss = loss_at(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{description}: the loss of step {step} is {loss.item()}; lower lr (now {lr})"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        optimizer.step()
        schedule_lr.step()
        losses.append(loss.item())
        grad_norms.append(float(norm))
    model.eval()
    return Fit(losses, grad_norms, time.perf_counter() - start)


def side_by_side(
    jobs: Mapping[Hashable, Callable[[], Any]], device: torch.device, description: str = "trainings"
) -> dict[Hashable, Any]:
    """Call every job and return {name: result}, in the order given, with one progress bar over all of them.

    On the CPU as many at once as torch has threads, each with one thread: a small model's operations are too
    short to be shared out, so two trainings at once take little longer than one.  Elsewhere one by one.  Jobs
    must not draw from the global random state: make models beforehand, and take generators.  The first error
    ends the rest that have not begun, and is raised.
    """
    n_threads = torch.get_num_threads()
    n_workers = n_threads if device.type == "cpu" else 1
    threads = {"initializer": torch.set_num_threads, "initargs": (max(1, n_threads // n_workers),)}
    try:
        with ThreadPoolExecutor(n_workers, **threads) as pool:
            running = {pool.submit(job): name for name, job in jobs.items()}
            try:
                for done in progress(as_completed(running), description, len(running)):
                    done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(n_threads)  # the setting of a thread becomes that of the process
    return {name: future.result() for future, name in running.items()}


def random_windows(ids: torch.Tensor, length: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """`batch` windows of `length` ids, drawn uniformly from a corpus [n] -> [B, T] int64."""
    if len(ids) < length:
        raise ValueError(f"length must be at most the corpus' {len(ids)} ids, got {length}")
    starts = torch.randint(0, len(ids) - length + 1, (batch,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)].long()
