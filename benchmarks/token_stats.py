"""token_stats beside eager log_softmax and torch.compile of it, from logits and from hidden states."""

import torch

from benchmarks.harness import Case, Variant
from tokenbook.kernels.token_stats import token_stats, token_stats_reference

LOGITS = {
    "small model, a batch of text": {"N": 2048, "V": 4096},
    "large vocabulary": {"N": 64, "V": 151_936},
}
HIDDEN = {"large vocabulary, hidden states": {"N": 256, "D": 256, "V": 151_936}}
CLOSE = "the same six numbers"


def cases(device: torch.device) -> list[Case]:
    half = ["bfloat16"] if device.type == "cuda" else []
    logits = [_from_logits(*item, dtype) for item in LOGITS.items() for dtype in ("float32", *half)]
    return logits + [_from_hidden(*item, dtype) for item in HIDDEN.items() for dtype in ("float32", *half)]


def _from_logits(name, shape, dtype) -> Case:
    n, n_vocabulary = shape.values()
    real = getattr(torch, dtype)

    def build(device):
        torch.manual_seed(0)
        logits = (3 * torch.randn(n, n_vocabulary, device=device)).to(real)
        ids = torch.randint(n_vocabulary, (n,), device=device)
        compiled = torch.compile(lambda: token_stats_reference(logits.float(), ids), dynamic=False)
        return {
            "token_stats": Variant(lambda: token_stats(logits, ids), CLOSE),
            "eager log_softmax": Variant(lambda: token_stats_reference(logits.float(), ids), CLOSE),
            "torch.compile": Variant(compiled, CLOSE, optional=True),
            "log_softmax alone": Variant(
                lambda: logits.float().log_softmax(-1), "one of the six, less its gather"
            ),
        }

    return Case(name, shape, dtype, "forward", build, real.itemsize * n * n_vocabulary)


def _from_hidden(name, shape, dtype) -> Case:
    n, width, n_vocabulary = shape.values()
    real = getattr(torch, dtype)

    def build(device):
        torch.manual_seed(0)
        hidden = torch.randn(n, width, device=device).to(real)
        weight = (torch.randn(n_vocabulary, width, device=device) / width**0.5).to(real)
        ids = torch.randint(n_vocabulary, (n,), device=device)

        def eager():
            return token_stats_reference((hidden @ weight.T).float(), ids)

        return {
            "token_stats": Variant(lambda: token_stats(hidden=hidden, weight=weight, token_ids=ids), CLOSE),
            "eager log_softmax": Variant(
                lambda: token_stats_reference((hidden @ weight.T).float(), ids), CLOSE
            ),
            "the product alone": Variant(lambda: hidden @ weight.T, "what no variant can do without"),
        }

    return Case(name, shape, dtype, "forward", build)
