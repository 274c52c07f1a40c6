"""Encoders of a history: each state knows itself and what came before, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.batches import BatchBuilder
from twotower.data.schema import ENCODERS, Feature
from twotower.errors import UserError
from twotower.kernels.sampled_softmax import sampled_softmax
from twotower.towers.config import EncoderConfig, ModelConfig, model_config
from twotower.towers.sequence import BIAS_UNIT, GAP_BOUNDS, SequenceEncoder, gap_buckets
from twotower.towers.two_tower import TwoTower

from ..conftest import EVENTS

DIM, LENGTH = 8, 6
# A few layers of fp32 at width 8, on states about as long as 1.
ATOL = 2e-6
SHAPE = EncoderConfig(layers=2, heads=2)


def encoder(
    kind: str, config: EncoderConfig = SHAPE, *, time_gaps: bool = False
) -> SequenceEncoder:
    """Return an encoder whose every parameter takes part."""
    torch.manual_seed(0)
    made = SequenceEncoder(kind, DIM, LENGTH, config, time_gaps=time_gaps).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            unit = BIAS_UNIT if name.endswith(("distance_bias", "gap_bias")) else 1
            parameter.add_(0.3 * torch.randn_like(parameter) / unit)
    return made


def lists(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    return torch.nn.functional.normalize(torch.randn(len(lengths), LENGTH, DIM), dim=-1), mask


lengths_of_lists = st.lists(st.integers(0, LENGTH), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ENCODERS)
@settings(max_examples=25, deadline=None)
@given(lengths=lengths_of_lists, place=st.integers(0, LENGTH - 1))
def test_a_state_depends_on_its_entry_and_on_no_later_one(kind, lengths, place) -> None:
    made = encoder(kind)
    entry, mask = lists(lengths)
    before = made.encode(entry, mask)
    other = entry.clone()
    # No constant, which a layer norm takes away again.
    other[:, place] = -entry[:, place]
    after = made.encode(other, mask)
    torch.testing.assert_close(after[:, :place], before[:, :place], atol=0, rtol=0)
    changed = (after - before).abs().amax(-1) > 1e-4
    there = mask[:, place]
    assert changed[there, place].all(), "an entry counts for itself"
    later = mask.clone()
    later[:, : place + 1] = False
    assert changed[later & there[:, None]].all(), "and for those after it"
    assert not changed[later & ~there[:, None]].any(), "unless it is not there"


@pytest.mark.parametrize("kind", ENCODERS)
@settings(max_examples=25, deadline=None)
@given(lengths=lengths_of_lists, data=st.data())
def test_the_vector_is_the_newest_state_wherever_the_padding_is(kind, lengths, data) -> None:
    made = encoder(kind)
    entry, mask = lists(lengths)
    state, vector = made.encode(entry, mask), made(entry, mask)
    for row, length in enumerate(lengths):
        expected = state[row, length - 1] if length else torch.zeros(DIM)
        torch.testing.assert_close(vector[row], expected, atol=0, rtol=0)
        # The same list alone, without padding; before any; and with padding that holds something.
        if length:
            alone = made(entry[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(vector[row], alone[0], atol=ATOL, rtol=0)
        shift = data.draw(st.integers(0, LENGTH - length))
        moved = torch.full((1, LENGTH, DIM), 9.0)
        moved[0, shift : shift + length] = entry[row, :length]
        moved_mask = torch.zeros(1, LENGTH, dtype=torch.bool)
        moved_mask[0, shift : shift + length] = True
        moved_vector = made(moved, moved_mask)
        torch.testing.assert_close(vector[row], moved_vector[0], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_time_of_an_entry_counts_for_itself_and_for_later_ones_alone(kind) -> None:
    made = encoder(kind, replace(SHAPE, layers=1), time_gaps=True)
    entry, mask = lists([LENGTH])
    age = torch.tensor([[90000.0, 8000.0, 700.0, 60.0, 5.0, 0.0]])
    other = age.clone()
    other[:, 2] = 7000
    changed = (made.encode(entry, mask, age) - made.encode(entry, mask, other)).abs().amax(-1)
    assert (changed[0] > 1e-4).tolist() == [False, False, True, True, True, True]
    assert not changed[0, :2].any()
    unknown = made(entry, mask, torch.full((1, LENGTH), -1.0))
    assert (made(entry, mask, age) - unknown).abs().max() > 1e-3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.just(-1.0), st.floats(0, 2e9, width=32)), min_size=2, max_size=5))
def test_gaps_fall_into_buckets_that_double(ages) -> None:
    got = gap_buckets(torch.tensor([ages]), torch.tensor(GAP_BOUNDS))[0].tolist()
    for i, newer in enumerate(ages):
        for j, older in enumerate(ages):
            gap = float(np.float32(older) - np.float32(newer))
            bucket = 1 + sum(gap >= bound for bound in GAP_BOUNDS)
            assert got[i][j] == (0 if min(older, newer) < 0 else bucket)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_same_entries_in_another_order_are_another_history(kind) -> None:
    made = encoder(kind, replace(SHAPE, layers=1))
    entry, mask = lists([4])
    swapped = entry.clone()
    swapped[:, [0, 1]] = entry[:, [1, 0]]
    assert (made(entry, mask) - made(swapped, mask)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_that_are_all_padding_have_finite_gradients(kind, autocast) -> None:
    made = encoder(kind).train()
    entry, mask = lists([0, 0, 3])
    entry[:2] = 0
    entry.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        vector = made(entry, mask)
        state = made.encode(entry, mask)
    assert torch.equal(vector[:2], torch.zeros(2, DIM))
    (vector.float().square().sum() + (state.float() * mask.unsqueeze(-1)).square().sum()).backward()
    assert entry.grad is not None
    assert not entry.grad[:2].any()
    assert entry.grad[2].isfinite().all()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part"
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", ENCODERS)
def test_autocast_to_bf16_stays_near(kind) -> None:
    made = encoder(kind)
    entry, mask = lists([2, 6])
    expected = made(entry, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = made(entry, mask)
    # Two blocks, each with a handful of roundings of 2**-9 to values of up to about 4.
    torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0)


def hstu_by_hand(made: SequenceEncoder, entry: torch.Tensor) -> torch.Tensor:
    """Zhai et al. 2024, equations 1 to 3, for one whole list (L, D)."""
    x = entry * DIM**0.5
    for block in made.blocks:
        normed = torch.nn.functional.layer_norm(
            x, (DIM,), block.entry_norm.weight, block.entry_norm.bias
        )
        u = torch.nn.functional.silu(block.gate(normed))
        q, k, v = torch.nn.functional.silu(block.query_key_value(normed)).chunk(3, -1)
        out, width = torch.zeros_like(x), DIM // block.heads
        for head in range(block.heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(len(x)):
                for j in range(i + 1):
                    score = q[i, part] @ k[j, part]
                    score = score + BIAS_UNIT * block.distance_bias[head, i - j]
                    out[i, part] += torch.nn.functional.silu(score) / LENGTH * v[j, part]
        x = x + block.joined(block.mixed_norm(out) * u)
    return made.norm(x)


def test_hstu_computes_its_equations() -> None:
    made = encoder("hstu")
    entry, mask = lists([LENGTH])
    expected = hstu_by_hand(made, entry[0])
    torch.testing.assert_close(made.encode(entry, mask)[0], expected, atol=ATOL, rtol=0)


def test_the_transformer_is_that_of_torch() -> None:
    """torch.nn.TransformerEncoder with the same weights, over positions added by hand."""
    made = encoder("transformer")
    layer = torch.nn.TransformerEncoderLayer(
        DIM, 2, 2 * DIM, dropout=0.0, activation="relu", batch_first=True, norm_first=True
    )
    peer = torch.nn.TransformerEncoder(layer, 2, norm=made.norm, enable_nested_tensor=False)
    peer.eval()
    for block, theirs in zip(made.blocks, peer.layers, strict=True):
        theirs.self_attn.in_proj_weight.data = block.query_key_value.weight.data
        theirs.self_attn.in_proj_bias.data.zero_()
        theirs.self_attn.out_proj = block.joined
        theirs.norm1, theirs.norm2 = block.attention_norm, block.layers_norm
        theirs.linear1, theirs.linear2 = block.layers[0], block.layers[2]
    entry, mask = lists([LENGTH, 3])
    place = torch.tensor([[5, 4, 3, 2, 1, 0], [2, 1, 0, 0, 0, 0]])
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    expected = peer(entry * DIM**0.5 + made.recency[place], mask=later)
    got = made.encode(entry, mask)
    torch.testing.assert_close(got[mask], expected[mask], atol=ATOL, rtol=0)


def build(data, **config) -> TwoTower:
    torch.manual_seed(0)
    rows = {n: t["rows"] for n, t in data.summary["tables"].items()}
    return TwoTower(data.config, rows, ModelConfig(dim=DIM, hidden=[16], **config))


def history(kind: str) -> Feature:
    return Feature(name="history", kind="history", table="item_id", length=3, pooling=kind)


@pytest.mark.parametrize("kind", ENCODERS)
def test_towers_with_an_encoder_learn(kind, make) -> None:
    data = make(EVENTS, query=[history(kind)])
    model = build(data, encoder=replace(SHAPE, dropout=0.0))
    batch = BatchBuilder(data).events(np.arange(10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = sampled_softmax(*model(batch)[:3], candidate_id_N=batch.item_N)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", ENCODERS)
def test_states_begin_as_long_as_embeddings(kind, make) -> None:
    data = make(EVENTS, query=[history(kind)])
    model = build(data).eval()
    seen = {}
    model.query.register_forward_pre_hook(lambda _, args: seen.update(args[0]))
    model.query_vectors(BatchBuilder(data).queries(np.arange(3)))
    length = seen["history"].norm(dim=1)
    torch.testing.assert_close(length, torch.tensor([0.0, 1.0, 1.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"layers": 0}, "model.encoder.layers must be >= 1, got 0"),
     ({"heads": 0}, "model.encoder.heads must be >= 1, got 0"),
     ({"heads": 3}, r"model.encoder.heads must divide model.dim \(64\), got 3"),
     ({"ffn_multiple": 0}, "model.encoder.ffn_multiple must be >= 1, got 0"),
     ({"dropout": 1.0}, r"model.encoder.dropout must be in \[0, 1\), got 1.0")],
)  # fmt: skip
def test_an_encoder_that_there_cannot_be_is_refused(change, words) -> None:
    with pytest.raises(UserError, match=words):
        ModelConfig(encoder=EncoderConfig(**change)).validate()


def test_a_bag_has_no_order_to_encode(make) -> None:
    tags = Feature(name="tags", kind="ids", pooling="hstu")
    with pytest.raises(UserError, match=r"'tags': pooling hstu reads a history in its order"):
        make(EVENTS, items={"item_id": ["a"], "tags": [["x"]]}, item=[tags])


def test_settings_come_back_from_their_json_form() -> None:
    from dataclasses import asdict

    config = ModelConfig(dim=32, encoder=EncoderConfig(layers=3, heads=4))
    assert model_config(asdict(config)) == config
    older = asdict(config)
    del older["encoder"]
    assert model_config(older).encoder == EncoderConfig()


@pytest.mark.parametrize("kind", ENCODERS)
def test_in_a_few_hundred_steps_of_adam_time_gaps_are_learned(kind) -> None:
    """What is older than a minute is to count as if it were not there."""
    made = encoder(kind, replace(SHAPE, layers=1), time_gaps=True)
    optimizer = torch.optim.Adam([made.gap_bias], lr=0.001)
    losses = []
    for _ in range(300):
        entry = torch.nn.functional.normalize(torch.randn(64, LENGTH, DIM), dim=-1)
        age = torch.where(torch.arange(LENGTH) < LENGTH // 2, 5000.0, 10.0).expand(64, LENGTH)
        age = age + 40 * torch.rand(64, LENGTH)
        there = torch.ones(64, LENGTH, dtype=torch.bool)
        losses.append((made(entry, there, age) - made(entry, age < 60, age)).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
