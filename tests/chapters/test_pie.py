"""The chapter `pie`: refusals, an independent repair, verdicts lost by a wrong rotation, tiny checkpoints."""

import json
import random
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from tests.chapters.conftest import NOTEBOOKS
from tests.chapters.invented import verdicts_in
from tokenbook.kernels import rope
from tokenbook.parameters import ParameterError, Spec
from tokenbook.runs import sweeps

CHAPTER = "pie"
TINY = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 4.0}  # DeepSeek-Coder's
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def tiny(kind):
    """A tiny model of one class, with weights large enough that attention is not flat."""
    torch.manual_seed(1)
    wide = TINY | {"initializer_range": 0.1}
    if kind == "llama linear 4":
        return LlamaForCausalLM(LlamaConfig(**wide, rope_parameters=LINEAR)).eval()
    if kind == "llama3-scaled":
        return LlamaForCausalLM(LlamaConfig(**wide, rope_parameters=LLAMA3)).eval()
    if kind == "grouped-query qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**wide, num_key_value_heads=2)).eval()
    if kind == "partly rotated neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**wide, rotary_pct=0.25)).eval()
    return CohereForCausalLM(CohereConfig(**wide)).eval()


KINDS = (
    "llama linear 4",
    "llama3-scaled",
    "grouped-query qwen2",
    "partly rotated neox",
    "interleaved cohere",
)


@pytest.fixture(scope="module")
def method(run_cells):
    """The chapter's definitions and data, nothing trained."""
    return run_cells(CHAPTER, before="train", scale="smoke")


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"edit_kinds": ["insertion", "move"]}, r"edit_kinds must be items of insertion, deletion.*'move'"),
        ({"edit_lines": [3, 1]}, r"edit_lines must be fewest, most with fewest <= most; got \[3, 1\]"),
        ({"edit_position": 1.5}, "edit_position must be a number, 0.0..1.0; got 1.5"),
        ({"n_edits": 9}, "n_edits must be a whole number, 1..8; got 9"),
        ({"n_samples": 1}, "n_samples must be a whole number, 2..100000; got 1"),
        ({"cursor": "word"}, "cursor must be one of next line, rest of line; got 'word'"),
        ({"rotate_dtype": "int8"}, "rotate_dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ({"successive_edits": 65}, "successive_edits must be a whole number, 1..64; got 65"),
        (
            {"dataset": "rows.jsonl"},
            "dataset must be stdlib for model small, its 96 symbols; got 'rows.jsonl'",
        ),
        ({"seeed": 3}, None),
    ],
)
def test_bad_parameters_are_refused_in_one_sentence(run_cells, given, message):
    if message is None:  # papermill puts what it was given into a cell of its own
        given = {"In": ["# Parameters\nseeed = 3\n"]}
        message = r"unknown parameter seeed \(did you mean seed\?\)"
    with pytest.raises(ParameterError, match=message):
        run_cells(CHAPTER, before="imports", **{"scale": "smoke", **given})


MLA = {
    "first_k_dense_replace": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
REFUSED = {
    "GPT2LMHeadModel: no rotary embedding found": lambda: GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2)
    ),
    "LlamaForCausalLM: rope type dynamic: inverse frequencies depend on length": lambda: LlamaForCausalLM(
        LlamaConfig(**TINY, rope_parameters=LINEAR | {"rope_type": "dynamic"})
    ),
    "MistralForCausalLM: DynamicSlidingWindowLayer in its cache": lambda: MistralForCausalLM(
        MistralConfig(**TINY, num_key_value_heads=2, sliding_window=8)
    ),
    r"DeepseekV3ForCausalLM: caches a latent beside a rotated part \(MLA\)": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**TINY, **MLA)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_one_rotation_cannot_repair_are_refused_by_name(method, message):
    with pytest.raises(ValueError, match=message):
        method["rotary_of"](REFUSED[message]().eval())


def test_a_model_that_rotates_otherwise_than_its_frequencies_say_is_refused(method):
    model = tiny("llama linear 4")
    model.model.rotary_emb.forward = lambda x, position_ids: type(model.model.rotary_emb).forward(
        model.model.rotary_emb, x, 2 * position_ids
    )
    with pytest.raises(ValueError, match=r"keys at positions 0 and 7 do not differ by the rotation R\(7\)"):
        method["rotary_of"](model)


def test_caches_and_edits_that_cannot_be_repaired_are_refused(method):
    model, ids, edit = tiny("llama linear 4"), torch.arange(12)[None], [method["Edit"](2, 3, [5, 6])]
    update = lambda cache, n=12, edits=edit: method["update"](model, cache, n, edits, [])  # noqa: E731
    cache, rows, offloaded = DynamicCache(), DynamicCache(), DynamicCache(offloading=False)
    static = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        for target, batch in ((cache, ids), (rows, ids.expand(2, -1)), (offloaded, ids), (static, ids)):
            model(batch, past_key_values=target, use_cache=True)
    offloaded.offloading = True
    with pytest.raises(ValueError, match="one key per token: it has 12, the text 13"):
        update(cache, 13)
    with pytest.raises(ValueError, match="cache must hold one sequence, got 2: with padding"):
        update(rows)
    with pytest.raises(ValueError, match="DynamicLayer layers only, got StaticLayer"):
        update(static)
    with pytest.raises(ValueError, match="DynamicLayer layers only, got offloaded layers"):
        update(offloaded)
    for edits, message in [
        ([(3, 2, [])], "start <= stop, got 3 > 2"),
        ([(3, 13, [])], r"within 0\.\.12, the cached tokens; got 3\.\.13"),
        ([(3, 6, []), (5, 8, [])], "must not overlap: one starts at 5, another ends at 6"),
        ([(0, 12, [])], "at least one token"),
    ]:
        with pytest.raises(ValueError, match=message):
            update(cache, edits=[method["Edit"](*e) for e in edits])


def test_a_text_longer_than_the_model_was_made_for_is_warned_of(method):
    model = tiny("llama linear 4")
    model.config.max_position_embeddings = 12
    _, cache = method["encode"](model, torch.arange(12)[None])
    with pytest.warns(UserWarning, match="13 tokens, the model was made for 12"):
        method["update"](
            model, cache, 12, [method["Edit"](2, 3, [5, 6])], [method["mover"](None, lambda s: 0)]
        )


# The method against other implementations ------------------------------------------------------------------


def repaired_by_hand(model, old_ids, edit):
    """PIE for one edit, by another road: keys are caught BEFORE their rotation and rotated once, at the end.

    The model itself rotates them, at their new positions, so no rotation is undone or composed here.
    """
    i, j, new = edit
    caught, values, hooks = [], [], []
    for layer in model.model.layers:
        hooks.append(layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: caught.append(out)))
        hooks.append(layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out)))
    cache, start = DynamicCache(), i
    with torch.no_grad():
        model(torch.tensor([old_ids]), use_cache=False)
        old_keys, old_values = caught[:], values[:]
        model(torch.tensor([old_ids[:i]]), past_key_values=cache)
        if new:
            model(torch.tensor([new]), past_key_values=cache)
        start += len(new)
        for hook in hooks:
            hook.remove()
        places = torch.arange(start, start + len(old_ids) - j)[None]
        cos, sin = model.model.rotary_emb(old_keys[0], places)
        keys = []
        for layer, (k, v) in enumerate(zip(old_keys, old_values, strict=True)):
            d = model.config.hidden_size // model.config.num_attention_heads
            k, v = (x[:, j:].unflatten(-1, (-1, d)).transpose(1, 2) for x in (k, v))
            halves = k.chunk(2, -1)
            k = k * cos[:, None] + torch.cat((-halves[1], halves[0]), -1) * sin[:, None]
            kept = cache.layers[layer]
            keys.append((torch.cat((kept.keys, k), 2), torch.cat((kept.values, v), 2)))
    return keys


@pytest.mark.parametrize(
    "edit", [(5, 9, [1, 2]), (5, 5, [1, 2, 3]), (5, 9, []), (1, 2, [9]), (17, 20, [4, 5])]
)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_repair_is_that_of_keys_rotated_once_at_their_new_places(method, kind, edit):
    model, ids = tiny(kind), torch.randint(0, 384, (20,)).tolist()
    _, cache = method["encode"](model, torch.tensor([ids]))
    pie = method["mover"](method["rotary_of"](model))
    got = method["update"](model, cache, 20, [method["Edit"](*edit)], [pie])
    for layer, (k, v) in enumerate(repaired_by_hand(model, ids, edit)):
        torch.testing.assert_close(got.keys[layer], k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.values[layer], v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_first_layer_keys_and_one_layer_models_are_exact(method, kind):
    model, edit = tiny(kind), method["Edit"]
    draw = random.Random(0)
    for edits in (
        [edit(4, 4, [7, 8, 9])],
        [edit(4, 9, [])],
        [edit(0, 3, [1]), edit(6, 6, [2, 3]), edit(20, 24, [])],
    ):
        old = [draw.randrange(384) for _ in range(30)]
        sample = method["Sample"](old, method["apply"](old, edits), edits, [3, 4], "")
        layer0, logits, bits = method["exactness"](model, [sample])
        assert layer0 < 1e-5
        assert logits < 1e-4
        assert bits == 0
        layer0, logits, _ = method["exactness"](model, [sample], "one too many")
        assert layer0 > 1e-3
        assert logits > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_rotation_is_the_models_own(method, kind):
    """Complex numbers, one pair at a time, against keys that the model itself put at another position."""
    model = tiny(kind)
    rotary, token = method["rotary_of"](model), torch.tensor([[5]])
    assert rotary.layout == ("interleaved" if "cohere" in kind else "half")
    near, far = (method["encode"](model, token, start=p)[1].keys[0] for p in (3, 700))
    moved, n = near.clone(), len(rotary.inv_freq)
    for c, w in enumerate(rotary.inv_freq.double().tolist()):
        a, b = (c, c + n) if rotary.layout == "half" else (2 * c, 2 * c + 1)
        z = torch.complex(near[..., a].double(), near[..., b].double()) * np.exp(1j * 697 * w)
        moved[..., a], moved[..., b] = z.real.float(), z.imag.float()
    torch.testing.assert_close(moved, far, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(method["rotate"](near, 697, rotary), moved, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method["rotate_by_definition"](near, 697, rotary), moved, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_rotation_is_taken_where_it_is_asked_for(run_cells):
    space = run_cells(CHAPTER, before="cache", scale="smoke", rotate_dtype="bfloat16")
    x, turn = torch.randn(1, 1, 4, 8), space["Rotary"](torch.tensor([1.0, 0.1, 0.01, 0.001]))
    error = (space["rotate"](x, 50, turn) - space["rotate_by_definition"](x, 50, turn)).abs().max()
    assert 1e-4 < error < 0.1


def test_several_places_need_the_order_from_left_to_right(method):
    """A later span encoded before the earlier edit is repaired comes out otherwise: the order matters."""
    model, edit = tiny("llama linear 4"), method["Edit"]
    ids, pie = torch.randint(0, 384, (30,)).tolist(), method["mover"](method["rotary_of"](model))
    _, cache = method["encode"](model, torch.tensor([ids]))
    both = method["update"](model, cache, 30, [edit(5, 7, [1, 2, 3]), edit(20, 22, [4])], [pie])
    right_first = method["update"](model, cache, 30, [edit(20, 22, [4])], [pie])
    right_first = method["update"](model, right_first, 29, [edit(5, 7, [1, 2, 3])], [pie])
    span = slice(21, 22)  # where the later edit's token ends up
    assert torch.allclose(both.keys[0][:, :, span], right_first.keys[0][:, :, span], atol=1e-4)
    assert not torch.allclose(both.keys[1][:, :, span], right_first.keys[1][:, :, span], atol=1e-3)


def test_edits_come_from_tokens_and_places_that_meet_are_one(method):
    edits_of, apply = method["edits_of"], method["apply"]
    rng = random.Random(0)
    for _ in range(300):
        versions = [[rng.randrange(3) for _ in range(12)]]
        for place in (2, 6, 10):  # from left to right, in an alphabet so small that ends often agree
            last, at = versions[-1], place + len(versions[-1]) - 12
            versions.append(
                [*last[:at], *(rng.randrange(3) for _ in range(rng.randrange(4))), *last[at + 1 :]]
            )
        assert apply(versions[0], edits_of(versions)) == versions[-1]
    assert edits_of([[1, 2, 3, 4], [1, 9, 3, 4], [1, 9, 3, 8]]) == [(1, 2, [9]), (3, 4, [8])]


def test_ways_differ_exactly_where_they_say(method):
    model = tiny("llama linear 4")
    rotary, edit = method["rotary_of"](model), method["Edit"](5, 6, [1, 2, 3])
    ids = torch.randint(0, 384, (20,))
    _, cache = method["encode"](model, ids[None])
    way = method["ways"](rotary, model)
    kv = {name: method["update"](model, cache, 20, [edit], [move]) for name, move in way.items()}
    moved = slice(8, 22)
    for layer, (k, v) in enumerate(zip(*cache, strict=True)):
        old_k, old_v = k[:, :, 6:], v[:, :, 6:]
        pie = rope.rope_shift_reference(old_k, 2, rotary.inv_freq)
        same = lambda name, x, part=0, layer=layer: torch.allclose(  # noqa: E731
            kv[name][part][layer][:, :, moved], x, atol=1e-5
        )
        assert same("PIE", pie)
        assert same("CFE", old_k)
        assert same("one too many", rope.rope_shift_reference(old_k, 3, rotary.inv_freq))
        assert same("backwards", rope.rope_shift_reference(old_k, -2, rotary.inv_freq))
        assert same("values too", rope.rope_shift_reference(old_v, 2, rotary.inv_freq), 1)
        theta = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
        assert same("other theta", rope.rope_shift_reference(old_k, 2, theta))
        assert same("first layer only", pie if layer == 0 else old_k)
        assert same("last layer only", pie if layer == 1 else old_k)
        halves = [
            torch.allclose(kv["half of the heads"].keys[layer][:, h, moved], pie[:, h]) for h in range(4)
        ]
        assert sum(halves) == 2
        for name in way:
            assert same(name, old_v, 1) == (name != "values too")


# Verdicts --------------------------------------------------------------------------------------------------

SHORT = {
    "scale": "smoke", "context_len": 96, "train_steps": 220, "n_samples": 8, "max_new_tokens": 8,
    "edit_kinds": ["insertion", "deletion"], "edit_lines": [1, 1],
}  # fmt: skip


def without_pictures(namespace):
    """Drawing a figure takes as long as measuring what it shows: none is drawn."""
    silent = {**vars(namespace["figures"]), "show": lambda figure, name, alt: plt.close(figure)}
    namespace["figures"] = SimpleNamespace(**silent)


@pytest.fixture(scope="module")
def short(run_cells):
    """A model trained so briefly that the file stays quick, and just long enough to use positions."""
    space = run_cells(CHAPTER, patch=without_pictures, **SHORT)
    return SimpleNamespace(space=space, rows={row["claim"]: row for row in space["ledger"].rows()})


@pytest.fixture
def judged_again(short):
    """The verdicts when the experiment is done again in the namespace as it stands now."""

    again = ("experiment", "exactness-check", "table", "figure-gap", "figure-cosine")
    return lambda: verdicts_in(short.space, CHAPTER, besides=again)


EARNED = ("P5", "P6", "P7")  # and P2, but for intervals that so few samples leave wide


def test_the_right_rotation_earns_the_verdicts(short):
    assert {c: short.rows[c]["verdict"] for c in EARNED} == dict.fromkeys(EARNED, "reproduced")
    assert short.rows["P2"]["verdict"] in ("reproduced", "direction only")
    gap = next(c for c in short.rows["P2"]["criteria"] if c["id"] == "loss_gap")
    assert gap["measured"] < 0.02 < gap["control"]
    assert short.rows["P1-GPU"]["verdict"] == short.rows["P2-EM"]["verdict"] == "untested"


def test_a_rotation_by_one_position_too_many_costs_all_its_verdicts(short, judged_again, monkeypatch):
    right = short.space["rope_shift"]
    monkeypatch.setitem(short.space, "rope_shift", lambda k, delta, w, **o: right(k, delta + 1, w, **o))
    got = judged_again()
    assert {c: got[c] for c in ("P2", *EARNED)} == dict.fromkeys(("P2", *EARNED), "not reproduced")


def test_a_formula_by_one_position_too_many_costs_the_identity(short, judged_again, monkeypatch):
    right = short.space["rotate_by_definition"]
    monkeypatch.setitem(short.space, "rotate_by_definition", lambda x, delta, r: right(x, delta + 1, r))
    with pytest.raises(ValueError, match=r"keys at positions 0 and 7 do not differ by the rotation R\(7\)"):
        judged_again()


def test_a_repair_that_does_nothing_costs_the_verdicts(short, judged_again, monkeypatch):
    def unturned(x, delta, rotary, out=None):
        return x if out is None else out.copy_(x)

    monkeypatch.setitem(short.space, "rotate", unturned)
    got = judged_again()
    assert {c: got[c] for c in ("P2", "P3", *EARNED)} == dict.fromkeys(
        ("P2", "P3", *EARNED), "not reproduced"
    )


def test_a_model_that_ignores_positions_shows_nothing(short, judged_again, monkeypatch):
    monkeypatch.setitem(short.space, "models", {0: short.space["untrained"]})
    got = judged_again()
    assert got["P2"] == got["P6"] == "not reproduced"  # the wrong rotations do no harm, either


def test_two_runs_with_one_seed_agree(run_cells):
    few = SHORT | {"train_steps": 3, "n_samples": 2, "seed": 4, "successive_edits": 1}
    one, two = (run_cells(CHAPTER, before="timing", **few) for _ in range(2))
    columns = ["method", "loss", "kl", "agreement", "decoded", "line", "kind"]
    assert one["results"][columns].equals(two["results"][columns])
    assert one["trained"][4][1] == two["trained"][4][1]
    assert one["chain"].equals(two["chain"])
    assert list(one["exact"]) == list(two["exact"])


# The paper-scale path --------------------------------------------------------------------------------------


def row(number):
    """One row with RepoBench v1.1's columns; the last line uses a name that is defined once."""
    name = ("total", "records", "lengths", "holder", "answer", "buffer")[number % 6]
    body = "".join(f"    step_{n}(values, {n * number})\n" for n in range(8))
    return {
        "repo_name": f"someone/project{number}", "file_path": "pkg/main.py", "level": "2k",
        "context": [{"path": "pkg/other.py", "snippet": f"def other_{number}(x):\n    return x + {number}"}],
        "import_statement": "from pkg.other import other",
        "cropped_code": f"def main(values):\n    {name} = other(values)\n{body}    keep({name})",
        "next_line": f"    return values[{number}]",
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with six rows, and a byte-level tokenizer that puts a token in front of a text."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps(row(n)) for n in range(6)] + [json.dumps(row(6) | {"level": "8k"})]
    (folder / "cross_file_first.jsonl").write_text("\n".join(lines))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<begin>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 0)]
    )
    return folder, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>")


@pytest.mark.parametrize("kind", KINDS[:3])
def test_paper_scale_runs_on_local_checkpoints_through_the_same_cells(run_cells, data, tmp_path, kind):
    folder, tokenizer = data
    tiny(kind).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given = {
        "scale": "paper", "device": "cpu", "dtype": "bfloat16" if kind == KINDS[2] else "float32",
        "model": str(tmp_path), "dataset": str(folder), "level": "2k", "context_len": 400, "n_samples": 3,
        "max_new_tokens": 4, "timing_lengths": [64, 96], "successive_edits": 2, "n_edits": 2,
        "edit_kinds": ["replacement", "multi"] if kind == KINDS[0] else ["insertion"],
    }  # fmt: skip
    space = run_cells(CHAPTER, patch=without_pictures, **given)
    rows = {row["claim"]: row for row in space["ledger"].rows()}
    assert rows["P7"]["verdict"] == "reproduced"
    untested = {claim for claim, row in rows.items() if row["verdict"] == "untested"}
    assert untested == {"P1-GPU"}
    assert {c["id"] for c in rows["P2-EM"]["criteria"]} == {"em_gap", "es_gap"}
    sample = next(iter(space["samples"].values()))[0]
    assert sample.new[0] == 0  # the token in front stays in front
    text = space["to_text"](sample.new)
    assert text.startswith("# Repo Name: someone/project")
    assert text.endswith("\n")  # the next line is predicted
    assert space["to_text"](sample.gold).startswith("    return values[")


def test_rows_of_another_level_and_too_few_of_them_are_refused(run_cells, data, tmp_path):
    folder, tokenizer = data
    tokenizer.save_pretrained(tmp_path)
    given = {
        "scale": "paper", "device": "cpu", "model": str(tmp_path), "dataset": str(folder), "context_len": 400,
        "level": "2k", "n_samples": 7,
    }  # fmt: skip
    with pytest.raises(
        ParameterError, match=r"n_samples must be at most 6, all that .* level 2k has for .*got 7"
    ):
        run_cells(CHAPTER, before="data-check", **given)
    with pytest.raises(ParameterError, match=r"n_samples must be at most 0, .* level 12k"):
        run_cells(CHAPTER, before="data-check", **given | {"level": "12k", "n_samples": 2})


def test_edits_stand_where_they_are_wanted(run_cells):
    for wanted in (0.2, 0.8):
        space = run_cells(CHAPTER, before="data-check", scale="smoke", n_samples=8, edit_position=wanted)
        for kind in ("insertion", "deletion"):
            places = [s.edits[0].start / len(s.old) for s in space["samples"][kind, 0]]
            assert abs(np.mean(places) - wanted) < 0.1


def test_the_rest_of_a_line_continues_its_beginning(method):
    texts = [file.text for file in method["corpus"].heldout]
    for (kind, _), group in method["samples"].items():
        for s in group if kind != "rename" else ():
            text = method["to_text"](s.new) + s.line
            assert any(text in t for t in texts)
            assert not method["to_text"](s.new).endswith("\n")
            assert len(s.new) == method["P"].context_len


def test_a_rename_changes_the_only_definition_and_is_asked_for_its_copy(run_cells):
    space = run_cells(CHAPTER, before="data-check", scale="smoke", n_samples=20)
    for s in space["samples"]["rename", 0]:
        old, new, name = space["to_text"](s.old), space["to_text"](s.new), s.line
        assert space["to_text"](s.gold) == name
        assert name in new
        assert len(old) != len(new)
        assert old[: s.edits[0].start] == new[: s.edits[0].start]


@pytest.mark.parametrize("name", ["pie-edit-position", "pie-successive-edits"])
def test_the_books_sweeps_are_sweeps_of_this_chapter(name):
    sweep = sweeps.load(NOTEBOOKS.parent / "book" / "sweeps" / f"{name}.yml")
    assert sweep.chapter == CHAPTER
    assert len(sweep.given(Spec.load(CHAPTER))) in (14, 15)
