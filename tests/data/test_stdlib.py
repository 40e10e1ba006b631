"""The standard library's source as a corpus: complete, over 96 symbols, held out by file."""

import pytest

from tokenbook.data import stdlib


def test_every_symbol_survives_and_everything_else_becomes_a_space():
    assert stdlib.VOCAB_SIZE == 96
    assert stdlib.decode(stdlib.encode(stdlib.ALPHABET)) == stdlib.ALPHABET
    assert stdlib.decode(stdlib.encode("a\tbé\U0001f600\r")) == "a b   "


def test_corpus_is_real_and_holds_out_the_last_files():
    corpus = stdlib.corpus()
    names = [file.name for file in corpus.train + corpus.heldout]
    assert names == sorted(names)
    assert len(names) == len(set(names)) >= 120
    assert len(corpus.heldout) == round(0.05 * len(names))
    assert len(corpus.train_ids()) == sum(len(file.text) for file in corpus.train) > 2_000_000
    assert corpus.train_ids().max() < stdlib.VOCAB_SIZE
    assert not any(name.startswith("_sysconfigdata") for name in names)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_held_out_share_is_checked(share):
    with pytest.raises(ValueError, match="heldout must lie between 0 and 1"):
        stdlib.corpus(share)
