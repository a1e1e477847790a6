"""A model whose dead, rare and always-on units are known by construction, in any precision.

All numbers in it are small multiples of 1/2, exact in bf16, and its activations stay at least 1/2 away from 0. Its
learning rate is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

#: How often each unit of the two activations fires in the 64 examples.
FIRED = {"encoder.act": [0, 64, 16, 1, 32, 0], "encoder.relu": [64, 0, 48]}
#: What the units are.
DEAD = {"encoder.act": [0, 5], "encoder.relu": [1]}
N = 64


def examples() -> Tensor:
    """64 inputs (64, 4) of 0s and 1s: every fourth, every second, none, and only the 37th."""
    i = torch.arange(N)
    return torch.stack([i % 4 == 0, i % 2 == 0, i < 0, i == 37], 1).float()


class Block(nn.Module):
    """A module and a function: ``act`` and ``relu``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.act = nn.ReLU()
        self.second = nn.Linear(6, 3)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.zero_()
                layer.bias.fill_(-0.5)
            # units: dead, always on, x0, x3, x1, dead; each gives 1/2 or nothing
            for unit, which in ((2, 0), (3, 3), (4, 1)):
                self.first.weight[unit, which] = 1.0
            self.first.bias[1] = 0.5
            # always on, dead, on unless x0
            self.second.bias[0] = 0.5
            self.second.bias[2] = 0.5
            self.second.weight[2, 2] = -2.0

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) to (B, 3)."""
        return functional.relu(self.second(self.act(self.first(x))))


class Oracle(L.LightningModule):
    """An autoencoder around the block.

    Args:
        reentrant: None for no activation checkpointing, else how.
        raises: where to raise on the batch with this number: a name and a number.
        error: what to raise.
    """

    def __init__(
        self,
        reentrant: bool | None = None,
        raises: tuple[str, int] = ("", -1),
        error: type[BaseException] = ArithmeticError,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.encoder = Block()
        self.decoder = nn.Linear(3, 4)
        self.reentrant, self.raises, self.error = reentrant, raises, error
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(4))
            self.stem.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) to (B, 4)."""
        h = self.stem(x)
        h = self.encoder(h) if self.reentrant is None else checkpoint(self.encoder, h, use_reentrant=self.reentrant)
        return self.decoder(h)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean squared error."""
        where, number = self.raises
        x = batch if isinstance(batch, Tensor) else batch[0]
        if batch_idx == number and where == "forward":
            handle = self.encoder.second.register_forward_hook(self._fail)
        loss = functional.mse_loss(self(x), x)
        if batch_idx == number and where == "forward":
            handle.remove()
        if batch_idx == number and where == "training_step":
            raise self.error("on purpose")
        if batch_idx == number and where == "backward":
            loss.register_hook(self._fail)
        return loss

    def _fail(self, *_: Any) -> None:
        raise self.error("on purpose")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD that leaves everything as it is."""
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> DataLoader[Any]:
        """The examples in order, 8 batches of 8."""
        return DataLoader(TensorDataset(examples()), batch_size=8)


class Noisy(L.LightningModule):
    """A model that learns, with dropout and batch norm: what is random or keeps statistics shows any interference."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8), nn.Tanh()
        )
        self.head = nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean squared error, with a random target."""
        (x,) = batch
        return functional.mse_loss(self.head(self.net(x + torch.randn_like(x))), x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled."""
        return DataLoader(TensorDataset(examples()), batch_size=8, shuffle=True)


class Step(L.LightningModule):
    """Any module in a plain LightningModule.

    Args:
        net: the module.
        loss: from its output to a loss; None for the mean of squares.
    """

    def __init__(self, net: nn.Module, loss: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the output."""
        y = self.net(batch[0] if isinstance(batch, (list, tuple)) else batch)
        return y.square().mean() if self.loss is None else self.loss(y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD that leaves everything as it is."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Heard:
    """A listener that keeps what it hears, by site."""

    def __init__(self) -> None:
        self.fired: dict[str, list[int]] = {}
        self.sites: dict[str, Any] = {}
        self.calls: dict[str, int] = {}
        self.examples: dict[str, int] = {}
        self.gradients: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.modules: list[str] = []

    def on_activation(self, event: Any) -> None:
        """Add up."""
        name = event.site.name
        self.sites[name] = event.site
        self.calls[name] = self.calls.get(name, 0) + 1
        self.examples[name] = self.examples.get(name, 0) + int(event.examples())
        live = event.live() if event.site.interval is not None else event.sum((event.y != 0).float())
        before = self.fired.get(name, [0] * len(live))
        self.fired[name] = [a + b for a, b in zip(before, live.tolist(), strict=True)]

    def on_gradient(self, site: Any, grad_z: Tensor, grad_y: Tensor) -> None:
        """Keep."""
        self.gradients.setdefault(site.name, []).append((grad_z, grad_y))

    def on_module(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep."""
        self.modules.append(name)

    def on_loss(self, comparison: Any) -> None:
        """Nothing."""

    def on_entry(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Nothing."""

    def on_pattern(self, pattern: Any) -> None:
        """Nothing."""


def traces() -> list[str]:
    """What is attached to torch now, process-wide."""
    from torch._dynamo import eval_frame
    from torch.nn.modules import module

    found = []
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"):
        found += [name] * len(getattr(module, name))
    found += ["_global_forward_hooks_always_called"] * len(module._global_forward_hooks_always_called)
    found += ["mode"] * torch._C._len_torch_function_stack()
    if eval_frame._stance.stance != "default":
        found.append(f"stance {eval_frame._stance.stance}")
    return found
