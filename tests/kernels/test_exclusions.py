"""The words of exclusions against what they are to say, pair by pair."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import twotower.kernels.exclusions as exclusions_module
from twotower.kernels.exclusions import exclusion_words, packed, unpacked
from twotower.kernels.launch import INTERPRET

MANY = settings(
    deadline=None, max_examples=15 if INTERPRET else 60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
def test_bits_are_packed_and_unpacked(columns) -> None:
    generator = torch.Generator().manual_seed(columns)
    bits = torch.rand(5, columns, generator=generator) < 0.4
    bits[0] = True
    words = packed(bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-columns // 32))
    assert torch.equal(unpacked(words, columns), bits)


@st.composite
def exclusions(draw):
    """Candidates, and what queries exclude; many candidates are of one item."""
    b, n = draw(st.integers(1, 9)), draw(st.integers(1, 130))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    items = draw(st.sampled_from([1, 4, 200]))
    lowest = draw(st.sampled_from([-1, 0]))
    ids = torch.randint(lowest, items, (n,), generator=generator).sort().values
    options = {}
    if draw(st.booleans()):
        pairs = draw(st.integers(0, 70))
        options["taken_query_S"] = torch.randint(0, b, (pairs,), generator=generator)
        options["taken_id_S"] = torch.randint(0, items, (pairs,), generator=generator)
    if draw(st.booleans()):
        options["first_N"] = torch.randint(0, 9, (n,), generator=generator) * 2**40
        options["time_B"] = torch.randint(0, 9, (b,), generator=generator) * 2**40
    return ids, b, options


@MANY
@given(search=exclusions())
def test_the_words_say_what_does_not_count(device, search) -> None:
    check(device, *search)


def test_many_words_and_stretches_of_many(device) -> None:
    generator = torch.Generator().manual_seed(0)
    b, n = 2 * exclusions_module.QUERIES + 1, 32 * exclusions_module.WORDS + 500
    check(device, torch.randint(0, 3, (n,), generator=generator).sort().values, b, {
        "taken_query_S": torch.randint(0, b, (40,), generator=generator),
        "taken_id_S": torch.randint(0, 4, (40,), generator=generator),
        "first_N": torch.randint(0, 9, (n,), generator=generator),
        "time_B": torch.randint(0, 9, (b,), generator=generator),
    })  # fmt: skip


def check(device, ids, b, options) -> None:
    """Compare words with what is excluded pair by pair."""
    there = {name: value.to(device) for name, value in options.items()}
    words = exclusion_words(ids.to(device), b, **there).cpu()
    pairs = set()
    if "taken_id_S" in options:
        pairs = set(zip(options["taken_query_S"].tolist(), options["taken_id_S"].tolist(),
                        strict=True))  # fmt: skip
    first = options.get("first_N", torch.zeros(len(ids))).tolist()
    time = options.get("time_B", torch.zeros(b)).tolist()
    expected = [
        [
            (row, one) in pairs or first[column] > time[row]
            for column, one in enumerate(ids.tolist())
        ]
        for row in range(b)
    ]
    assert words.dtype == torch.int32
    assert words.shape == (b, -(-len(ids) // 32))
    assert unpacked(words, len(ids)).tolist() == expected
    assert torch.equal(words, packed(torch.tensor(expected))), "bits beyond the last are 0"


@pytest.mark.parametrize(("options", "message"), [
    ({"taken_id_S": torch.zeros(2, dtype=torch.int64)}, "taken_query and taken_id belong together"),
    ({"time_B": torch.zeros(3, dtype=torch.int64)}, "first and time belong together"),
    ({"taken_id_S": torch.zeros(2), "taken_query_S": torch.zeros(3)}, "taken_id must have 3"),
    ({"first_N": torch.zeros(4), "time_B": torch.zeros(3)}, "first must have 5 values, got 4"),
    ({"first_N": torch.zeros(5), "time_B": torch.zeros(4)}, "time must have 3 values, got 4"),
])  # fmt: skip
def test_what_does_not_belong_together_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        exclusion_words(torch.arange(5), 3, **options)


def test_ids_that_are_not_sorted_are_refused() -> None:
    with pytest.raises(ValueError, match="candidate_id must be sorted"):
        exclusion_words(torch.tensor([1, 0]), 3)
