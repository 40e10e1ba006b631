"""The choice of a backend, its record, and the interpreter bridge of conftest.py."""

import os

import pytest
import torch

from tokenbook import kernels
from tokenbook.kernels import _dispatch
from tokenbook.kernels._dispatch import choose_backend


@pytest.fixture(autouse=True)
def _fresh_record(monkeypatch):
    monkeypatch.delenv("TOKENBOOK_BACKEND", raising=False)
    kernels.forget_backends()


class FakeCuda:
    """Looks to the dispatcher like a tensor on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype):
        self.dtype = dtype


def test_auto_takes_torch_on_cpu_and_triton_on_cuda(monkeypatch):
    monkeypatch.setattr(_dispatch, "triton_problem", lambda: None)
    assert choose_backend("op", "auto", {"x": torch.ones(1)}) == "torch"
    assert choose_backend("op", "auto", {"x": FakeCuda(torch.float16)}) == "triton"
    assert choose_backend("op", "auto", {"x": FakeCuda(torch.float16)}, unsupported="d > 256") == "torch"
    assert choose_backend("op", "auto", {"x": FakeCuda(torch.float64)}) == "torch"
    monkeypatch.setattr(_dispatch, "triton_problem", lambda: "Triton does not import")
    assert choose_backend("op", "auto", {"x": FakeCuda(torch.float16)}) == "torch"


def test_forced_triton_says_why_it_cannot(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="op: backend 'triton' cannot run here: the tensors are not on CUDA"):
        choose_backend("op", "triton", {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="x is float64"):
        choose_backend("op", "triton", {"x": FakeCuda(torch.float64)})
    with pytest.raises(ValueError, match="d > 256"):
        choose_backend("op", "triton", {"x": FakeCuda(torch.float16)}, unsupported=lambda: "d > 256")


def test_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="x is bfloat16, in which Triton's interpreter is silently wrong"):
        choose_backend("op", "triton", {"x": torch.ones(1, dtype=torch.bfloat16)})


def test_environment_replaces_auto_and_a_named_backend_wins(monkeypatch):
    monkeypatch.setenv("TOKENBOOK_BACKEND", "reference")
    assert choose_backend("op", "auto", {"x": torch.ones(1)}) == "reference"
    assert choose_backend("op", "torch", {"x": torch.ones(1)}) == "torch"
    monkeypatch.setenv("TOKENBOOK_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"TOKENBOOK_BACKEND must be one of .*; got 'cuda'"):
        choose_backend("op", "auto", {"x": torch.ones(1)})


def test_unknown_backend_and_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference; got 'gpu'"):
        choose_backend("op", "gpu", {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="op: all tensors must be on one device, got x on cpu, y on meta"):
        choose_backend("op", "auto", {"x": torch.ones(1), "y": torch.ones(1, device="meta"), "z": None})


def test_record_says_what_ran():
    choose_backend("b", "torch", {"x": torch.ones(1)})
    choose_backend("a", "torch", {"x": torch.ones(1)})
    choose_backend("a", "reference", {"x": torch.ones(1)})
    assert kernels.backends_used() == {"a": "reference+torch", "b": "torch"}
    kernels.forget_backends()
    assert kernels.backends_used() == {}


@pytest.mark.interpreter
def test_interpreter_runs_a_kernel_with_a_reduction():
    import triton
    import triton.language as tl

    @triton.jit
    def total(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out_ptr, tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0)))

    x, out = torch.arange(5.0), torch.full((1,), float("nan"))
    total[(1,)](x, out, 5, BLOCK=8)
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert out.item() == 10.0
