"""The contract of a code, and the code that changes nothing."""

import torch

from lightning_ae import Code, CodeOutput, Identity


def test_identity_passes_the_latent_on_free_of_charge():
    h = torch.randn(3, 2)
    code = Identity()
    assert code(h).z is h
    assert code(h).penalties == {}
    assert code.encode(h) is h
    assert code.weights() == {}
    assert list(code.parameters()) == []


class Doubled(Code):
    def forward(self, h):
        return CodeOutput(2 * h, {"length": h.square().sum(1)})


def test_a_code_of_ones_own_needs_only_a_forward():
    h = torch.tensor([[1.0, 2.0]])
    z, penalties = Doubled()(h)
    assert z.tolist() == [[2.0, 4.0]]
    assert penalties["length"].tolist() == [5.0]
    assert Doubled().encode(h).tolist() == [[2.0, 4.0]]
    assert Doubled().weights() == {}
