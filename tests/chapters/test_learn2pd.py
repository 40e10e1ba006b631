"""The chapter `learn2pd`: refusals, decoding done again in plain loops, verdicts, the paper-scale path."""

import copy
import json
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    EuroBertConfig,
    EuroBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import MaskedLMOutput

from tests.chapters.invented import verdicts_in
from tokenbook.hub import HubError
from tokenbook.parameters import ParameterError

CHAPTER = "learn2pd"
MASK, EOT, P, B = 1, 2, 7, 16
SIZES = {"scale": "smoke", "gen_length": 32, "block_length": B, "lengths": [16, 32]}


@pytest.fixture(scope="module")
def method(run_cells):
    """The chapter's definitions, nothing trained."""
    return run_cells(CHAPTER, before="train-text", **SIZES)


@pytest.fixture(scope="module")
def probe(method):
    """A model with random weights wide enough that its predictions differ, and four prompts."""
    method["IDS"] = method["Ids"](MASK, EOT)
    return method["new_model"](3), method["world"].prompts(method["world"].heldout[:4])


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gen_length": 40}, "gen_length must be a multiple of block_length = 16; got 40"),
        ({"lengths": [16, 40]}, "lengths must be a multiple of block_length = 16; got 40"),
        ({"lengths": [32, 16]}, r"lengths must grow from one to the next; got \[32, 16\]"),
        ({"steps": 64}, "steps must be at most gen_length = 32 and a multiple of its 2 blocks; got 64"),
        ({"steps": 15}, "steps must be at most gen_length = 32 and a multiple of its 2 blocks; got 15"),
        ({"tau": 1.0}, "tau must lie between 0 and 1, both excluded; got 1.0"),
        ({"taus": [0.5, 0.0]}, "taus must lie between 0 and 1, both excluded; got 0.0"),
        ({"cfg": 1.0, "cache": "dual"}, r"cache must be none with guidance \(cfg = 1.0\); got 'dual'"),
        ({"eot_mode": "never"}, "eot_mode must be one of code, first_committed; got 'never'"),
        ({"model": "owner/name"}, "dataset must be chain without model, .* got 'chain'"),
        ({"dataset": "gsm8k.jsonl"}, "dataset must be chain without model, .* got 'gsm8k.jsonl'"),
        ({"train_steps": 0}, "train_steps must be at least 1 where the model is trained here; got 0"),
    ],
)
def test_bad_parameters_are_refused_in_one_sentence(run_cells, given, message):
    with pytest.raises(ParameterError, match=message):
        run_cells(CHAPTER, before="imports", **{**SIZES, **given})


@pytest.mark.parametrize(
    ("mask", "eot", "pad", "message"),
    [
        (None, EOT, 0, r"mask_id must lie in the vocabulary, 0\.\.41; got None"),
        (126336, EOT, 0, r"mask_id must lie in the vocabulary, 0\.\.41; got 126336"),
        (MASK, MASK, 0, r"mask_id must differ from padding \(0\) and eot_id \(1\); got 1"),
        (0, EOT, 0, r"mask_id must differ from padding \(0\) and eot_id \(2\); got 0"),
        (MASK, None, 0, "eot_id must be given: the tokenizer has no end-of-text token; got None"),
    ],
)
def test_special_tokens_that_do_not_fit_are_refused(method, probe, mask, eot, pad, message):
    with pytest.raises(ParameterError, match=message):
        method["check_model"](probe[0], method["Ids"](mask, eot), pad)


def test_a_causal_model_and_an_overlong_prompt_are_refused(method, probe):
    ids = method["Ids"](MASK, EOT)
    config = Qwen2Config(
        vocab_size=42, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(ParameterError, match="model must attend in both directions; got one whose first"):
        method["check_model"](Qwen2ForCausalLM(config).eval(), ids)
    method["check_model"](probe[0], ids, 0)  # the same check lets a bidirectional one pass
    with pytest.raises(ParameterError, match="must fit the model's 512 positions; got 532"):
        method["check_lengths"](probe[0], [torch.zeros(500)])


def test_a_filter_for_another_block_and_bad_prompts_are_refused(method, probe):
    model, prompts = probe
    decode, narrow = method["decode"], method["Filter"](8)
    with pytest.raises(ValueError, match="trained for block_length = 16; got one for 8"):
        decode(model, prompts, method["learned"](narrow, 0.9))
    with pytest.raises(ValueError, match="at most the filter's width, 8; got 9"):
        narrow(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="prompts must not hold the mask id; got 1"):
        decode(model, torch.full((1, 5), MASK))
    with pytest.raises(ValueError, match="eot_id must be given for EoTP"):
        method["Decoder"](model, prompts, 16, 16, method["Ids"](MASK, None), eot="code")


# Decoding, done again in plain loops -----------------------------------------------------------------------


def probabilities(model, x):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([x])).logits[0]
        logits[:, MASK] = -torch.inf
        return logits.softmax(-1)


def in_loops(model, prompt, G, S, accepts, eot, end):
    """One prompt, after the published algorithm: answer, passes and token-forwards."""
    x, passes, fed = prompt.tolist() + [MASK] * G, 0, 0
    for lo in range(P, P + G, B):
        n, s = sum(t == MASK for t in x[lo : lo + B]), S * B // G
        ks = [n // s + (i < n % s) for i in range(s)]
        while MASK in x[lo : lo + B]:
            p = probabilities(model, x)
            passes, fed, k = passes + 1, fed + len(x), ks.pop(0)
            conf, tok = (v.tolist() for v in p.max(-1))
            masks = [i for i, t in enumerate(x) if t == MASK]
            here = [i for i in masks if lo <= i < lo + B]
            verdict = accepts((conf[lo : lo + B] + [0.0] * B)[:B])
            A = [i for i in here if verdict[i - lo]]
            top = sorted(here, key=lambda i: (-conf[i], i))[:k]
            for i in {*A, *top}:
                x[i] = tok[i]
            if eot == "code":
                e1, e2 = [i for i in A if tok[i] == end], [i for i in masks if tok[i] == end]
                if e1 or e2:
                    x = x[: (min(e1) if e1 else max(e2, key=lambda i: (conf[i], -i))) + 1]
            elif eot == "first_committed" and (e := [i for i in {*A, *top} if tok[i] == end]):
                x = x[: min(e) + 1]
    return x[P:] + [end] * (P + G - len(x)), passes, fed


@pytest.mark.parametrize("eot", ["off", "code", "first_committed"])
@pytest.mark.parametrize(("rule", "S"), [("nothing", 32), ("nothing", 8), ("filter", 32), ("filter", 6)])
def test_decoding_is_the_published_algorithm_in_loops(method, probe, monkeypatch, rule, S, eot):
    model, prompts = probe
    end = 6  # a token that this model does predict, so that there is something to cut
    monkeypatch.setitem(method, "IDS", method["Ids"](MASK, end))
    torch.manual_seed(5)
    filter_ = method["Filter"](B)
    chosen, accepts = method["nothing"], lambda conf: [False] * B
    if rule == "filter":
        chosen = method["learned"](filter_, 0.52)

        def accepts(conf):
            return (filter_(torch.tensor([conf])).sigmoid() > 0.52)[0].tolist()

    got = method["decode"](model, prompts, chosen, 32, S, eot=eot)
    assert eot == "off" or S < 32 or got.cut.any()
    for i, prompt in enumerate(prompts):
        answer, passes, fed = in_loops(model, prompt, 32, S, accepts, eot, end)
        assert (got.answers[i].tolist(), int(got.passes[i]), int(got.fed[i])) == (answer, passes, fed)


def test_the_oracle_and_its_records_are_the_published_loop(method, probe):
    model, prompts = probe
    plain = method["decode"](model, prompts, G=32)
    got = method["decode"](model, prompts, G=32, target=plain.answers)
    which, conf, right = got.records
    for i, prompt in enumerate(prompts):
        x, y, wanted, n_steps = prompt.tolist() + [MASK] * 32, plain.answers[i].tolist(), [], 0
        for lo in (P, P + B):
            before, goal = None, y[lo - P : lo - P + B]
            while MASK in x[lo : lo + B]:
                c, tok = (v.tolist() for v in probabilities(model, x)[lo : lo + B].max(-1))
                same = [a == b for a, b in zip(tok, goal, strict=True)]
                wanted.append((c, same))
                if tok == before:
                    x[lo : lo + B] = goal
                    continue
                before, n_steps = tok, n_steps + 1
                for j in range(B):
                    if same[j]:
                        x[lo + j] = goal[j]
        assert int(got.steps[i].sum()) == n_steps
        mine = which == i
        assert right[mine].tolist() == [s for _, s in wanted]
        torch.testing.assert_close(conf[mine], torch.tensor([c for c, _ in wanted]), rtol=1e-4, atol=1e-5)
        assert got.answers[i].tolist() == y


@pytest.mark.parametrize(
    ("mode", "accepted", "kept", "end"),
    [
        ("code", [9, 4], [9, 4], 5),  # the first accepted end
        ("code", [9], [9, 4], 10),  # 4 was kept as the top k, not accepted
        ("code", [], [9], 21),  # none accepted: the surest masked one, in a later block, kept or not
        ("first_committed", [9], [9, 4], 5),
        ("first_committed", [], [9], 10),
        ("first_committed", [3], [3], 32),  # no end-of-text among what was kept: no cut
    ],
)
def test_where_eotp_cuts(method, mode, accepted, kept, end):
    prompt = torch.full((1, P), 3)
    decoder = method["Decoder"](None, prompt, 32, 32, method["Ids"](MASK, EOT), eot=mode)
    token, confidence = torch.full((1, 32), 5), torch.full((1, 32), 0.5)
    for place, c in ((4, 0.6), (9, 0.7), (20, 0.9), (25, 0.95)):
        token[0, place], confidence[0, place] = EOT, c
    still = torch.ones(1, 32, dtype=torch.bool)
    still[0, 25] = False  # surest of all, but no mask
    places = torch.arange(B)
    accept, keep = (torch.isin(places, torch.tensor(x, dtype=torch.long))[None] for x in (accepted, kept))
    decoder.shorten(torch.tensor([0]), P, token, confidence, still, accept, keep)
    assert int(decoder.end[0]) - P == end
    assert (decoder.x[0, P + end :] == EOT).all()
    assert (decoder.x[0, P : P + end] == MASK).all()


def test_guidance_and_temperature(method, probe, monkeypatch):
    model, prompts = probe
    values = method["P"].as_dict() | {"cfg": 1.5}
    monkeypatch.setitem(method, "P", type(method["P"])(values, None))
    got = method["decode"](model, prompts[:1], G=16)
    assert int(got.passes[0]) == 32  # two passes a step
    x = prompts[0].tolist() + [MASK] * 16
    with torch.no_grad():
        while MASK in x:
            cond, bare = (model(input_ids=torch.tensor([v])).logits[0] for v in (x, [MASK] * P + x[P:]))
            logits = bare + 2.5 * (cond - bare)
            logits[:, MASK] = -torch.inf
            conf, tok = logits.softmax(-1).max(-1)
            at = max((i for i, t in enumerate(x) if t == MASK), key=lambda i: float(conf[i]))
            x[at] = int(tok[at])
    assert got.answers[0].tolist() == x[P:]
    logits = torch.randn(2, 3, 9)
    token, conf, _ = method["choose"](logits, 2.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(conf, logits.softmax(-1).gather(-1, token[..., None])[..., 0])
    u = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(token, (logits.double().exp() / (-u.log()) ** 2.0).argmax(-1))


def test_prompts_of_different_lengths_keep_their_order(method, probe):
    model, prompts = probe
    mixed = [prompts[0], prompts[1][:5], prompts[2], prompts[3][:5]]
    got = method["decode"](model, mixed, G=16, target=torch.full((4, 16), 9))
    for i, prompt in enumerate(mixed):
        one = method["decode"](model, [prompt], G=16, target=torch.full((1, 16), 9))
        assert got.passes[i] == one.passes[0]
        torch.testing.assert_close(got.records[1][got.records[0] == i], one.records[1], rtol=1e-4, atol=1e-5)


def test_the_caches_hold_what_they_should(method, probe):
    """Prefix and dual: a later pass, with nothing changed yet, gives what the whole pass gave."""
    model, prompts = probe
    cache = method["BlockCache"]()
    x = torch.cat((prompts, torch.full((4, 16), MASK)), 1)
    with torch.no_grad():
        whole = model(input_ids=x, past_key_values=cache, position_ids=torch.arange(23)[None]).logits
        for lo, stop in ((7, 23), (7, 15)):
            cache.part = (torch.tensor([1, 3]), lo, stop, 23)
            places = torch.arange(lo, stop)[None]
            part = model(input_ids=x[[1, 3], lo:stop], past_key_values=cache, position_ids=places).logits
            torch.testing.assert_close(
                part, whole[[1, 3], lo:stop], rtol=1e-4, atol=1e-4
            )  # nothing changed yet


def test_redundant_steps_are_counted_from_the_first_right_prediction(method, probe):
    model, prompts = probe
    got = method["decode"](model, prompts[:1], G=16)
    x, predictions, kept = prompts[0].tolist() + [MASK] * 16, [], {}
    while MASK in x:
        conf, tok = (v.tolist() for v in probabilities(model, x).max(-1))
        predictions.append(tok)
        at = max((i for i, t in enumerate(x) if t == MASK), key=lambda i: (conf[i], -i))
        x[at], kept[at] = tok[at], len(predictions) - 1
    for at, step in kept.items():
        first = min(n for n in range(step + 1) if predictions[n][at] == x[at])
        assert int(got.redundant[0, at - P]) == step - first
        assert int(got.kept_at[0, at - P]) == step + 1


# Data, loss, filters ---------------------------------------------------------------------------------------


def test_the_loss_is_its_definition(method):
    draw = torch.Generator().manual_seed(0)
    y, t = torch.randint(3, 40, (5, 8), generator=draw), torch.rand(5, generator=draw) * 0.9 + 0.1
    x, hidden = method["masked"](y, t, draw)
    logits = torch.randn(5, 8, 42, generator=draw)
    total = 0.0
    for r in range(5):
        for i in range(8):
            if x[r, i] == MASK:
                total -= float(logits[r, i].log_softmax(-1)[y[r, i]]) / (float(t[r]) * 8)
            else:
                assert x[r, i] == y[r, i]
    assert method["diffusion_loss"](logits, y, hidden, t).item() == pytest.approx(total / 5, rel=1e-5)
    many = method["masked"](torch.full((2, 20_000), 5), torch.tensor([0.2, 0.7]), draw)[1].double().mean(1)
    assert many.tolist() == pytest.approx([0.2, 0.7], abs=0.02)


def test_answers_follow_their_places(method):
    world, facts = method["world"], method["world"].heldout[:30]
    outcomes = np.array([(1, 0)] * 30)
    for fact, answer in zip(facts, world.answers(facts, outcomes, 32).tolist(), strict=True):
        task, start, *notes = fact.tolist()
        link, places = start, world.places[task]
        for token, (kind, value) in zip(answer, places, strict=False):
            if kind == "link":
                link = int(world.powers[1][link])
                assert token == 22 + link
            elif kind.startswith("choice"):
                role, word = value
                wanted = {"choice0": (2 * word + 1, 3 * word + 1), "choice1": (2 * word, 3 * word)}[kind]
                assert token == 10 + wanted[role == 1]
            else:
                assert token == {"word": 10 + value, "note": 34 + notes[value % 3]}[kind]
        assert set(answer[len(places) :]) == {EOT}
        for kind in ("choice0", "choice1"):
            roles = [value[0] for k, value in places if k == kind]
            assert roles == [0, 1, 2] or (kind == "choice1" and len(places) < 10 and not roles)
    assert EOT not in method["Chains"](0, ends=False).answers(facts, outcomes, 48)


def test_what_counts_as_solved(method, monkeypatch):
    """Any outcome is right; what stands behind the first end-of-text does not count; mixtures are wrong."""
    world, facts = method["world"], method["world"].heldout[:40]
    found = {}
    for outcomes in ((0, 0), (2, 1), (1, 1)):
        found[outcomes] = torch.from_numpy(world.answers(facts, np.tile(outcomes, (40, 1)), 32))
        right = found[outcomes].clone()
        right[:, -1] = 12  # garbage behind the end
        assert world.solved(facts, right).all()
        right[:, 0] = 12  # a word in the place of a link
        assert not world.solved(facts, right).any()
    mixed, middle = found[1, 1].clone(), found[0, 0]
    for row, (task, *_) in enumerate(facts):  # what keeping every likeliest word at once would give
        for t, (kind, value) in enumerate(world.places[task]):
            if kind.startswith("choice") and value[0] == 1:
                mixed[row, t] = middle[row, t]
    assert not world.solved(facts, mixed).any()
    values = method["P"].as_dict() | {"n_filter_prompts": 4600, "n_test": 9}
    monkeypatch.setitem(method, "P", type(method["P"])(values, None))
    with pytest.raises(ParameterError, match="must share 4608 held-out prompts; got 4600 and 9"):
        world.items()


def test_filters_trained_side_by_side_are_those_trained_alone(ideal, monkeypatch):
    method, rates = ideal, (0.003, 0.01)
    values = method["P"].as_dict() | {"filter_updates": 25}
    monkeypatch.setitem(method, "P", type(method["P"])(values, None))
    draw = torch.Generator().manual_seed(1)
    conf = torch.rand(40, B, generator=draw)
    labels = (torch.rand(2, 40, B, generator=draw) < conf).float()
    weights = (torch.rand(2, 40, generator=draw) < 0.8).float()
    pair = [method["Filter"](B) for _ in rates]
    alone = copy.deepcopy(pair)
    method["fit_filters"](pair, rates, conf, labels, weights)
    for m, (found, net) in enumerate(zip(pair, alone, strict=True)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=rates[m])
        used = weights[m].bool()
        for _ in range(25):
            loss = nn.functional.binary_cross_entropy_with_logits(net(conf[used]), labels[m][used])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(found(conf), net(conf), rtol=1e-3, atol=1e-4)
    own = method["Filter"](B, 1)
    method["fit_filters"]([own], [0.003], conf, labels[:1], weights[:1], diagonal=True)
    changed = conf.clone()
    changed[:, 3] = 0.123
    assert ((own(changed) - own(conf)).abs().sum(0) > 0).nonzero().flatten().tolist() == [3]


def test_variants_with_fewer_records_are_padded_without_weight(ideal):
    few, many = torch.rand(3, B), torch.rand(5, B)
    data = {
        "a": (few, few > 0.5, torch.ones(3, dtype=torch.bool)),
        "b": (many, many > 0.5, torch.ones(5, dtype=torch.bool)),
    }
    conf, labels, weights = ideal["together"](["a", "b"], data)
    assert weights.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert torch.equal(conf[0, :3], few)
    assert torch.equal(labels[1], (many > 0.5).float())


def test_records_are_split_by_prompt_into_three_parts(ideal):
    lesson, n = ideal["lessons"][0], ideal["P"].n_filter_prompts
    which = torch.randint(n, (300,), generator=torch.Generator().manual_seed(2))
    part = ideal["parts_of"](which, torch.Generator().manual_seed(0))[1]
    assert not any(set(which[part == k].tolist()) & set(which[part != k].tolist()) for k in range(3))
    prompts = [set(lesson.oracle.records[0][lesson.part == k].tolist()) for k in range(3)]
    assert [len(p) for p in prompts] == [round(0.8 * n), round(0.1 * n), round(0.1 * n)]
    assert len(set.union(*prompts)) == n


def test_every_depth_keeps_the_rate_with_the_lowest_validation_loss(ideal, monkeypatch):
    values = ideal["P"].as_dict() | {"filter_updates": 150, "filter_lr": [1e-6, 0.01, 0.9]}
    monkeypatch.setitem(ideal, "P", type(ideal["P"])(values, None))
    monkeypatch.setitem(ideal, "UNTAUGHT", [ideal["untaught"](0)])
    lesson = ideal["teach"](0)
    assert {rate for _, rate in lesson.validation} == {1e-6, 0.01, 0.9}
    conf, right = (x[lesson.part == 1] for x in lesson.oracle.records[1:])
    for depth in (1, 2, 4):
        z = lesson.filters["filter", depth](conf)
        loss = nn.functional.binary_cross_entropy_with_logits(z, right.float()).item()
        assert loss == pytest.approx(min(v for (d, _), v in lesson.validation.items() if d == depth))


def test_what_is_told_of_dropped_positions(ideal):
    torch.manual_seed(0)
    net, conf = ideal["Filter"](B), torch.rand(2, B)
    conf[:, 10:] = 0
    view = ideal["View"](conf, None, None, None)
    ones = conf.clone()
    ones[:, 10:] = 1
    assert torch.equal(ideal["learned"](net, 0.5, 1.0)(view), net(ones).sigmoid() > 0.5)
    assert torch.equal(ideal["learned"](net, 0.5)(view), net(conf).sigmoid() > 0.5)


def test_faults_are_named(method):
    world, facts = method["world"], method["world"].heldout[:40]
    right = torch.from_numpy(world.answers(facts, np.tile((2, 1), (40, 1)), 32))
    assert set(world.faults(facts, right)) == {"none"}
    short, wrong, mixed = right.clone(), right.clone(), right.clone()
    for row, (task, *_) in enumerate(facts):
        places = [kind for kind, _ in world.places[task]]
        short[row, len(places) - 1] = EOT
        wrong[row, places.index("link")] = 12
        mixed[row, places.index("choice0") + 0] = 10 + ((int(mixed[row, places.index("choice0")]) - 10) ^ 1)
    assert set(world.faults(facts, short)) == {"end"}
    assert set(world.faults(facts, wrong)) == {"other token"}
    assert set(world.faults(facts, mixed)) == {"mixed choice"}


def test_waste_is_the_share_of_positions_behind_the_end(ideal):
    done = ideal["by_length"][32, "one at a time"][0].answers.tolist()
    wanted = [100 * (31 - row.index(EOT)) / (P + 32) for row in done]
    assert ideal["waste"](32)[0].tolist() == pytest.approx(wanted)


def test_a_filter_of_half_the_tasks_is_counted_on_the_other_half(ideal, monkeypatch):
    learned_from = {}

    def noted(filters, rates, confidence, labels, weights, diagonal=False):
        learned_from[len(filters[0]), len(filters)] = weights

    monkeypatch.setitem(ideal, "fit_filters", noted)
    monkeypatch.setitem(ideal, "UNTAUGHT", [ideal["untaught"](0)])
    lesson = ideal["teach"](0)
    half = learned_from[3, 3][ideal["variants"](2).index("half")]
    used = lesson.oracle.records[0][half[: len(lesson.part)].bool()]
    kinds = {int(ideal["FILTER_ITEMS"][0][i][0]) for i in used.tolist()}
    tested = set(ideal["TEST_ITEMS"][0][ideal["OTHER"][0], 0].tolist())
    assert kinds | tested == set(range(6))
    assert not kinds & tested


def test_thresholds_are_tuned_on_the_filters_training_prompts(ideal, monkeypatch):
    seen, decode = [], ideal["decode"]

    def noted(model, prompts, *rest, **options):
        seen.extend(prompts)
        return decode(model, prompts, *rest, **options)

    monkeypatch.setitem(ideal, "decode", noted)
    assert ideal["tune"](0) == ideal["tuned"][0]
    lesson, prompts = ideal["lessons"][0], ideal["FILTER_PROMPTS"][0]
    trained = {tuple(prompts[i].tolist()) for i in lesson.oracle.records[0][lesson.part == 0].tolist()}
    assert {tuple(p.tolist()) for p in seen} <= trained


# Verdicts: the whole experiment on a predictor that is right by construction --------------------------------


class Ideal(nn.Module):
    """A masked-diffusion model that knows the task: what is decided is nearly certain, a choice has its odds.

    Its keys are its tokens, so caches work, and are exact.
    """

    def __init__(self, world):
        super().__init__()
        self.world, self.config = world, EuroBertConfig(max_position_embeddings=512)
        self.embedding = nn.Embedding(42, 1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, position_ids=None, past_key_values=None, **_):
        tokens, places = input_ids, torch.arange(input_ids.shape[1])
        if past_key_values is not None:
            keys = input_ids[:, None, :, None].double()
            tokens, places = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].long(), position_ids[0]
        logits = (self.belief(tokens) + 1e-13).log()
        logits = torch.cat((torch.zeros(len(logits), P, 42), logits), 1)
        return MaskedLMOutput(logits=logits[:, places])

    @staticmethod
    def facts(tokens):
        bounds = ((0, 4, 6), (6, 22, 12), (1, 34, 8), (2, 34, 8), (3, 34, 8))
        return np.stack([(tokens[:, i].numpy() - low).clip(0, n - 1) for i, low, n in bounds], 1)

    def belief(self, tokens):
        """Probability of every token at every place of the answer: [R, G, V]."""
        facts, G, R = self.facts(tokens), tokens.shape[1] - P, len(tokens)
        versions = [torch.from_numpy(self.world.answers(facts, np.full((R, 2), o), G)) for o in range(3)]
        versions, now = torch.stack(versions, -1), tokens[:, P:]  # (R, G, 3)
        p = torch.zeros(R, G, 42).scatter_(-1, versions[..., :1], 0.9995)
        for task, places in enumerate(self.world.places):
            rows = torch.from_numpy(np.flatnonzero(facts[:, 0] == task))
            for name in ("choice0", "choice1"):
                at = torch.tensor([t for t, (kind, _) in enumerate(places) if kind == name and t < G])
                if not len(at) or not len(rows):
                    continue
                words, seen = versions[rows][:, at], now[rows][:, at]  # (r, places, 3), (r, places)
                fits = ((seen == MASK)[..., None] | (words == seen[..., None])).all(1)  # (r, 3)
                belief = torch.tensor([0.40, 0.37, 0.23]) * fits + 1e-9
                belief = (belief / belief.sum(1, keepdim=True))[:, None]
                at_choice = torch.zeros(len(rows), len(at), 42)
                at_choice.scatter_add_(-1, words, belief.expand(-1, len(at), -1))
                p[rows[:, None], at] = at_choice
        return p


def verdicts(space):
    return {row["claim"]: row["verdict"] for row in space["ledger"].rows()}


@pytest.fixture(scope="module")
def ideal(run_cells):
    """The whole chapter on ideal predictors."""
    space = run_cells(
        CHAPTER, before="filters", **SIZES, n_filter_prompts=60,
        n_test=24, n_length_prompts=8, filter_updates=1500, filter_lr=[0.01], train_steps=1,
    )  # fmt: skip
    space["models"], space["endless"] = [Ideal(space["worlds"][0])], Ideal(space["Chains"](0, ends=False))
    space["CACHES"] = True
    with mock.patch.object(space["figures"], "show", lambda figure, *_: plt.close(figure)):
        verdicts_in(space, CHAPTER, first="filters")
    return space


def judged_with(space, **changes):
    """Verdicts when the ledger is written with some names changed."""
    with mock.patch.dict(space, changes):
        return verdicts_in(space, CHAPTER)


def decoded_with(space, *names, **broken):
    """The runs, with some methods decoded anew while names of the namespace are broken."""
    runs = dict(space["runs"])
    with mock.patch.dict(space, broken):
        for name in names:
            rule, options = space["arms"](0)[name]
            runs[name] = [space["decode"](space["models"][0], space["TEST_PROMPTS"][0], rule, **options)]
    return runs


HELD = ("L1", "L2", "L4", "L5", "L6", "L7", "L11")


def test_a_world_in_which_the_paper_holds_is_called_so(ideal):
    got = verdicts(ideal)
    assert {claim: got[claim] for claim in HELD} == dict.fromkeys(HELD, "reproduced")
    assert got["L3"] == "untested"


def constant(space, bias):
    """Filters that say the same of every position."""
    always = space["Filter"](B)
    for weight in always.parameters():
        nn.init.zeros_(weight)
    nn.init.constant_(always[-1].bias, bias)
    lesson = space["lessons"][0]
    filters = {key: always if key[0] == "filter" else f for key, f in lesson.filters.items()}
    return [lesson._replace(filters=filters)]


FILTERED = ("filter", "filter + EoTP", "filter + EoTP + prefix cache")


@pytest.mark.parametrize(("bias", "lost"), [(9.0, ("L1", "L2", "L5")), (-9.0, ("L2",))])
def test_a_constant_filter_costs_the_verdict(ideal, bias, lost):
    got = judged_with(ideal, runs=decoded_with(ideal, *FILTERED, lessons=constant(ideal, bias)))
    for claim in lost:
        assert got[claim] != "reproduced", claim
    assert got["L7"] == "reproduced"  # what does not rest on the filter stays


def never(self, *_):
    """EoTP that does not cut."""


def blindly(self, *_):
    """EoTP that cuts behind the fourth token, whatever is predicted."""
    self.end.fill_(self.P + 4)
    self.x[:, self.P + 4 :] = EOT


@pytest.mark.parametrize(("shorten", "lost"), [(never, ("L1",)), (blindly, ("L1", "L5"))])
def test_broken_end_prediction_costs_the_verdict(ideal, shorten, lost):
    with mock.patch.object(ideal["Decoder"], "shorten", shorten):
        got = judged_with(ideal, runs=decoded_with(ideal, *FILTERED[1:]))
    for claim in lost:
        assert got[claim] != "reproduced", claim
    assert got["L2"] == "reproduced"


def test_an_oracle_that_looks_up_the_wrong_answer_costs_the_verdict(ideal):
    plain = ideal["plain_runs"][0]
    others = [plain._replace(answers=plain.answers.roll(1, 0))]
    got = judged_with(ideal, runs=decoded_with(ideal, "oracle", plain_runs=others))
    assert got["L6"] != "reproduced"


def test_a_cache_that_returns_the_wrong_rows_costs_the_verdict(ideal):
    kept = ideal["BlockCache"].update

    def rolled(self, keys, values, layer, *rest, **options):
        found = kept(self, keys, values, layer, *rest, **options)
        lo = 0 if self.part is None else self.part[1]
        return tuple(torch.cat((f[:, :, :lo].roll(1, 0), f[:, :, lo:]), 2) for f in found)

    with mock.patch.object(ideal["BlockCache"], "update", rolled):
        got = judged_with(ideal, runs=decoded_with(ideal, "filter + EoTP + prefix cache"))
    assert got["L5"] != "reproduced"


def test_a_predictor_that_cannot_solve_the_task_leaves_claims_untested(ideal):
    """Fast, agreeing and wrong: an untrained model's plain answers and oracle must decide nothing."""
    wrong = [ideal["new_model"](77)]
    names = ("one at a time", "oracle", *FILTERED)
    runs = dict(ideal["runs"])
    plain = ideal["decode"](wrong[0], ideal["TEST_PROMPTS"][0], n_steps=2)
    runs |= {name: [plain] for name in names}
    got = judged_with(ideal, runs=runs)
    assert {got[c] for c in ("L1", "L2", "L4", "L5", "L7", "L9", "L10")} == {"untested"}
    assert got["L6"] != "reproduced"


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("L6", {"untrained": np.ones(24)}),  # the control solves the task too
        ("L8", {"filter_seconds": np.full(9, 1e-3), "pass_seconds": np.full(9, 1e-3)}),
        ("L11", {"cut": {"endless": np.eye(24)[0], "ending": np.ones(24)}}),
        ("L11", {"cut": {"endless": np.zeros(24), "ending": np.zeros(24)}}),  # EoTP never cuts anywhere
    ],
)
def test_a_broken_measurement_costs_the_verdict(ideal, claim, changes):
    assert judged_with(ideal, **changes)[claim] != "reproduced"


def test_the_gain_must_grow_with_the_length(ideal):
    done = ideal["by_length"]
    swapped = {(48 - G, name): runs for (G, name), runs in done.items()}  # 16 and 32 exchanged
    got = judged_with(ideal, by_length=swapped)
    assert got["L4"] == "not reproduced"
    assert got["L7"] != "reproduced"


@pytest.mark.parametrize(
    ("levels", "holds"),
    [
        ({1: 0.20, 2: 0.15, 4: 0.152}, True),
        ({1: 0.15, 2: 0.15, 4: 0.152}, False),  # a second layer brings nothing
        ({1: 0.20, 2: 0.15, 4: 0.10}, False),  # four are better than two
        ({1: 0.20, 2: 0.15, 4: 0.15, "shuffled": 0.15}, False),  # the control gains as much
    ],
)
def test_depths_are_judged_by_their_losses(ideal, levels, holds):
    def bce(name, depth):
        level = levels[depth] if name == "filter" or "shuffled" in levels else 0.3
        return level + np.random.default_rng(depth).normal(0, 1e-3, (1, 12))

    assert (judged_with(ideal, bce=bce)["L9"] == "reproduced") == holds


@pytest.mark.parametrize(
    ("swap", "holds"),
    [
        ({"static, tuned": "one at a time"}, True),  # a rival that accepts nothing flatters the filter
        ({"static, tuned": "oracle"}, False),
        (
            {"static, tuned": "one at a time", "filter, shuffled labels": "filter"},
            False,
        ),  # a control that gains
        ({"static, tuned": "one at a time", "accept all": "filter"}, None),  # a task without dependencies
    ],
)
def test_the_filter_is_judged_against_its_rival(ideal, swap, holds):
    runs = dict(ideal["runs"]) | {name: ideal["runs"][other] for name, other in swap.items()}
    got = judged_with(ideal, runs=runs)["L10"]
    assert got == "untested" if holds is None else (got == "reproduced") == holds


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not rendered, which takes most of a small run's time."""
    monkeypatch.setattr("tokenbook.figures.show", lambda figure, *_: plt.close(figure))


@pytest.mark.usefixtures("undrawn")
def test_two_runs_with_one_seed_agree(run_cells):
    few = {"scale": "smoke", "seed": 4, "n_test": 4, "n_filter_prompts": 10}
    one, two = (run_cells(CHAPTER, **few)["ledger"].payload() for _ in range(2))
    timed = [[c for c in payload["claims"] if c["claim"] != "L8"] for payload in (one, two)]
    assert timed[0] == timed[1]
    assert one["measurements"] == two["measurements"]


# The paper-scale path --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny bidirectional checkpoint, its tokenizer, questions and texts."""
    folder = tmp_path_factory.mktemp("tiny")
    words = [
        "<pad>",
        "<mask>",
        "<end>",
        "Question:",
        "Answer:",
        *["how", "many", "apples", "are", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="how"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, mask_token_id=1, pad_token_id=0,
        bos_token_id=3, eos_token_id=2, initializer_range=0.5, max_position_embeddings=64,
    )  # fmt: skip
    EuroBertForMaskedLM(config).save_pretrained(folder)
    rows = [
        {"question": f"how many apples are {i} {i}" + " 1" * (i % 2), "answer": f"#### {i}"}
        for i in range(10)
    ]
    texts = [{"inputs": f"how many {i} are {j}", "task": str(i)} for i in range(15) for j in range(3)]
    for name, content in {"train": rows, "test": rows}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


SHORT = {
    "scale": "paper", "device": "cpu", "dtype": "float32", "mask_id": 1, "eot_id": 2, "gen_length": 16,
    "block_length": 8, "lengths": [8, 16], "n_filter_prompts": 12, "n_test": 2, "n_length_prompts": 2,
    "filter_updates": 3, "taus": [0.9], "thresholds": [0.9], "entropies": [0.1], "n_shots": 2,
}  # fmt: skip


def paper_scale(folder, **changes):
    return (
        SHORT
        | {"model": str(folder), "dataset": str(folder), "filter_dataset": str(folder / "texts.jsonl")}
        | changes
    )


def test_braces_in_solved_examples_are_text(method):
    """LaTeX has them, as in the questions of MATH."""
    questions = object.__new__(method["Questions"])
    questions.shots, questions.encode = "Question: {x}\nAnswer: {}\n\n", lambda text: text
    wanted = ["Question: {x}\nAnswer: {}\n\nQuestion: {y}?\nAnswer:", "as it {is}"]
    assert questions.prompts([{"question": "{y}?"}, {"inputs": "as it {is}"}]) == wanted


@pytest.mark.usefixtures("undrawn")
def test_paper_scale_runs_through_the_same_cells(run_cells, tiny):
    space = run_cells(CHAPTER, **paper_scale(tiny))
    got = verdicts(space)
    assert {c for c, v in got.items() if v == "untested"} == {"L3", "L6", "L11"}
    assert space["runs"]["filter"][0].answers.shape == (2, 16)
    assert space["P"].rows == 1
    assert [len(p) for p in space["TEST_PROMPTS"][0]] == [29, 30]  # two shots in front, of different lengths
    texts = [row["inputs"] for row in space["FILTER_ITEMS"][0]]
    assert texts == [f"how many {i} are 0" for i in range(12)]  # at most one text in 66 from one task
    assert "filter + EoTP + dual cache" in space["runs"]
    texts = space["tokenizer"](["1 2 <end> 7", "how many 3"], padding="max_length", max_length=4)["input_ids"]
    solved = space["worlds"][0].solved([{"answer": "#### 2"}, {"answer": "#### 4"}], torch.tensor(texts))
    assert solved.tolist() == [True, False]


def test_what_a_checkpoint_lacks_is_named(run_cells, tiny, tmp_path):
    with pytest.raises(
        ParameterError, match="prompt and generation must fit the model's 64 positions; got 94"
    ):
        run_cells(CHAPTER, before="oracle-text", **paper_scale(tiny, lengths=[8, 64]))
    with pytest.raises(ParameterError, match=r"n_filter_prompts must be at most .* 15 texts .*; got 40"):
        run_cells(CHAPTER, before="oracle-text", **paper_scale(tiny, n_filter_prompts=40))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "no column for it"}))
    with pytest.raises(HubError, match="filter_dataset must have a column inputs or question; got text"):
        run_cells(
            CHAPTER, before="oracle-text", **paper_scale(tiny, filter_dataset=str(tmp_path / "texts.jsonl"))
        )


@pytest.mark.parametrize(
    ("trust", "error", "message"),
    [
        (False, HubError, "cannot be loaded"),
        (True, ParameterError, r"does not run with transformers .*4\.38 to 4\.46"),
    ],
)
def test_code_that_a_checkpoint_brings_runs_only_if_allowed(run_cells, tiny, tmp_path, trust, error, message):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "old_llada",
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(
        "from transformers import AName_That_Went_Away as Model\nConfig = Model\n"
    )
    with pytest.raises(error, match=message):
        run_cells(CHAPTER, before="oracle-text", **paper_scale(tmp_path, trust_remote_code=trust))
