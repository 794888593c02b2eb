"""Three ways to count: the paper's, which reproduces its Table 2, the wire's, and the least."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

import ef21_jax as ef21
from experiments import table2
from experiments.models import gpt


def test_three_ledgers_side_by_side_are_those_of_each_convention():
    tx = ef21.ef21_muon(0.1, uplink=ef21.TopK(0.1), downlink=ef21.BlockNatural())
    params = {"kernel": jnp.zeros((30, 40)), "bias": jnp.zeros(40)}
    found = ef21.ledger.side_by_side(tx, params)
    for name, convention in ef21.ledger.CONVENTIONS.items():
        assert found[name] == ef21.ledger.bytes_per_step(tx, params, convention=convention)
    head, *rows, total = str(found).splitlines()
    assert [row.split()[0] for row in rows if "kernel" in row or "bias" in row]
    for way in ("up", "down"):
        for name in found.ledgers:
            assert f"{way} {name}" in head
            assert f"{getattr(found[name], way):,}" in total


@functools.cache
def costs(name):
    compressor = next(row[1] for row in table2.ROWS if row[0] == name)
    return table2.relative_costs(compressor, gpt.parameter_shapes(gpt.PRESETS["124m"]))


@pytest.mark.parametrize(("name", "printed"), [(row[0], row[2]) for row in table2.ROWS])
def test_the_papers_convention_reproduces_its_table_2(name, printed):
    assert costs(name)["paper"] == pytest.approx(printed, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("rank15_natural", 0.0506),
        ("top15_natural", 0.070),
        ("top10_natural", 0.057),
        ("natural", 0.2502),
    ],
)
def test_the_wire_takes_less_than_the_paper_counts(name, most):
    assert costs(name)["wire"] <= most < costs(name)["paper"]


@pytest.mark.parametrize("name", [row[0] for row in table2.ROWS])
def test_no_code_takes_less_than_its_information(name):
    assert costs(name)["information"] <= costs(name)["wire"]


def test_a_set_of_positions_holds_the_logarithm_of_the_number_of_such_sets():
    log2_binomial = ef21.ledger.log2_binomial
    assert log2_binomial(10, 3) == pytest.approx(math.log2(120))
    assert log2_binomial(7, 0) == log2_binomial(7, 7) == pytest.approx(0)


@pytest.mark.parametrize(
    ("compressor", "paper", "information"),
    [
        # Sent three times in ten; to say whether takes 0.88 bits.
        (ef21.Dropout(0.3), 0.3 * 1200 * 32, 0.3 * 1200 * 32 + 1),
        (ef21.RandomSubspace(0.1), 3 * 40 * 32, 3 * 40 * 32 + 64),
        # One of 30 entries, or none, with a sign, for each of 40 columns: log₂ 61.
        (ef21.MaxRowSumSharp(), 32 + 40 * 27, 32 + 238),
        (ef21.ColumnTopK(0.1, axis=-2), 4 * (30 * 32 + 26), 4 * 30 * 32 + 17),
        (ef21.L1Sharp(), 32 + 26, 32 + 11),
        (ef21.TopK(0.02), 24 * (32 + 26), 24 * 32 + 167),
        # 77 groups: 45 of sixteen, 32 of fifteen. Five runs of 240.
        (ef21.BlockTopK(), 77 * 32 + 77 * 4 + 4, 77 * 32 + 306),
        (ef21.BlockNatural(), 1200 * 4 + 5 * 16, 4689 + 5 * 16),
        (ef21.Quantize(8), 1200 * 8 + 5 * 16, 9594 + 5 * 16),
        (ef21.ScaledSign(), 1200 + 5 * 16, 1200 + 5 * 16),
    ],
    ids=repr,
)
def test_bits_are_those_counted_by_hand(compressor, paper, information):
    message = jax.eval_shape(
        compressor.compress, jax.ShapeDtypeStruct((30, 40), jnp.float32), jax.random.key(0)
    )
    assert ef21.ledger.PaperConvention()(message) == paper
    assert ef21.ledger.information_bits(message) == information
