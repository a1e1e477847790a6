"""The networks in which faults are planted: small ones on scikit-learn's digits and on synthetic data, with knobs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

SHORT, LONG = 150, 400


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Everything that a fault can turn. ``encoder`` and ``decoder`` are body and head where nothing is encoded."""

    network: str = "mlp"
    task: str = "reconstruction"
    told: Any = None  # the report's ``latent``
    # data: both halves, then training only, then validation only
    x_scale: float = 1.0
    x_shift: float = 0.0
    feature_scale: float = 1.0  # of one input feature
    y_scale: float = 1.0
    y_shift: float = 0.0
    flat_target: bool = False  # (B,) against an output of (B, 1)
    broken: str = ""
    examples: int = 1100
    batch: int = 64
    val_scale: float = 1.0
    # network
    activation: str = "relu"
    depth: int = 1
    width: int = 64
    code: int = 16
    norm: str = ""
    norm_momentum: float = 0.1
    gain: float = 1.0  # times the default weights; 0 for biases, too
    recurrent_gain: float = 1.0
    hidden_bias: float | None = None
    code_bias: float | None = None
    output_bias: float | None = None
    output: tuple[str, ...] = ()  # activations at the end
    code_layers: tuple[str, ...] = ()  # at the end of the encoder
    read: int = 0  # latents that the decoder reads; 0 for all
    dropout_code: float = 0.0
    dropout_output: float = 0.0
    skip: bool = False
    compare: str = "output"
    log_variance_bias: float | None = None
    # loss
    loss: str = "mse"
    l1: float = 0.0
    kl: float = 1.0
    codebook_shift: float = 0.0  # from the origin; 0 starts with k-means
    # training
    lr: float = 3e-3
    optimizer: str = "adam"
    momentum: float = 0.0
    weight_decay: float = 0.0
    frozen: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()  # by the optimizer
    zero_grad: bool = True
    steps: int = SHORT


class Round(nn.Module):
    """Whole numbers, whose gradient is zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Round."""
        return x.round()


class Detach(nn.Module):
    """Cuts the graph."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers without a gradient."""
        return x.detach()


class Keep(nn.Module):
    """The first few latents; the others are multiplied by zero."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, z: Tensor) -> Tensor:
        """Mask."""
        return z * (torch.arange(z.shape[1]).view(1, -1, *[1] * (z.ndim - 2)) < self.count)


LAYERS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(1),
    "log_softmax": lambda: nn.LogSoftmax(1),
    "identity": nn.Identity,
    "round": Round,
    "detach": Detach,
}
LOSSES = {
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy,
    "bce_logits": F.binary_cross_entropy_with_logits,
    "bce_sum": lambda a, y: F.binary_cross_entropy_with_logits(a, y, reduction="sum") / len(y),
    "ce": F.cross_entropy,
    "nll": F.nll_loss,
    "onehot_mse": lambda a, y: F.mse_loss(a, F.one_hot(y, a.shape[1]).float()),
}

# -- data -----------------------------------------------------------------------------------------------------------

#: even, at least five, with a loop, prime, curved
LABELS = ((0, 2, 4, 6, 8), (5, 6, 7, 8, 9), (0, 6, 8, 9), (2, 3, 5, 7), (0, 2, 3, 5, 6, 8, 9))


def make_data(k: Knobs) -> tuple[Tensor, Tensor]:
    """All examples as they should be; the order is the same for every seed."""
    made = torch.Generator().manual_seed(0)
    if k.task == "regression":
        if k.network == "lstm":
            x = torch.randn(1700, 10, 4, generator=made)
            y = (x[:, :, 0] * 0.8 ** torch.arange(9, -1, -1)).sum(1)
        else:
            x = torch.randn(1700, 10, generator=made)
            y = (2 * x[:, 0]).sin() + x[:, 1].abs() + x[:, 2]
        return x, ((y - y.mean()) / y.std()).unsqueeze(1)
    from sklearn.datasets import load_digits

    pixels, digits = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=made)
    x, digit = (pixels.float() / 16).view(-1, 1, 8, 8)[order], digits.long()[order]
    if k.task == "reconstruction":
        return x, x
    if k.task == "classes":
        return x, digit
    marks = torch.stack([torch.isin(digit, torch.tensor(some)) for some in LABELS], 1).float()
    return x, marks[:, 1:2] if k.task == "binary" else marks


def split(k: Knobs) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation data with their faults."""
    x, y = make_data(k)
    x = x * k.x_scale + k.x_shift
    if k.feature_scale != 1:
        x = torch.cat([x[..., :-1], x[..., -1:] * k.feature_scale], -1)
    y = x if k.task == "reconstruction" else y * k.y_scale + k.y_shift if k.task == "regression" else y
    y = y.squeeze(1) if k.flat_target else y
    n = min(k.examples, 1100)
    train_x, train_y, val_x, val_y = x[:n].clone(), y[:n].clone(), x[1100:] * k.val_scale, y[1100:]
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    if k.task == "reconstruction":
        val_y = val_x
    if k.broken == "nan_input":
        train_x[::50].flatten(1)[:, 3] = math.nan
        train_y = train_x if k.task == "reconstruction" else train_y
    elif k.broken == "inf_target":
        train_y[::50] = math.inf
    elif k.broken == "constant_input":
        train_x = train_x[:1].expand_as(train_x).clone()
        train_y = train_x if k.task == "reconstruction" else train_y
    elif k.broken == "constant_target":
        train_y = train_y[:1].expand_as(train_y).clone()
    elif k.broken == "shuffled_target":
        train_y = train_y[shuffled]
    return TensorDataset(train_x, train_y), TensorDataset(val_x, val_y)


# -- networks -------------------------------------------------------------------------------------------------------


def dense(sizes: list[int], k: Knobs, last: bool) -> list[nn.Module]:
    """Linear layers, with activations between them and, if ``last``, after them."""
    layers: list[nn.Module] = []
    for i in range(1, len(sizes)):
        layers.append(nn.Linear(sizes[i - 1], sizes[i]))
        if last or i < len(sizes) - 1:
            layers += [nn.BatchNorm1d(sizes[i], momentum=k.norm_momentum)] if k.norm == "batch" else []
            layers.append(LAYERS[k.activation]())
    return layers


def convolutions(k: Knobs) -> list[nn.Module]:
    """From (1, 8, 8) to 128 numbers."""
    layers: list[nn.Module] = []
    for inside, out in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inside, out, 3, 2, 1), nn.BatchNorm2d(out, momentum=k.norm_momentum)]
        layers.append(LAYERS[k.activation]())
    return [*layers, nn.Flatten()]


def upwards(k: Knobs) -> list[nn.Module]:
    """And back, from a code."""
    return [
        *(nn.Linear(k.code, 128), LAYERS[k.activation](), nn.Unflatten(1, (32, 2, 2))),
        *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16, momentum=k.norm_momentum)),
        *(LAYERS[k.activation](), nn.ConvTranspose2d(16, 1, 4, 2, 1)),
    ]


class Recurrent(nn.Module):
    """The last state of an LSTM, or of a plain recurrent network with ReLU; rows are steps."""

    def __init__(self, inputs: int, k: Knobs) -> None:
        super().__init__()
        relu = {"nonlinearity": "relu"} if k.activation == "rnn_relu" else {}
        self.cell = (nn.RNN if relu else nn.LSTM)(inputs, k.width, batch_first=True, **relu)
        self.cell.weight_hh_l0.data *= k.recurrent_gain

    def forward(self, x: Tensor) -> Tensor:
        """From (B, T, inputs) to (B, width)."""
        return self.cell(x.flatten(0, 1).view(len(x), *x.shape[-2:]))[0][:, -1]


class Attention(nn.Module):
    """One layer of a transformer over the rows of an image; the mean over them."""

    def __init__(self, k: Knobs) -> None:
        super().__init__()
        self.embed = nn.Linear(8, k.width)
        self.place = nn.Parameter(0.1 * torch.randn(8, k.width))
        self.layer = nn.TransformerEncoderLayer(k.width, 4, 2 * k.width, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, 1, 8, 8) to (B, width)."""
        return self.layer(self.embed(x.squeeze(1)) + self.place).mean(1)


def parts(k: Knobs) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder, or body and head."""
    hidden = [k.width] * k.depth
    if k.task == "reconstruction":
        if k.network == "conv":
            return nn.Sequential(*convolutions(k), nn.Linear(128, k.code)), nn.Sequential(*upwards(k))
        encoder = [nn.Flatten(), *dense([64, *hidden, k.code], k, last=False)]
        return nn.Sequential(*encoder), nn.Sequential(
            *dense([k.code, *hidden, 64], k, last=False), nn.Unflatten(1, (1, 8, 8))
        )
    outputs = {"classes": 10, "labels": len(LABELS)}.get(k.task, 1)
    if k.network == "lstm":
        body: nn.Module = Recurrent(4 if k.task == "regression" else 8, k)
    elif k.network == "transformer":
        body = Attention(k)
    elif k.network == "conv":
        return nn.Sequential(*convolutions(k)), nn.Sequential(nn.Linear(128, outputs))
    else:
        body = nn.Sequential(nn.Flatten(), *dense([10 if k.task == "regression" else 64, *hidden], k, last=True))
    return body, nn.Sequential(nn.Linear(k.width, outputs))


# -- modules --------------------------------------------------------------------------------------------------------


class Trained(L.LightningModule):
    """The optimizer as the knobs have it."""

    knobs: Knobs

    def configure_optimizers(self):
        """Of all parameters but those that are forgotten."""
        k = self.knobs
        some = [p for name, p in self.named_parameters() if name.split(".")[0] not in k.forgotten]
        if k.optimizer == "sgd":
            return torch.optim.SGD(some, k.lr, momentum=k.momentum, weight_decay=k.weight_decay)
        kind = torch.optim.AdamW if k.optimizer == "adamw" else torch.optim.Adam
        return kind(some, k.lr, weight_decay=k.weight_decay)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer) -> None:
        """Unless it is forgotten."""
        if self.knobs.zero_grad:
            optimizer.zero_grad()


class Plain(Trained):
    """Somebody's module; nothing of the package in it."""

    def __init__(self, k: Knobs) -> None:
        super().__init__()
        self.knobs = k
        self.encoder, self.decoder = parts(k)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Output, code, and what the penalty needs."""
        z = self.encoder(x)
        out = F.dropout(self.decoder(z), self.knobs.dropout_output, self.training)
        return (out + x if self.knobs.skip else out), z

    def penalty(self, z: Tensor, *rest: Tensor) -> Tensor:
        """Of the code."""
        return self.knobs.l1 * z.abs().sum(1).mean()

    def step(self, batch: Any, name: str) -> Tensor:
        """The loss."""
        x, y = batch
        out, *code = self(x)
        latent = self.knobs.compare == "latent"  # by mistake
        loss = LOSSES[self.knobs.loss](code[0] if latent else out, y.flatten(1) if latent else y)
        if self.knobs.task == "reconstruction":
            loss = loss + self.penalty(*code)
        self.log(f"{name}_loss", loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A step."""
        return self.step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The same."""
        return self.step(batch, "val")

    def reconstruct(self, x: Tensor) -> Tensor:
        """In the units of the target."""
        out = self(x)[0]
        return out.sigmoid() if self.knobs.loss in ("bce_logits", "bce_sum") else out


class PlainVAE(Plain):
    """A VAE as in a tutorial."""

    def __init__(self, k: Knobs) -> None:
        super().__init__(k)
        body = [*self.encoder][:-1]
        self.encoder = nn.Sequential(*body)
        self.mean, self.log_variance = nn.Linear(k.width, k.code), nn.Linear(k.width, k.code)
        if k.log_variance_bias is not None:
            nn.init.constant_(self.log_variance.bias, k.log_variance_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Output, mean and log-variance; a draw only in training."""
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return self.decoder(z), mean, log_variance

    def penalty(self, z: Tensor, *rest: Tensor) -> Tensor:
        """The divergence from the prior."""
        return self.knobs.kl * 0.5 * (z.square() + rest[0].exp() - 1 - rest[0]).sum(1).mean()
