"""The metrics against formulas written out here, scipy's own functions and hand-computed values."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F

from tokenbook import metrics
from tokenbook.kernels.selective_scan import selective_scan


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_importing_the_metrics_loads_neither_scikit_learn_nor_scipy():
    code = "import sys, tokenbook.metrics; print({'sklearn', 'scipy', 'triton'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- intervals --------------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_has_the_width_of_the_normal_interval():
    values = 3 + 2 * normal(0, 400)
    low, high = metrics.bootstrap_interval(values, n_draws=20_000)
    half = 1.959964 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    intervals = [metrics.bootstrap_interval(normal(s, 60), n_draws=300, seed=s) for s in range(300)]
    covered = sum(low <= 0 <= high for low, high in intervals)
    assert scipy.stats.binomtest(covered, 300, 0.95).pvalue > 1e-3
    narrower = [metrics.bootstrap_interval(normal(s, 60), n_draws=300, seed=s, level=0.5) for s in range(300)]
    assert scipy.stats.binomtest(sum(low <= 0 <= high for low, high in narrower), 300, 0.5).pvalue > 1e-3


def test_bootstrap_repeats_with_its_seed_and_varies_with_it():
    values = normal(1, 50)
    assert metrics.bootstrap_interval(values, seed=3) == metrics.bootstrap_interval(values, seed=3)
    assert metrics.bootstrap_interval(values, seed=3) != metrics.bootstrap_interval(values, seed=4)


def test_pairing_removes_the_variation_that_two_measurements_share():
    item = 10 * normal(2, 200)
    a, b = item + 1 + 0.1 * normal(3, 200), item + 0.1 * normal(4, 200)
    low, high = metrics.bootstrap_interval(a, paired_with=b)
    assert 0.9 < low < 1 < high < 1.1
    difference = metrics.bootstrap_interval(a - b)  # same seed, same draws
    assert (low, high) == pytest.approx(difference)


def test_clusters_widen_an_interval_whose_values_repeat_inside_a_cluster():
    effect = normal(5, 40)
    values, clusters = np.repeat(effect, 25), np.repeat(np.arange(40), 25)
    low, high = metrics.bootstrap_interval(values, clusters=clusters, n_draws=4000)
    expected = 2 * 1.96 * effect.std() / math.sqrt(40)  # 40 independent values, not 1000
    assert high - low == pytest.approx(expected, rel=0.08)
    plain = metrics.bootstrap_interval(values)
    assert high - low > 4 * (plain.high - plain.low)


def test_unequal_clusters_are_drawn_as_wholes():
    values = np.array([0.0] * 1 + [1.0] * 99)
    clusters = np.array(["small"] + ["large"] * 99)
    low, high = metrics.bootstrap_interval(values, clusters=clusters, n_draws=500)
    assert (low, high) == (0.0, 1.0)  # one draw in four holds the small cluster only, one in four the large
    assert metrics.bootstrap_interval(values, n_draws=500).low > 0.9


def test_two_stage_variance_is_the_sum_of_both_stages():
    rng = np.random.default_rng(6)
    values = rng.normal(size=(30, 1)) + 2 * rng.normal(size=(30, 20))
    clusters = np.repeat(np.arange(30), 20)
    low, high = metrics.bootstrap_interval(values.ravel(), clusters=clusters, n_draws=8000)
    variance = values.mean(1).var() / 30 + values.var(axis=1).mean() / 600
    assert (high - low) / 3.92 == pytest.approx(math.sqrt(variance), rel=0.04)


def test_rows_and_columns_are_resampled_independently():
    rng = np.random.default_rng(7)
    seeds, items = rng.normal(size=(20, 1)), 3 * rng.normal(size=(1, 50))
    low, high = metrics.bootstrap_interval(seeds + items, n_draws=8000)
    variance = seeds.var() / 20 + items.var() / 50
    assert (high - low) / 3.92 == pytest.approx(math.sqrt(variance), rel=0.04)


def test_statistics_with_and_without_an_axis_agree():
    values = normal(8, 101)
    vectorised = metrics.bootstrap_interval(values, np.median)
    assert metrics.bootstrap_interval(values, lambda x: float(np.sort(x)[50])) == pytest.approx(vectorised)


def test_a_tuple_is_resampled_together():
    rng = np.random.default_rng(9)
    labels = rng.integers(0, 2, 300)
    good, bad = labels + rng.normal(size=300), labels + 4 * rng.normal(size=300)
    low, high = metrics.bootstrap_interval((labels, good), metrics.auroc, n_draws=300)
    assert low < metrics.auroc(labels, good) < high
    low, _ = metrics.bootstrap_interval(
        (labels, good), metrics.auroc, n_draws=300, paired_with=(labels, bad), combine=metrics.relative_change
    )
    assert low > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [1.0]}, "at least 2"),
        ({"values": []}, "non-empty"),
        ({"values": [1.0, math.nan]}, "nan"),
        ({"values": ["a", "b"]}, "numbers"),
        ({"values": [1.0, 2.0], "level": 95}, "level must lie between 0 and 1, got 95"),
        ({"values": [1.0, 2.0], "n_draws": 0}, "n_draws must be a whole number of at least 1, got 0"),
        ({"values": [1.0, 2.0], "paired_with": [1.0]}, "one shape"),
        ({"values": [1.0, 2.0], "clusters": [1]}, "one label per value"),
        ({"values": np.zeros((2, 2)), "clusters": [1, 2]}, "seeds as rows"),
        ({"values": np.zeros((2, 2, 2))}, r"\[n\] or \[S, n\]"),
        ({"values": [0.0, 1.0], "statistic": lambda x: math.nan}, "nan in 2000 of the first 2000 draws"),
    ],
)
def test_bootstrap_refuses_what_it_cannot_resample(arguments, message):
    with pytest.raises(ValueError, match=message):
        metrics.bootstrap_interval(**arguments)


def test_an_estimate_draws_rows_as_wholes_and_then_their_items():
    values = normal(1, 3, 50) + 5 * np.arange(3)[:, None]
    found = metrics.estimate(np.mean, values, n_draws=400, seed=7)
    rows = np.repeat(np.arange(3), 50)
    assert found.value == pytest.approx(values.mean())
    assert found.interval == metrics.bootstrap_interval(values.ravel(), clusters=rows, n_draws=400, seed=7)


def test_an_estimate_of_the_same_items_draws_rows_and_items_apart():
    values = normal(1, 3, 50)
    found = metrics.estimate(np.mean, values, same_items=True, n_draws=400)
    assert found.interval == metrics.bootstrap_interval(values, n_draws=400)


def test_an_estimate_takes_labels_in_the_place_of_rows_and_several_arrays():
    a, b, labels = normal(1, 60), normal(2, 60), np.repeat([0, 1, 2], [10, 20, 30])

    def gap(x, y, axis=-1):
        return x.mean(axis) - y.mean(axis)

    found = metrics.estimate(gap, a, b, clusters=labels, n_draws=200)
    assert found == (gap(a, b), metrics.bootstrap_interval((a, b), gap, clusters=labels, n_draws=200))


def test_an_estimate_of_less_than_two_values_has_no_interval():
    one, none = metrics.estimate(np.mean, [0.25]), metrics.estimate(np.mean, [])
    assert one.value == 0.25
    assert math.isnan(none.value)
    assert all(math.isnan(end) for found in (one, none) for end in found.interval)


@pytest.mark.parametrize("arrays", [(np.ones(3), np.ones(4)), (np.ones((2, 2, 2)),), ()])
def test_an_estimate_refuses_arrays_that_do_not_fit(arrays):
    with pytest.raises(ValueError, match=r"arrays must have one shape, \[n\] or \[S, n\]; got"):
        metrics.estimate(np.mean, *arrays)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (7, 10), (10, 10), (311, 1000)])
def test_wilson_interval_solves_the_score_equation(successes, n):
    z, share = 1.959963984540054, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert metrics.wilson_interval(successes, n) == pytest.approx((centre - half, centre + half), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5), (0.5, 5)])
def test_wilson_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="must be a whole number"):
        metrics.wilson_interval(successes, n)


def test_permutation_test_enumerates_small_samples():
    # of the 20 ways to choose 3 of 6, this one is the largest difference, its mirror image the smallest
    result = metrics.permutation_test([4, 5, 6], [1, 2, 3])
    assert result == pytest.approx((3.0, 2 / 20))
    # of the 2^8 ways to swap within pairs, only the one that swaps none has so large a difference
    a = np.arange(8) + 0.5
    assert metrics.permutation_test(a + 1, a, paired=True, alternative="greater").p_value == pytest.approx(
        1 / 256
    )


def test_permutation_test_is_calibrated_and_has_power():
    p_values = [metrics.permutation_test(*normal(s, 2, 30), n_draws=199, seed=s).p_value for s in range(200)]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert metrics.permutation_test(normal(0, 30) + 2, normal(1, 30)).p_value < 1e-3


def test_permutation_test_refuses_unequal_pairs():
    with pytest.raises(ValueError, match="got 2 in a and 1 in b"):
        metrics.permutation_test([1, 2], [1], paired=True)


def test_relative_change_is_in_percent_of_the_base():
    assert metrics.relative_change(3, 4) == -25
    assert metrics.relative_change(-3, -4) == 25  # towards zero is up
    assert metrics.relative_change([2, 4], [1, 8]).tolist() == [100, -50]
    with pytest.raises(ValueError, match="base must not be 0"):
        metrics.relative_change([1, 2], [1, 0])


# --- detection --------------------------------------------------------------------------------------------


def test_auroc_counts_pairs_and_halves_of_ties():
    rng = np.random.default_rng(10)
    labels, scores = rng.integers(0, 2, 80), rng.integers(0, 9, 80)
    up, down = scores[labels == 1][:, None], scores[labels == 0]
    assert metrics.auroc(labels, scores) == pytest.approx(((up > down) + 0.5 * (up == down)).mean())


def test_tpr_at_fpr_is_attained_by_a_threshold():
    labels = np.array([0] * 10 + [1] * 5)
    scores = np.array([*range(10), 3.5, 8.5, 8.5, 9, 20])
    assert metrics.tpr_at_fpr(labels, scores, 0.0) == pytest.approx(
        1 / 5
    )  # only 20 lies above every negative
    assert metrics.tpr_at_fpr(labels, scores, 0.05) == pytest.approx(1 / 5)  # one negative is already 0.1
    assert metrics.tpr_at_fpr(labels, scores, 0.1) == pytest.approx(4 / 5)
    assert metrics.tpr_at_fpr(labels, scores, 1.0) == 1


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 1], [0, 1], "both classes"),
        ([0, 2], [0, 1], "labels must be 0 or 1"),
        ([0, 1], [0, math.nan], "scores must not hold nan"),
        ([0, 1], [0, 1, 2], "equally long"),
    ],
)
def test_detection_refuses_what_has_no_curve(labels, scores, message):
    for metric in (metrics.auroc, metrics.tpr_at_fpr):
        with pytest.raises(ValueError, match=message):
            metric(labels, scores)


# --- agreement --------------------------------------------------------------------------------------------


def test_kl_equals_scipys_relative_entropy():
    p, q = torch.tensor(normal(11, 4, 50)), torch.tensor(normal(12, 4, 50))
    expected = scipy.stats.entropy(p.softmax(-1).numpy(), q.softmax(-1).numpy(), axis=-1)
    np.testing.assert_allclose(metrics.kl_from_logits(p, q), expected, rtol=1e-12)


def test_kl_is_exact_zero_for_equal_logits_and_infinite_without_support():
    p = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 0.0, 0.0]])
    assert (metrics.kl_from_logits(p, p + 7) <= 1e-15).all()
    q = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]])
    assert metrics.kl_from_logits(p, q).tolist() == [math.inf, 0.0]
    with pytest.raises(ValueError, match="must not hold nan"):
        metrics.kl_from_logits(torch.full((1, 3), -math.inf), p[:1])


def test_kl_of_nearly_equal_models_keeps_its_digits():
    p = torch.tensor(normal(13, 1000))
    step = torch.tensor(1e-6 * normal(14, 1000))
    q = p + step
    weight = p.softmax(-1)
    second_order = 0.5 * ((weight * step**2).sum() - (weight * step).sum() ** 2)  # about 5e-13 nats
    assert metrics.kl_from_logits(p, q).item() == pytest.approx(second_order.item(), rel=2e-3)


def test_top1_agreement_breaks_ties_to_the_lowest_index():
    p = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    q = torch.tensor([[5.0, 1.0, 5.0], [2.0, 0.0, 1.0]])
    assert metrics.top1_agreement(p, q).tolist() == [True, False]
    with pytest.raises(ValueError, match="nan"):
        metrics.top1_agreement(p * math.nan, q)


def test_key_cosine_averages_over_heads_and_positions():
    a = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    b = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    assert metrics.key_cosine(a, b) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    with pytest.raises(ValueError, match="length zero"):
        metrics.key_cosine(a * 0, b)
    with pytest.raises(ValueError, match="one shape"):
        metrics.key_cosine(a, b[:, :1])


def test_rms_error_is_relative_to_the_reference():
    wanted = torch.tensor([3.0, -4.0])
    assert metrics.rms_error(wanted + torch.tensor([0.3, 0.4]), wanted) == pytest.approx(0.1)
    assert metrics.rms_error(wanted, wanted) == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a number read from a tensor with a graph warns
        assert metrics.rms_error(wanted.clone().requires_grad_(), wanted) == 0.0
    with pytest.raises(ValueError, match=r"one shape.*\[2\] and \[1\]"):
        metrics.rms_error(wanted, wanted[:1])
    with pytest.raises(ValueError, match="zeros"):
        metrics.rms_error(wanted, torch.zeros(2))


def test_exact_match_ignores_white_space_only():
    assert metrics.exact_match("  return  x\n", "return x")
    assert not metrics.exact_match("returnx", "return x")


def test_edit_similarity_is_the_indel_ratio():
    assert metrics.edit_similarity("", "") == 100
    assert metrics.edit_similarity("abc", "") == 0
    assert metrics.edit_similarity("abcd", "abxd") == 75  # a substitution costs two of eight
    assert metrics.edit_similarity("kitten", "sitting") == 62  # common subsequence ittn: 8 of 13


def indel_similarity_by_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return round(200 * table[-1][-1] / (len(a) + len(b)))


@pytest.mark.parametrize("seed", range(20))
def test_edit_similarity_equals_the_dynamic_programme(seed):
    rng = np.random.default_rng(seed)
    a, b = ("".join(rng.choice(list("abcde "), size=rng.integers(1, 150))) for _ in range(2))
    assert metrics.edit_similarity(a, b) == metrics.edit_similarity(b, a) == indel_similarity_by_table(a, b)


def test_string_metrics_refuse_lists():
    for metric in (metrics.exact_match, metrics.edit_similarity):
        with pytest.raises(ValueError, match="must be strings, got list and str"):
            metric(["a"], "a")


# --- distributions ----------------------------------------------------------------------------------------


def test_frechet_distance_equals_the_matrix_square_root():
    a, b = normal(15, 200, 6) @ normal(16, 6, 6), 1 + normal(17, 150, 6) @ normal(18, 6, 6)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected += np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_known_normals():
    zero, one = np.zeros(2), np.eye(2)
    assert metrics.frechet_distance_of_moments(zero, one, zero + 3, 4 * one) == pytest.approx(18 + 2)
    assert metrics.frechet_distance_of_moments(zero, 0 * one, zero, one) == pytest.approx(2)


def test_frechet_distance_with_fewer_rows_than_dimensions():
    a = normal(19, 5, 64)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(a, a + 1) == pytest.approx(64, rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 rows"):
        metrics.frechet_distance(a[:1], a)
    with pytest.raises(ValueError, match="finite"):
        metrics.frechet_distance(a * math.inf, a)


# --- cost -------------------------------------------------------------------------------------------------


def test_flops_of_products_and_attention_on_the_cpu():
    x, weight, vector = torch.randn(2, 5, 16), torch.randn(32, 16), torch.randn(16)
    assert metrics.count_flops(F.linear, x, weight) == 2 * 2 * 5 * 16 * 32
    assert metrics.count_flops(torch.mv, weight, vector) == 2 * 32 * 16
    assert metrics.count_flops(torch.dot, vector, vector) == 2 * 16
    assert metrics.count_flops(torch.exp, x) == 0
    query, key = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 9, 8)
    forward = 2 * 4 * 7 * 9 * 8 * 2
    mask = torch.ones(7, 9, dtype=torch.bool)
    for attention_mask in (None, mask):
        attend = lambda: F.scaled_dot_product_attention(query, key, key, attention_mask, enable_gqa=True)  # noqa
        for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with context():
                assert metrics.count_flops(attend) == forward


@pytest.mark.parametrize(("width", "n_states"), [(32, 4), (48, 16)], ids=["plain loop", "bmm"])
def test_flops_of_a_scan_are_its_sums_over_states_however_they_are_computed(width, n_states):
    u, step = (torch.rand(2, width, 9, requires_grad=True) for _ in range(2))
    B, C = (torch.rand(2, n_states, 9, requires_grad=True) for _ in range(2))
    A = -torch.rand(width, n_states)
    product = 2 * 2 * 9 * width * n_states
    assert metrics.count_flops(selective_scan, u, step, A, B, C) == product
    backward = 3 * product  # the gradients of u, B and C are such sums; that of the decay is element-wise
    assert (
        metrics.count_flops(lambda: selective_scan(u, step, A, B, C).sum().backward()) == product + backward
    )


def test_flops_do_not_depend_on_the_attention_backend():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 4, 9, 8)
    flash = metrics.count_flops(F.scaled_dot_product_attention, q, k, k)
    with sdpa_kernel(SDPBackend.MATH):
        assert metrics.count_flops(F.scaled_dot_product_attention, q, k, k) == flash == 2 * 4 * 7 * 9 * 16


def test_flops_of_a_backward_pass():
    x, weight = torch.randn(5, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    assert metrics.count_flops(lambda: F.linear(x, weight).sum().backward()) == 3 * 2 * 5 * 16 * 32
    q = torch.randn(1, 4, 7, 8, requires_grad=True)
    count = metrics.count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    product = 2 * 4 * 7 * 7 * 8
    assert count == (2 + 5) * product  # two products forward; backward five, the scores being recomputed


def test_flops_of_a_whole_model_are_twice_its_weights_a_token():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (1, 11))
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    with torch.no_grad():
        flops = metrics.count_flops(model, ids)
    assert flops == 2 * 11 * weights + 2 * 2 * 11 * 11 * 32 * 2


def test_timing_leaves_warm_up_out_and_orders_its_quartiles():
    calls = []
    timing = metrics.time_call(lambda: calls.append(0), repeats=9, warmup=4)
    assert len(calls) == 13
    assert len(timing.seconds) == 9
    assert 0 < min(timing.seconds) <= timing.low <= timing.median <= timing.high <= max(timing.seconds)
    assert timing.median == sorted(timing.seconds)[4]
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        metrics.time_call(lambda: None, repeats=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and torch sees none")
def test_timing_waits_for_the_device():
    x = torch.randn(8192, 8192, device="cuda")
    timing = metrics.time_call(lambda: x @ x, repeats=5, device="cuda")
    assert (
        timing.median > 2 * 8192**3 / 2e15
    )  # no device does 2 PFLOP/s in float32; a launch alone takes 10 us
