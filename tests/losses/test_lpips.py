"""LPIPS as a loss equals torchmetrics' functional one, and its gradient is finite."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torchmetrics.functional.image.lpips import _LPIPS

import lightning_ae as ae

BACKBONES = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_the_loss_is_that_of_torchmetrics_with_the_same_backbone(net, tmp_path):
    backbone = torchvision.models.get_model(BACKBONES[net], weights=None)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    loss = ae.LPIPSLoss(net, tmp_path / "backbone.pt", activation="identity")
    theirs = _LPIPS(net=net, pnet_rand=True)
    slices = theirs.net.slices if net == "squeeze" else theirs.net.children()
    for layers in slices:
        for name, layer in layers.named_children():
            layer.load_state_dict(backbone.features[int(name)].state_dict())
    x_hat, x = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(loss(x_hat, x), theirs(x_hat, x, normalize=True).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_is_finite_where_nothing_fires(dtype):
    loss = ae.LPIPSLoss("squeeze", activation="identity")
    params = torch.zeros(1, 1, 64, 64, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(params, torch.zeros(1, 1, 64, 64, dtype=dtype))
    value.sum().backward()
    assert value.dtype is torch.float32
    assert params.grad.isfinite().all()


def test_errors_at_the_door():
    with pytest.raises(ValueError, match="net: expected 'alex', 'squeeze' or 'vgg', got 'res'"):
        ae.LPIPSLoss("res")
    with pytest.raises(ValueError, match="weights: expected a file"):
        ae.LPIPSLoss("squeeze", "nowhere.pt")
    with pytest.raises(ValueError, match=r"expected images \(B, 1 or 3, H, W\), got \(1, 2, 64, 64\)"):
        ae.LPIPSLoss("squeeze")(torch.rand(1, 2, 64, 64), torch.rand(1, 2, 64, 64))


@pytest.mark.parametrize(("net", "smallest"), [("alex", 31), ("squeeze", 17)])
def test_the_smallest_image_has_a_distance_and_a_smaller_one_an_error(net, smallest):
    loss = ae.LPIPSLoss(net)
    x = torch.rand(1, 1, smallest, smallest)
    assert loss(torch.zeros_like(x), x).gt(0).all()
    with pytest.raises(
        ValueError, match=rf"sides of {smallest} pixels or more for this net, got \({smallest - 1}, 40\)"
    ):
        loss(*torch.rand(2, 1, 1, smallest - 1, 40))
    with pytest.raises(RuntimeError, match="too small"):  # what the network itself would say
        loss.network(*torch.rand(2, 1, 3, smallest - 1, 40))


def test_targets_outside_the_unit_interval_are_refused():
    loss = ae.LPIPSLoss("squeeze")
    loss.check(torch.rand(1, 1, 20, 20))
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 1\], got values from -1 to 1"):
        loss.check(torch.tensor([-1.0, 1.0]))
