"""The nearest code of each vector: distance and argmin in one pass, without the matrix [N, K] of distances.

    euclidean:  argmin_k |x - c_k|^2 = argmin_k (|c_k|^2 / 2 - <x, c_k>)
    cosine:     argmin_k 1 - <x, c_k> / (|x| |c_k|);  a zero vector has cosine 0 with everything

Shapes: x [..., D], codebook [K, D], floating; index int64 [...], distance [...]. O(N K D) time, memory
O(N + K) beyond one block of scores.

Delicate: the short form cancels where distances are small beside the norms, and a matrix product rounds equal
columns differently, so its argmin alone breaks ties at random. Therefore the fast pass keeps the best and the
second-best score; rows where these are closer than the rounding error could be are settled: all codes inside
that error are compared by the long form in float64. The index is that of float64 for every dtype, and equal
distances go to the lowest index. Values whose squares might overflow are scaled by one power of two first,
which is exact.

Source: van den Oord et al., Neural Discrete Representation Learning (1711.00937), equation 1. Used by the
chapters `star`, `dd2`, `vqtoken`, `nvspeech` and `cm3`.
"""

import functools
import math
from typing import NamedTuple

import torch

from tokenbook.kernels._dispatch import choose_backend

METRICS = ("euclidean", "cosine")
SCORES_PER_BLOCK = 2**19  # float32 scores in one block: 2 MiB, which stay in the cache
PAIR_VALUES_PER_BLOCK = 2**17  # values in one block of long-form distances: 1 MiB in float64


class NearestCode(NamedTuple):
    """index [...] int64; distance [...], squared Euclidean or 1 - cosine, float32 (float64 for float64)."""

    index: torch.Tensor
    distance: torch.Tensor


def nearest_code(
    x: torch.Tensor, codebook: torch.Tensor, *, metric: str = "euclidean", backend: str = "auto"
) -> NearestCode:
    """Find the code nearest to every vector.

    Args:
        x: vectors [..., D], floating, finite, not empty.
        codebook: codes [K, D], floating, finite.
        metric: "euclidean" or "cosine".
        backend: "auto", "triton", "torch" or "reference".

    Returns: NearestCode(index, distance). Ties go to the lowest index. No gradient flows through either; a
        quantiser's losses are taken on codebook[index].

    Raises ValueError naming the argument, what was given and what is allowed.
    """
    _check(x, codebook, metric)
    chosen = choose_backend("nearest_code", backend, {"x": x, "codebook": codebook})
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # bfloat16 scores would be no search
        rows = x.detach().reshape(-1, x.shape[-1])
        codes = codebook.detach()
        wide = _wide(x, codebook)
        scale = _scale(wide, x=rows, codebook=codes)
        if chosen == "reference":
            found = nearest_code_reference(rows, codes, metric=metric)
            return NearestCode(found.index.view(x.shape[:-1]), found.distance.view(x.shape[:-1]))
        columns = codes.to(wide) * scale
        norms = _norms(columns)
        if metric == "cosine":
            columns = columns / norms[:, None].masked_fill(norms[:, None] == 0, 1)
            offsets = norms.new_zeros(len(codes))
        else:
            offsets = norms.square() / 2
        search = _search_triton if chosen == "triton" else _search_torch
        index, best, second = search(rows, columns, offsets, scale)
        # How far rounding can move two scores apart. 8 sqrt(D) eps exceeds the worst case of sums in 16 lanes
        # up to D = 16,384, and for one running sum the odds against are astronomical (Higham and Mary, 2019).
        reach = _norms(_scaled(rows, wide, scale)) * _norms(columns).max() + offsets.max()
        reach *= (8 * math.sqrt(rows.shape[1]) + 8) * torch.finfo(wide).eps
        doubtful = (second - best <= reach).nonzero().flatten()
        _settle(index, doubtful, rows, codes, columns, offsets, reach, scale, metric)
        # x - c is rounded once, however close the two are; 1 - cosine cancels.
        accurate = wide if metric == "euclidean" else torch.float64
        distance = _long_form(rows, codes, None, index, metric, scale, accurate).to(wide)
    return NearestCode(index.view(x.shape[:-1]), distance.view(x.shape[:-1]))


def nearest_code_reference(x, codebook, *, metric="euclidean") -> NearestCode:
    """The definition in float64: every distance of every vector, one vector after the other; ties lowest."""
    rows, codes = x.double().reshape(-1, x.shape[-1]), codebook.double()
    index, distance = [], []
    for row in rows:
        if metric == "cosine":
            product = row.norm() * codes.norm(dim=1)
            distances = 1 - torch.where(product > 0, (codes * row).sum(1) / product, 0.0)
        else:
            distances = (row - codes).square().sum(1)
        index.append(int((distances == distances.min()).nonzero()[0]))
        distance.append(distances[index[-1]])
    shape = x.shape[:-1]
    distances = torch.stack(distance).to(_wide(x, codebook))
    return NearestCode(torch.tensor(index, device=x.device).view(shape), distances.view(shape))


def _wide(x, codebook) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)


def _scale(wide: torch.dtype, **tensors) -> float:
    """1, or where squares might overflow, a power of two that brings the largest value near 1."""
    largest = {name: float(torch.stack(torch.aminmax(t)).abs().max()) for name, t in tensors.items()}
    for name, value in largest.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got NaN or infinity among its values")
    exponent = math.frexp(max(largest.values()))[1]
    if abs(exponent) < 40:
        return 1.0
    limit = 1000 if wide == torch.float64 else 100  # 2^-limit is a normal number, in the kernel too
    return 2.0 ** -min(max(exponent, -limit), limit)


def _scaled(rows, wide, scale):
    return rows.to(wide) if scale == 1 else rows.to(wide) * scale


def _norms(rows):
    return torch.linalg.vector_norm(rows, dim=1)


def _search_torch(rows, columns, offsets, scale):
    """Index, best and second-best score [N], block by block of rows."""
    n, step = len(rows), max(1, SCORES_PER_BLOCK // len(columns))
    index = torch.empty(n, dtype=torch.int64, device=rows.device)
    best, second = offsets.new_empty(n), offsets.new_empty(n)
    for here in (slice(i, min(i + step, n)) for i in range(0, n, step)):
        scores = _scores(rows[here], columns, offsets, scale)
        best[here], index[here] = scores.min(1)
        scores.scatter_(1, index[here, None], math.inf)
        second[here] = scores.amin(1)
    return index, best, second


def _scores(rows, columns, offsets, scale):
    return torch.addmm(offsets, _scaled(rows, columns.dtype, scale), columns.T, alpha=-1)


def _settle(index, doubtful, rows, codes, columns, offsets, reach, scale, metric) -> None:
    """Decide the doubtful rows by long-form float64 distances among all codes within reach; lowest index."""
    step = max(1, SCORES_PER_BLOCK // len(columns))
    for some in doubtful.split(step):
        scores = _scores(rows[some], columns, offsets, scale)
        near = scores <= scores.amin(1, keepdim=True) + reach[some, None]
        row, code = near.nonzero(as_tuple=True)  # sorted by row, then by code
        distance = _long_form(rows, codes, some[row], code, metric, scale, torch.float64)
        lowest = distance.new_full((len(some),), math.inf).scatter_reduce_(0, row, distance, "amin")
        winners = distance == lowest[row]
        chosen = index.new_full((len(some),), len(codes))
        index[some] = chosen.scatter_reduce_(0, row[winners], code[winners], "amin")


def _long_form(rows, codes, row, code, metric, scale, dtype) -> torch.Tensor:
    """Distances of the pairs (row, code), in dtype and in bounded blocks; row None: row i with code[i]."""
    step = max(1, PAIR_VALUES_PER_BLOCK // rows.shape[1])
    distance = torch.empty(len(code), dtype=dtype, device=rows.device)
    for here in (slice(i, i + step) for i in range(0, len(code), step)):
        x = rows[here if row is None else row[here]].to(dtype)
        c = codes.index_select(0, code[here]).to(dtype)
        if metric == "cosine":
            x, c = x * scale, c * scale
            product = _norms(x) * _norms(c)
            distance[here] = 1 - torch.where(product > 0, (x * c).sum(1) / product, 0.0)
        else:
            distance[here] = (x - c).square_().sum(1)
    return distance


def _search_triton(rows, columns, offsets, scale):
    """Index, best and second-best score [N] by the kernel."""
    import triton

    n = len(rows)
    index = torch.empty(n, dtype=torch.int64, device=rows.device)
    best, second = offsets.new_empty(n), offsets.new_empty(n)
    grid = lambda meta: (triton.cdiv(n, meta["ROWS"]),)  # noqa: E731
    _kernel()[grid](
        rows, columns, offsets, index, best, second, scale, n, len(columns), rows.shape[1],
        *rows.stride(), *columns.stride(),
    )  # fmt: skip
    return index, best, second


@functools.cache
def _kernel():
    import triton
    import triton.language as tl

    from tokenbook.kernels._dispatch import interpreting

    configs = [
        triton.Config({"ROWS": rows, "CODES": codes, "DEPTH": depth}, num_warps=warps, num_stages=stages)
        for rows, codes, depth, warps, stages in (
            (32, 64, 32, 4, 3),
            (64, 64, 32, 4, 3),
            (64, 128, 32, 8, 3),
            (128, 64, 16, 8, 2),
            (16, 128, 64, 4, 2),
        )
    ]

    @triton.autotune(configs[:1] if interpreting() else configs, key=["n_codes", "width"])
    @triton.jit
    def search(
        x_ptr, codes_ptr, offsets_ptr, index_ptr, best_ptr, second_ptr, scale, n_rows, n_codes, width,
        x_row, x_column, c_row, c_column,
        ROWS: tl.constexpr, CODES: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        real = rows < n_rows
        best = tl.full([ROWS], float("inf"), tl.float32)
        second = tl.full([ROWS], float("inf"), tl.float32)
        index = tl.zeros([ROWS], tl.int64)
        for first in range(0, n_codes, CODES):
            codes = first + tl.arange(0, CODES).to(tl.int64)
            known = codes < n_codes
            product = tl.zeros([ROWS, CODES], tl.float32)
            for start in range(0, width, DEPTH):
                d = start + tl.arange(0, DEPTH).to(tl.int64)
                deep = d < width
                x_at = x_ptr + rows[:, None] * x_row + d[None, :] * x_column
                x = tl.load(x_at, mask=real[:, None] & deep[None, :], other=0.0).to(tl.float32) * scale
                c_at = codes_ptr + codes[None, :] * c_row + d[:, None] * c_column
                c = tl.load(c_at, mask=deep[:, None] & known[None, :], other=0.0).to(tl.float32)
                product = tl.dot(x, c, product, input_precision="ieee")
            offset = tl.load(offsets_ptr + codes, mask=known, other=float("inf"))
            scores = offset[None, :] - product
            low = tl.min(scores, axis=1)
            at = tl.argmin(scores, axis=1)
            without = tl.where(tl.arange(0, CODES)[None, :] == at[:, None], float("inf"), scores)
            runner_up = tl.min(without, axis=1)
            second = tl.minimum(tl.minimum(second, runner_up), tl.maximum(best, low))
            index = tl.where(low < best, first + at, index)
            best = tl.minimum(best, low)
        tl.store(index_ptr + rows, index, mask=real)
        tl.store(best_ptr + rows, best, mask=real)
        tl.store(second_ptr + rows, second, mask=real)

    return search


def _check(x, codebook, metric) -> None:
    for name, tensor in {"x": x, "codebook": codebook}.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise ValueError(f"{name} must not be empty or a scalar, got shape {list(tensor.shape)}")
    if codebook.dim() != 2 or codebook.shape[1] != x.shape[-1]:
        raise ValueError(f"codebook must be [K, {x.shape[-1]}], D from x; got {list(codebook.shape)}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
