"""Downstream loss recovered against networks taken apart by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_ae.metrics import loss_recovered


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def batches():
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 6, generator=draw), torch.randint(3, (50,), generator=draw)
    return list(zip(x.split(20), y.split(20), strict=True))


def each(logits, batch):
    return cross_entropy(logits, batch[1], reduction="none")


def by_hand(edit):
    model = network()
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    hidden = torch.relu(model[0](x))
    return cross_entropy(model[3](edit(hidden)), y).item()


def splice(rows):
    return 0.5 * rows + 0.1


@pytest.mark.parametrize("loss", [each, lambda logits, batch: cross_entropy(logits, batch[1])])
def test_the_three_losses_are_those_of_the_network_taken_apart(loss):
    found = loss_recovered(network().train(), "1", splice, batches(), loss)
    assert found.clean == pytest.approx(by_hand(lambda h: h), rel=1e-6)
    assert found.splice == pytest.approx(by_hand(splice), rel=1e-6)
    assert found.ablate == pytest.approx(by_hand(torch.zeros_like), rel=1e-6)
    assert found.recovered == pytest.approx((found.ablate - found.splice) / (found.ablate - found.clean))


def test_nothing_lost_is_one_and_ablation_is_zero():
    assert loss_recovered(network(), "1", lambda rows: rows.clone(), batches(), each).recovered == 1
    assert loss_recovered(network(), "1", torch.zeros_like, batches(), each).recovered == 0


def test_a_mean_can_be_what_ablates():
    mean = torch.rand(8)
    assert loss_recovered(network(), "1", splice, batches(), each, ablate=mean).ablate == pytest.approx(
        by_hand(lambda h: mean.expand_as(h)), rel=1e-6
    )
    one = [tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))]
    assert loss_recovered(network(), "1", splice, one, each, ablate="mean").ablate == pytest.approx(
        by_hand(lambda h: h.mean(0, keepdim=True).expand_as(h)), rel=1e-6
    )


class Tokens(nn.Module):
    """A block that returns a tuple, in a model with keyword arguments."""

    class Block(nn.Module):
        def forward(self, x):
            return x.tanh(), None

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(10, 4), Tokens.Block(), nn.Linear(4, 10)

    def forward(self, *, ids):
        return self.head(self.block(self.embed(ids))[0])


def test_rows_outside_the_mask_stay_as_they_are():
    model, ids = Tokens(), torch.tensor([[3, 1, 0], [5, 0, 0]])
    seen = []

    def doubled(rows):
        seen.append(rows)
        return 2 * rows

    def loss(logits, batch):
        return logits.square().sum(-1)

    found = loss_recovered(model, "block", doubled, [{"ids": ids}], loss, mask_fn=lambda batch: batch["ids"] != 0)
    hidden = model.embed(ids).tanh()
    edited = torch.where((ids != 0)[..., None], 2 * hidden, hidden)
    assert torch.equal(seen[0], hidden[ids != 0])
    assert found.splice == pytest.approx(model.head(edited).square().sum(-1).mean().item(), rel=1e-5)


def test_maps_are_spliced_place_by_place():
    model, x = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(27, 1)), torch.randn(5, 1, 4, 4)
    mixing = torch.randn(3, 3)
    found = loss_recovered(model, "0", lambda rows: rows @ mixing, [x], lambda out, batch: out.square(), feature_dim=1)
    mixed = torch.einsum("bchw,cd->bdhw", model[0](x), mixing)
    assert found.splice == pytest.approx(model[2](mixed.flatten(1)).square().mean().item(), rel=1e-5)


def test_the_model_is_as_it_was():
    model = network().train()
    loss_recovered(model, "1", splice, batches(), each)
    assert model[2].training
    assert not model[1]._forward_hooks
    with pytest.raises(ZeroDivisionError):
        loss_recovered(model, "1", lambda rows: 1 // 0, batches(), each)
    assert not model[1]._forward_hooks


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"layer: Sequential has no '9'"):
        loss_recovered(network(), "9", splice, batches(), each)
    with pytest.raises(ValueError, match=r"splice: expected rows \(20, 8\), got \(20, 7\)"):
        loss_recovered(network(), "1", lambda rows: rows[:, 1:], batches(), each)
    with pytest.raises(ValueError, match="ablate: expected 'zero', 'mean' or a vector, got 'half'"):
        loss_recovered(network(), "1", splice, batches(), each, ablate="half")
    with pytest.raises(ValueError, match="batches: expected some, got none"):
        loss_recovered(network(), "1", splice, [], each)


def test_ablation_that_costs_nothing_has_no_share():
    found = loss_recovered(network(), "1", splice, batches(), lambda out, batch: 0 * out)
    assert math.isnan(found.recovered)
    assert found[1:] == (0, 0, 0)
