"""Molecules: bonds and stability against tables done by hand, identity of graphs, files read or refused."""

import gzip
import pickle
import sys
import types as modules

import numpy as np
import pytest

from tokenbook.data.molecules import MoleculeFileError, read_molecules, unpickle_plain
from tokenbook.metrics import molecules

ELEMENTS = ("H", "C", "N", "O", "F")
WATER = [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]


def one(symbols, positions):
    return np.array([[ELEMENTS.index(s) for s in symbols]]), np.array([positions], dtype=float)


@pytest.mark.parametrize(
    ("a", "b", "pm", "order"),
    [
        ("C", "C", 163, 1), ("C", "C", 164, 0), ("C", "C", 138, 2), ("C", "C", 139, 1), ("C", "C", 122, 3),
        ("C", "C", 123, 2), ("N", "C", 133, 2), ("H", "O", 105, 1), ("H", "O", 106, 0), ("O", "O", 110, 2),
        ("F", "F", 151, 1), ("H", "H", 50, 1), ("N", "N", 112, 3),
    ],
)  # fmt: skip
def test_orders_follow_the_table_with_nested_bounds(a, b, pm, order):
    found = molecules.bond_orders(*one(a + b, [[0, 0, 0], [0, 0, pm / 100]]), ELEMENTS)
    assert found[0].tolist() == [[0, order], [order, 0]]


def test_water_is_stable_and_a_missing_or_distant_hydrogen_is_not():
    assert molecules.stability(*one("OHH", WATER), ELEMENTS).in_one_piece.tolist() == [True]
    types, positions = one("OHH", WATER)
    types[0, 2] = -1
    atoms, whole, _ = molecules.stability(types, positions, ELEMENTS)
    assert (atoms[0].tolist(), whole.tolist()) == ([False, True, False], [False])
    assert not molecules.stability(*one("OHH", [*WATER[:2], [0, 3, 0]]), ELEMENTS).molecules[0]
    nothing = np.full((1, 3), -1)
    assert not molecules.stability(nothing, np.zeros((1, 3, 3)), ELEMENTS).molecules[0]


def test_two_molecules_in_one_are_stable_but_not_in_one_piece():
    far = [[x + 5, y, z] for x, y, z in WATER]
    _, stable, one_piece = molecules.stability(*one("OHHOHH", WATER + far), ELEMENTS)
    assert (stable[0], one_piece[0]) == (True, False)


def test_hash_ignores_order_and_place_and_sees_elements_and_bonds():
    h = lambda s, p: molecules.graph_hash(*one(s, p), ELEMENTS)[0]  # noqa: E731
    turned = [[-y, x, z + 3] for x, y, z in WATER]
    assert h("OHH", WATER) == h("HOH", [turned[1], turned[0], turned[2]])
    assert h("OHH", WATER) != h("OHF", WATER)
    assert h("CC", [[0, 0, 0], [1.5, 0, 0]]) != h("CC", [[0, 0, 0], [1.3, 0, 0]])
    assert h("CC", [[0, 0, 0], [1.5, 0, 0]]) != h("CC", [[0, 0, 0], [2.5, 0, 0]])


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="elements must be among H, C, N, O, F; got Xe"):
        molecules.bond_orders(np.zeros((1, 1), int), np.zeros((1, 1, 3)), ("Xe",))
    with pytest.raises(ValueError, match=r"types must be \[N, M\]"):
        molecules.bond_orders(np.zeros(3, int), np.zeros((3, 3)), ELEMENTS)
    with pytest.raises(ValueError, match=r"types must be -1..4; got 0..9"):
        molecules.bond_orders(np.array([[0, 9]]), np.zeros((1, 2, 3)), ELEMENTS)


# Files -----------------------------------------------------------------------------------------------------

QM9 = """3
gdb 3\t799.58\t437.9\t282.9\t1.8511\t6.31\t-0.2928\t0.0687\t0.3615\t19.0002\t0.021375\t-76.4
O\t-0.0343604951\t 0.9775395708\t 0.0076015923\t-0.589706
H\t 0.0647664923\t 0.0205721989\t 1.5346341*^-3\t 0.294853
H\t 0.8717903737\t 1.3007924048\t 0.0006931336\t 0.294853
1671.4222\t3803.6305\t3907.698
O\tO
InChI=1S/H2O/h1H2\tInChI=1S/H2O/h1H2
"""


def test_xyz_in_the_dialect_of_qm9_and_in_the_plain_one(tmp_path):
    path = tmp_path / "two.xyz"
    path.write_text(QM9 + "2\nhydrogen\nH 0 0 0\nH 0 0 0.74\n")
    water, hydrogen = read_molecules(path)
    assert water["atom_type"] == ["O", "H", "H"]
    assert water["atom_pos"][1] == [0.0647664923, 0.0205721989, 1.5346341e-3]
    assert hydrogen == {"atom_type": ["H", "H"], "atom_pos": [[0, 0, 0], [0, 0, 0.74]]}


@pytest.mark.parametrize(
    ("text", "message"),
    [("2\n\nH 0 0 0\n", "2 atoms announced, 1 there"), ("1\n\nH 0 zero 0\n", "line 1: an atom reads"),
     ("1\n\nH 0 0\n", "line 1: an atom reads")],
)  # fmt: skip
def test_broken_xyz_is_refused(tmp_path, text, message):
    path = tmp_path / "broken.xyz"
    path.write_text(text)
    with pytest.raises(MoleculeFileError, match=message):
        list(read_molecules(path))


def test_an_archive_is_read_row_by_row(tmp_path, monkeypatch):
    rows = [
        {"atom_type": ["H", "F"], "atom_pos": np.array([[0, 0, 0], [0, 0, 0.92]], np.float32)},
        {"atom_type": []},
    ]
    stored = [(str(i).encode(), gzip.compress(pickle.dumps(row))) for i, row in enumerate(rows)]

    class Store:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        begin = __enter__
        cursor = lambda self: iter(stored)  # noqa: E731

    fake = modules.ModuleType("lmdb")
    fake.open = lambda path, **options: Store() if options["readonly"] else None
    monkeypatch.setitem(sys.modules, "lmdb", fake)
    (tmp_path / "train.lmdb").touch()
    got = list(read_molecules(tmp_path / "train.lmdb"))
    assert got[0]["atom_type"] == ["H", "F"]
    np.testing.assert_array_equal(got[0]["atom_pos"], rows[0]["atom_pos"])
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(MoleculeFileError, match="needs the package lmdb"):
        list(read_molecules(tmp_path / "train.lmdb"))


def test_a_pickle_that_would_run_something_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    with pytest.raises(MoleculeFileError, match=r"must hold plain data, this one names builtins\.exec"):
        unpickle_plain(pickle.dumps({"atom_type": Bomb()}))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(MoleculeFileError, match="cannot be read"):
        unpickle_plain(b"\x80\x04nonsense")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(MoleculeFileError, match=r"must end in \.xyz or \.lmdb, got a\.pdb"):
        read_molecules(tmp_path / "a.pdb")
    with pytest.raises(MoleculeFileError, match=r"there is no file a\.xyz"):
        read_molecules(tmp_path / "a.xyz")
