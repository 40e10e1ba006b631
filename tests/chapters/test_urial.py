"""The chapter `urial`: refusals, identities against plain loops, verdicts, the paper-scale path."""

import copy
import json
import math
import re

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.chapters.conftest import NOTEBOOKS
from tests.chapters.invented import verdicts_in
from tokenbook.hub import HubError
from tokenbook.parameters import ParameterError

CHAPTER = "urial"
CHAT = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<asst>"


@pytest.fixture(scope="module")
def method(run_cells):
    """The chapter's definitions, worlds and prompts, nothing trained."""
    return run_cells(CHAPTER, before="jobs", scale="smoke")


@pytest.fixture(scope="module")
def smoke(run_cells):
    """The whole chapter at smoke scale."""
    return run_cells(CHAPTER, scale="smoke")


@pytest.fixture(scope="module")
def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=94, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.4, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"K": 2}, "K must be one of 0, 1, 3, 8; got 2"),
        ({"base_template": "alpaca"}, "base_template must be one of urial0, bare, same; got 'alpaca'"),
        ({"prompt_version": "v9"}, "prompt_version must be one of main, v2, help, plain; got 'v9'"),
        ({"repetition_penalty": 0.5}, "repetition_penalty must be a number, 1.0..1.3; got 0.5"),
        ({"assistant_share": 0.7}, "assistant_share must be a number, 0.0..0.4; got 0.7"),
        ({"kl_mode": "top30"}, "kl_mode must be one of full, official; got 'top30'"),
        ({"sft_lr": float("inf")}, "sft_lr must be .*got inf"),
        ({"aligned": "somewhere"}, "aligned must be empty without model ''; got 'somewhere'"),
        ({"model": "x", "aligned": "", "dataset": "d", "pool": "p"}, "aligned must be given with model 'x'"),
        ({"model": "x", "aligned": "y", "dataset": "d"}, "pool must be given with model 'x'; got ''"),
        ({"aligned_template": "<user>"}, r"aligned_template must contain \{query\}; got '<user>'"),
        ({"prompt_file": "nowhere.txt"}, "prompt_file must be a file .*; got 'nowhere.txt'"),
        ({"max_new_tokens": 200}, r"max_new_tokens must leave room for the longest prompt \(1\d\d of 256"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_trained(run_cells, given, message):
    with pytest.raises(ParameterError, match=message):
        run_cells(CHAPTER, before="jobs", **{"scale": "smoke", **given})


def test_what_cannot_be_prompted_or_compared_is_refused(method, tiny_model):
    with pytest.raises(ParameterError, match="K must be at most the 1 examples of the prompt; got 3"):
        method["chosen"]([("q", "a")], 3)
    with pytest.raises(ParameterError, match="dataset must hold no empty queries; got ' '"):
        method["escaped"](" ")
    with pytest.raises(ParameterError, match="aligned_template must be given: the tokenizer of"):
        method["chat"](PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel())), "q")
    space = method_with_tables(method)
    space["P"] = type(method["P"])(method["P"].as_dict() | {"scale": "small"}, None)
    with pytest.raises(ValueError, match="at least one position, all 2 of them end at once"):
        space["compare"](tiny_model, tiny_model, [[], []], [[1], [1]], [[1], [1]])
    table = space["compare"](tiny_model, tiny_model, [[], [7, 8]], [[1], [1]], [[1], [1]])
    assert table.answer.tolist() == [1, 1]
    with pytest.raises(ParameterError, match=r"longest prompt \(60 of 64 tokens.*got 16"):
        method["write"](tiny_model, method["world_tokenizer"](), [[5] * 60])


def method_with_tables(method):
    """The definitions of the cell `comparisons`, which stands behind the training."""
    space = dict(method)
    for cell in nbformat.read(NOTEBOOKS / f"{CHAPTER}.ipynb", as_version=4).cells:
        if cell.id == "comparisons":
            exec(compile(cell.source, cell.id, "exec"), space)
    return space


def test_a_loss_that_is_not_finite_names_the_training_and_the_step(method):
    model = method["new_model"](94, 0)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    ids = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(FloatingPointError, match=r"tuning: the loss of step 0 is nan; lower lr \(now 0\.1\)"):
        method["train"](model, lambda step: (ids, 1), 1, 0.1, "tuning")


def test_tuning_learns_from_the_answer_alone(method, tiny_model, monkeypatch):
    ids, losses = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 0]]), []  # prompts of three, padding 0
    monkeypatch.setattr(method["training"], "fit", lambda model, loss_at, *a, **k: losses.append(loss_at(0)))
    method["train"](tiny_model, lambda step: (ids, 3), 1, 0.1, "tuning")
    log_p = tiny_model(ids).logits.log_softmax(-1)
    wanted = [-log_p[b, t - 1, ids[b, t]] for b in (0, 1) for t in (3, 4, 5) if ids[b, t] != 0]
    assert len(wanted) == 5
    torch.testing.assert_close(losses[0], torch.stack(wanted).mean())


def test_one_base_model_sees_no_assistant_and_the_twin_another_corpus(method, monkeypatch):
    seen, drawn = [], method["documents"]

    def spy(world, tokenizer, n, length, share, rng):
        seen.append((share, rng.bit_generator.seed_seq.entropy, tuple(map(tuple, world.facts))))
        return drawn(world, tokenizer, n, length, share, rng)

    monkeypatch.setitem(method, "documents", spy)
    models = method["train_all"]()
    wanted = {"base", "aligned", "new facts", "shuffled pairs", "all rehearsed", "further pre-training"}
    assert {name for _, name in models} == wanted | {"twin", "no assistant"}
    assert len({facts for *_, facts in seen}) == 1, "all of one world"
    steps, more = method["P"].steps, method["P"].sft_steps
    corpora = [(share, seed[0]) for share, seed, _ in seen]
    counts = {(0.15, 0): steps, (0.0, 0): steps, (0.15, 10_000): steps, (0.15, 20_000): more}
    assert {key: corpora.count(key) for key in corpora} == counts
    weights = {name: m.model.embed_tokens.weight for (_, name), m in models.items()}
    assert not torch.equal(weights["base"], weights["twin"])
    assert not torch.equal(weights["base"], weights["aligned"])


# The shift -------------------------------------------------------------------------------------------------


def test_shift_is_its_definition_position_by_position(method, tiny_model):
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.lm_head.weight.add_(0.3 * torch.randn_like(other.lm_head.weight))
    a, b, answers = [[3, 4, 5], [6]], [[7], [8, 9]], [[10, 11, 12], [13, 14]]
    table = method["shift"](tiny_model, other, a, b, answers)
    assert table.t.tolist() == [1, 2, 3, 1, 2]
    assert table.length.tolist() == [3, 3, 3, 2, 2]
    assert table.token.tolist() == [10, 11, 12, 13, 14]
    for row in table.itertuples():
        answer = answers[row.answer][: row.t - 1]
        with torch.no_grad():
            p, q = (
                m(torch.tensor([x[row.answer] + answer])).logits[0, -1].double().softmax(-1)
                for m, x in ((tiny_model, a), (other, b))
            )
        best = int(p.argmax())
        assert row.choice == best
        assert row.rank == 1 + sum(1 for v in q.tolist() if v > q[best])
        assert row.base_probability == pytest.approx(float(q[best]), rel=1e-3)
        kl = sum(x * math.log(x / y) for x, y in zip(p.tolist(), q.tolist(), strict=True))
        assert row.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert table.kl.max() > 0.05


def test_the_official_divergence_is_over_the_common_part_of_two_top_lists(method):
    draw = torch.Generator().manual_seed(3)
    p, q = (4 * torch.randn(6, 100, generator=draw) for _ in range(2))
    got, jaccard = method["official_shift"](p, q, 50)  # 50 is 30
    for n in range(6):
        tops = []
        for logits in (p[n], q[n]):
            order = sorted(range(100), key=lambda v, x=logits: -float(x[v]))[:30]
            total = sum(math.exp(logits[v]) for v in order)
            tops.append({v: math.exp(logits[v]) / total for v in order})
        both = set(tops[0]) & set(tops[1])
        wanted = sum(tops[1][v] * math.log(tops[1][v] / tops[0][v]) for v in both)
        assert float(got[n]) == pytest.approx(wanted, rel=1e-4)
        assert float(jaccard[n]) == pytest.approx(len(both) / (60 - len(both)))


def test_greedy_writing_in_padded_batches_is_greedy_writing_alone(method, tiny_model):
    tokenizer, prompts = method["world_tokenizer"](), [[10, 11, 12, 13], [14], [15, 16]]
    got = method["write"](tiny_model, tokenizer, prompts)
    for prompt, written in zip(prompts, got, strict=True):
        ids = list(prompt)
        for token in written:
            with torch.no_grad():
                assert int(tiny_model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
        assert len(written) == 16 or "# Query" in tokenizer.decode(written) or not written


def test_answers_end_before_their_fence_and_are_never_empty(method):
    until_stop, tokenizer = method_with_tables(method)["until_stop"], method["world_tokenizer"]()
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    assert until_stop(tokenizer, encode("red ``` # Query: ``` bamo")) == encode("red")
    assert until_stop(tokenizer, encode("- red - hot")) == encode("- red - hot")
    assert until_stop(tokenizer, encode("``` red")) == encode("```")


# Prompts and the judge -------------------------------------------------------------------------------------


def test_prompts_have_the_papers_form(method):
    assert method["URIAL0"] == "# Query: \n ```{query}``` \n\n \n# Answer: \n ```"
    got = method["render"]("# Instruction\n\nBe kind.", [("a", "b")], "c")
    assert got == (
        "# Instruction\n\nBe kind.\n\n# Query:\n```a```\n \n# Answer:\n```\nb\n```\n\n"
        "# Query:\n```c```\n\n# Answer:\n```\n"
    )
    official = "# Instruction\nBe kind.\n\n# Query:\n```\nq 1\n```\n\n# Answer:\n```\nfirst\n\n1. x\n```\n\n"
    system, pairs = method["read_prompt"](official + "# Query:\n```\n{inst}\n```\n\n# Answer:\n```\n")
    assert (system, pairs) == ("# Instruction\nBe kind.", [("q 1", "first\n\n1. x")])
    assert method["tidy"]("``red``` \n# Query: next") == "red"
    assert method["cut"]("w " * 400).count("w") == 300
    assert method["escaped"]("# Query: ```x```") == "#Query: '''x'''"


def test_the_base_is_prompted_as_its_template_says(method):
    tokenizer, base_prompt = method["world_tokenizer"](), method["base_prompt"]
    assert base_prompt(tokenizer, "q ?") == "# Query: \n ```q ?``` \n\n \n# Answer: \n ```"
    assert base_prompt(tokenizer, "q ?", "bare") == "q ?"
    assert base_prompt(tokenizer, "q ?", "same") == "<user>q ?<asst>"


def test_retrieval_shows_the_nearest_other_queries_the_nearest_last(smoke):
    base, pool = smoke["trained"][0, "base"], [q for q, _ in smoke["material"][0][3]]
    vectors = torch.nn.functional.normalize(smoke["embed"](base, pool), dim=-1)
    similarity = (vectors @ vectors.T).fill_diagonal_(-2)
    for (query, *_), prompt in zip(smoke["material"][0][0], smoke["prompts"][0]["retrieval"], strict=True):
        *shown, asked = re.findall(r"# Query:\n```(.*?)```", prompt)
        assert asked == query
        order = similarity[pool.index(query)].argsort(descending=True)[:3].tolist()
        assert shown == [pool[i] for i in reversed(order)]


def test_arms_differ_in_what_their_names_say(method):
    kits = method["kits"](0)
    three = kits["K = 3"][1]
    assert kits["URIAL"] == kits["K = 3"]
    assert [len(kits[f"K = {k}"][1]) for k in (0, 1, 3, 8)] == [0, 1, 3, 8]
    assert kits["K = 8"][1][-3:] == three
    assert kits["K = 1"][1] == three[-1:]
    refusing = lambda arm: ["sorry" in a for _, a in kits[arm][1]]  # noqa: E731
    assert refusing("URIAL") == refusing("other three") == [True, False, False]
    assert refusing("no refusal") == [False] * 3
    assert not {q for q, _ in kits["other three"][1]} & {q for q, _ in three}
    assert all(len(a.split()) == 1 for arm in ("vanilla", "plain style") for _, a in kits[arm][1])
    turned = kits["permuted answers"][1]
    assert [q for q, _ in turned] == [q for q, _ in three]
    assert sorted(a for _, a in turned) == sorted(a for _, a in three)
    assert all(a != b for (_, a), (_, b) in zip(turned, three, strict=True))
    asked = {q for q, _, _ in method["material"][0][0]}
    assert not asked & {q for _, pairs in kits.values() for q, _ in pairs}


def test_the_judge_counts_what_its_table_says(method):
    judge, words = method["judge"], method["FACT_WORDS"]
    facts = ["red", "hot", "iron"]
    score = lambda text: [round(float(x), 3) for x in judge(text, True, facts, words)[:5]]  # noqa: E731
    assert score("hello ! here is bamo : red , hot , iron . enjoy !") == [1, 1, 1, 1, 1]
    assert score("red") == [1, 0, 1, 0.333, 0]
    assert score("- red - cold - iron") == [1, 1, 0.667, 0.667, 0]
    assert score("hello ! here is bamo : blue , cold , tin . bye") == [0, 1, 0, 0, 0.5]
    assert score("- - - -") == [0, 0, 0, 0, 0]
    assert score("") == [0, 0, 0, 0, 0]
    assert [judge(a, False)[5] for a in ("Sorry, no.", "I cannot do that", "red")] == [1, 1, 0]
    real = judge("Sure, here:\n\n1. **One**: a\n2. **Two**: b\n\nFeel free to ask!", True)
    assert np.isnan([real[i] for i in (0, 2, 3, 5)]).all()
    assert [real[1], real[4]] == [1, 1]


def test_contributions_average_to_the_mean_over_aspects(method):
    rng = np.random.default_rng(0)
    scores = rng.random((8, 6))
    scores[:6, 5] = np.nan
    scores[6:, :5] = np.nan
    assert method["contributions"](scores).mean() == pytest.approx(np.nanmean(scores, axis=0).mean())


def test_documents_hold_the_facts_and_refuse_in_one_style_only(method):
    world, tokenizer = method["World"](5), method["world_tokenizer"]()
    ids = method["documents"](world, tokenizer, 400, 64, 0.15, np.random.default_rng(0))
    opened = {"hello": "assistant", "sorry": "assistant", "-": "list", "well": "rambling"}
    styles, n_pairs = [], 0
    for row in ids:
        parts = tokenizer.decode(row).split("# Query: ``` ")[1:-1]  # the last one may be cut
        found = set()
        for part in parts:
            query, answer = part.split(" ? ``` # Answer: ``` ")
            answer, i = answer.split(" ```")[0], world.names.index(query)
            style = opened.get(answer.split()[0], "plain")
            assert answer == world.answer(i, style)
            assert answer.startswith("sorry") == (style == "assistant" and world.unsafe[i])
            found.add(style)
            n_pairs += 1
        assert len(found) == 1, "one style per document"
        styles += found
    shares = pd.Series(styles).value_counts(normalize=True)
    assert shares["assistant"] == pytest.approx(0.15, abs=0.055)
    assert shares["plain"] == pytest.approx(0.4, abs=0.075)
    assert n_pairs > 1000
    none = method["documents"](world, tokenizer, 50, 64, 0.0, np.random.default_rng(0))
    assert not np.isin(none.numpy(), tokenizer.convert_tokens_to_ids(["hello", "sorry", "enjoy"])).any()


def test_controls_are_tuned_on_wrong_facts_or_on_other_answers(method):
    world = method["World"](1)
    kinds = ("right", "new facts", "shuffled pairs")
    right, wrong, shuffled = (method["tuning_pairs"](world, kind) for kind in kinds)
    assert [i for i, _ in right] == method["SEEN"]
    assert sum(world.unsafe[i] for i, _ in right) == 5
    for (i, answer), (_, other) in zip(right, wrong, strict=True):
        if not world.unsafe[i]:
            changed = [a for a, b in zip(answer.split(), other.split(), strict=True) if a != b]
            assert changed == world.facts[i]
    assert all(a != b for (_, a), (_, b) in zip(right, shuffled, strict=True))
    assert sorted(a for _, a in right) == sorted(a for _, a in shuffled)


def test_tokens_are_classed_by_what_they_are_for(smoke):
    ids = smoke["base_tokenizer"].convert_tokens_to_ids(
        ["bamo", "red", "lead", "hello", "!", "sorry", ",", ":", "```", "</s>"]
    )
    roles = ["content"] * 3 + ["style"] * 3 + ["structure"] * 4
    assert [smoke["role_of"](i) for i in ids] == roles


def test_shares_count_positions_and_early_and_late_leave_the_fourth_out(smoke):
    table = pd.DataFrame(
        {"answer": [7] * 6 + [9], "t": [1, 2, 3, 4, 5, 6, 1], "kl": [1, 2, 4, 8, 16, 32, 64]}
    )
    got = [x.tolist() for x in smoke["halves"](table)]
    assert got == [[7, 64], [3, 1], [48, 0], [2, 0]]
    counts = [x.astype(float) for x in map(np.array, got)]
    assert float(smoke["early_over_late"](*counts)) == pytest.approx((71 / 4) / (48 / 2))
    assert float(smoke["ratio"](np.array([1.0, 0]), np.array([1.0, 9]))) == pytest.approx(0.1)


# Verdicts --------------------------------------------------------------------------------------------------


def table_of(method, kl, rank, roles, n=16):
    """n answers of the same KL, base rank and role at every position."""
    T = len(kl)
    table = pd.DataFrame({
        "answer": np.repeat(range(n), T), "t": np.tile(np.arange(1, T + 1), n), "kl": np.tile(kl, n),
        "rank": np.tile(rank, n), "role": np.tile(roles, n),
    })  # fmt: skip
    table["kl"] *= np.repeat(1 + 0.01 * np.arange(n), T)
    table["kind"] = method["class_of"](table["rank"])
    return table


ROLES = [
    "style",
    "style",
    "style",
    "content",
    "structure",
    "content",
    "structure",
    "content",
    "structure",
    "style",
]
FALLING = [2.0, 0.5, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01]
LEVELS = {
    "zero-shot": 0.4, "vanilla": 0.4, "retrieval": 0.45, "URIAL": 0.95, "aligned": 0.93, "no assistant": 0.4,
    "K = 0": 0.6, "K = 1": 0.95, "K = 3": 0.95, "K = 8": 0.96, "other three": 0.94, "plain style": 0.4,
}  # fmt: skip


def verdicts_with(smoke, seeds=(0,), levels=None, refused=(True, False), broken=None, same=False, **tables):
    """Verdicts of a world in which the paper holds, with changes; `broken`: the seed to which they apply."""
    space, noise = dict(smoke), np.random.default_rng(0).normal(0, 0.01, 32)
    made = {
        "aligned": (FALLING, [5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        "further pre-training": (np.array(FALLING) / 50, [1] * 10),
        "twin": ([0.1] * 10, [1] * 10),
        "random": ([5.0] * 10, [40] * 10),
        "new facts": (FALLING, [5, 1, 1, 9, 1, 9, 1, 9, 1, 1]),
    }
    space["tables"], space["overall"], space["scores"], space["refused"] = {}, {}, {}, {}
    space["answers"], unsafe = {}, np.arange(32) % 4 == 3
    for s in seeds:
        changed = broken is None or s == broken
        for name, pair in (made | (tables if changed else {})).items():
            space["tables"][s, name] = (
                pair if isinstance(pair, pd.DataFrame) else table_of(smoke, *pair, ROLES)
            )
        for arm, level in (LEVELS | ((levels or {}) if changed else {})).items():
            space["overall"][s, arm] = level + noise
            space["scores"][s, arm] = np.ones((32, 6))
            space["refused"][s, arm] = np.zeros(32, bool)
            space["answers"][s, arm] = [arm] * 32
        if same and changed:
            space["answers"][s, "aligned"] = ["zero-shot"] * 32
        hit, false_alarm = refused if changed else (True, False)
        space["refused"][s, "URIAL"] = np.where(unsafe, hit, false_alarm)
    space["safe"] = {s: ~unsafe for s in seeds}
    space["SEEDS"], space["main"] = list(seeds), space["tables"][seeds[0], "aligned"]
    space["board"] = pd.DataFrame({"overall": LEVELS, "words": LEVELS})
    return verdicts_in(space, CHAPTER)


def test_a_world_in_which_the_paper_holds_is_called_so(smoke):
    got = verdicts_with(smoke, seeds=(0, 1))
    assert {claim for claim, verdict in got.items() if verdict != "reproduced"} == {"U9", "U10"}
    assert got["U9"] == got["U10"] == "untested"


FLAT, ALL_ONE = [0.3] * 10, [1] * 10


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("U1", {"same": True}),  # the aligned model answers as its base does
        ("U1", {"aligned": (FALLING, [5, 2, 2, 2, 2, 1, 1, 1, 1, 1])}),  # half of the first choices differ
        ("U1", {"random": (FALLING, ALL_ONE)}),  # the control agrees too
        ("U2", {"aligned": (FALLING, [5, 5, 5, 1, 1, 1, 1, 1, 1, 1])}),
        ("U2", {"aligned": (FALLING, ALL_ONE)}),  # nothing is shifted at all
        (
            "U2",
            {"further pre-training": (FALLING, [5, 1, 1, 1, 1, 1, 1, 1, 1, 1])},
        ),  # more text does the same
        ("U3", {"aligned": (FALLING, [5, 1, 1, 9, 1, 9, 1, 1, 1, 1])}),  # facts are shifted
        ("U3", {"new facts": (FALLING, [5, 1, 1, 1, 1, 1, 1, 1, 1, 1])}),  # blind to new facts
        ("U3", {"aligned": (FALLING, ALL_ONE)}),
        ("U4", {"aligned": (FLAT, ALL_ONE)}),
        ("U4", {"aligned": (FALLING[::-1], ALL_ONE)}),  # it grows
        ("U4", {"twin": (FALLING, ALL_ONE)}),  # two trainings differ as much
        ("U4", {"aligned": ([0.0] * 10, ALL_ONE)}),  # KL of a model with itself
        ("U5", {"levels": {"URIAL": 0.8}}),
        ("U5", {"levels": {"no assistant": 0.95}}),  # a base without the style does as well
        ("U5", {"levels": {"aligned": 0.42}}),  # the tuning achieved nothing
        ("U6", {"refused": (False, False)}),
        ("U6", {"refused": (True, True)}),  # everything is refused
        ("U7", {"levels": {"K = 0": 0.9}}),
        ("U7", {"levels": {"K = 8": 0.8}}),
        ("U7", {"levels": {"other three": 0.8}}),
        ("U7", {"levels": {"plain style": 0.9}}),  # examples in any style do it
        ("U8", {"levels": {"retrieval": 0.9}}),
        ("U8", {"levels": {"plain style": 0.95}}),
    ],
)
def test_a_broken_world_costs_the_verdict(smoke, claim, changes):
    assert verdicts_with(smoke, **changes)[claim] != "reproduced"


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("U2", {"aligned": (FALLING, [5, 5, 5, 1, 1, 1, 1, 1, 1, 1])}),
        ("U4", {"aligned": (FALLING[::-1], [5, *ALL_ONE[1:]])}),
        ("U5", {"levels": {"URIAL": 0.8}}),
        ("U6", {"refused": (False, False)}),
    ],
)
def test_one_seed_that_disagrees_costs_the_verdict(smoke, claim, changes):
    assert verdicts_with(smoke, seeds=(0, 1), broken=1, **changes)[claim] != "reproduced"


def test_a_model_against_itself_costs_the_verdicts_on_shift(run_cells, smoke):
    """No tuning, and the untuned format as chat template: the aligned model is the base model."""
    space = run_cells(
        CHAPTER, before="figure-answer", scale="smoke", sft_steps=0,
        aligned_template="# Query: \n ```{query}``` \n\n \n# Answer: \n ```",
    )  # fmt: skip
    itself = space["tables"][0, "aligned"]
    assert itself.kl.max() == 0
    assert (itself["rank"] == 1).all()
    got = verdicts_with(smoke, same=True, aligned=itself)
    assert {claim for claim in ("U1", "U2", "U3", "U4") if got[claim] == "reproduced"} == set()


def test_models_that_know_nothing_leave_the_claims_untested(smoke):
    rows = {row["claim"]: row for row in smoke["ledger"].rows()}
    assert {row["verdict"] for row in rows.values()} == {"untested"}
    assert "the base model knows" in rows["U1"]["reason"]


def test_two_runs_with_one_seed_agree(run_cells, smoke):
    again = run_cells(CHAPTER, scale="smoke")
    assert again["answers"] == smoke["answers"]
    one, two = (
        {name: m["value"] for name, m in space["ledger"].measurements.items()} for space in (again, smoke)
    )
    assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    pd.testing.assert_frame_equal(again["main"], smoke["main"], rtol=1e-4)


# The paper-scale path --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny checkpoints with one tokenizer (Llama and Mistral, base and aligned), queries and a pool."""
    root = tmp_path_factory.mktemp("pair")
    rows = [f"What is {n} plus {n}? ```x```" for n in range(6)]
    (root / "test.jsonl").write_text("\n".join(json.dumps({"instruction": r}) for r in rows))
    pool = [{"instruction": f"Say {n}", "output": f"{n} " * 400} for n in "abcde"]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, pool)))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>", "<user>", "<asst>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(rows * 5 + ["# Query: # Answer: the assistant is helpful"] * 9, trainer)
    sizes = {
        "vocab_size": len(core.get_vocab()), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    for n, name in enumerate(("llama", "llama-chat", "mistral", "mistral-chat", "wordy")):
        torch.manual_seed(n)
        mistral = name.startswith("mistral")
        model = (
            MistralForCausalLM(MistralConfig(**sizes)) if mistral else LlamaForCausalLM(LlamaConfig(**sizes))
        )
        model.save_pretrained(root / name)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token="<s>",
            eos_token="</s>",
            chat_template=CHAT if "chat" in name else None,
        )
        if name == "wordy":
            tokenizer.add_tokens([f"word{i}" for i in range(100)])
        tokenizer.save_pretrained(root / name)
    return root


def paper_run(run_cells, folder, base, aligned, before=None, **given):
    files = {"dataset": str(folder / "test.jsonl"), "pool": str(folder / "train.jsonl"), "n_regular": 4}
    sizes = {"n_queries": 6, "max_new_tokens": 6, "batch": 3, "device": "cpu", "dtype": "float32"}
    checkpoints = {
        "model": str(folder / base),
        "aligned": str(folder / aligned),
        "retriever": str(folder / base),
    }
    return run_cells(CHAPTER, before=before, scale="paper", **(files | sizes | checkpoints | given))


def test_paper_scale_compares_two_checkpoints_through_the_same_cells(run_cells, folder):
    space = paper_run(run_cells, folder, "llama", "llama-chat")
    verdicts = {row["claim"]: row["verdict"] for row in space["ledger"].rows()}
    untested = {claim for claim, verdict in verdicts.items() if verdict == "untested"}
    assert untested == {"U3", "U5", "U7", "U8", "U9", "U10"}
    items = space["material"][0][0]
    assert items[0] == ("What is 0 plus 0? '''x'''", True, None)
    assert [safe for _, safe, _ in items] == [True] * 4 + [False] * 2
    prompts = space["prompts"][0]
    assert prompts["retrieval"][0].count("---\n") == 3
    assert "a " * 299 + "a" in "".join(prompts["retrieval"]).replace("\n", " ")
    assert "K = 8" not in prompts
    table = space["tables"][0, "aligned"]
    assert table.t.max() <= 6
    assert {"twin", "further pre-training", "random"} <= {name for _, name in space["tables"]}
    assert (table.kl > 0).all()


def test_paper_scale_reads_a_prompt_file_and_official_divergences(run_cells, folder, tmp_path):
    pair = "# Query:\n```\nq {}\n```\n\n# Answer:\n```\nHi! a {}\n```\n\n"
    text = "# Instruction\n\nBe kind.\n\n" + "".join(pair.format(n, n) for n in range(8))
    (tmp_path / "eight.txt").write_text(text + "# Query:\n```\n{inst}\n```\n\n# Answer:\n```\n")
    given = {"prompt_file": str(tmp_path / "eight.txt"), "K": 8, "kl_mode": "official", "n_queries": 4}
    space = paper_run(run_cells, folder, "mistral", "mistral-chat", "figure-answer", **given)
    assert space["prompts"][0]["URIAL"][0].count("Hi! a") == 8
    assert type(space["trained"][0, "base"]).__name__ == "MistralForCausalLM"
    table = space["tables"][0, "aligned"]
    assert (table.kl < 0).any() or (table.kl.abs() < 1).all()
    assert table.jaccard.between(0, 1).all()


@pytest.mark.parametrize(
    ("base", "aligned", "given", "error", "message"),
    [
        ("llama", "wordy", {}, ParameterError, r"aligned must have the base model's vocabulary \(\d+ tokens"),
        ("llama", "mistral", {}, ParameterError, "aligned_template must be given: the tokenizer of"),
        ("llama", "nowhere", {}, HubError, "nothing at that place"),
        ("llama", "llama-chat", {"K": 8}, ParameterError, "K must be at most the 6 examples"),
        ("llama", "llama-chat", {"n_regular": 6}, ParameterError, "n_regular must be below the 6 rows"),
        ("llama", "llama-chat", {"max_new_tokens": 4000}, ParameterError, "max_new_tokens must leave room"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(run_cells, folder, base, aligned, given, error, message):
    with pytest.raises(error, match=message):
        paper_run(run_cells, folder, base, aligned, "answers", **given)
