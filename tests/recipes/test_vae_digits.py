"""The VAE recipe and its benchmark, each in a tiny form."""

import math
import struct

import pytest
import torch


def test_beta_trades_rate_for_distortion_and_latents_collapse(run):
    options = ("--betas", 0.3, 40, "--epochs", 12, "--hidden", 64, "--latents", 6, "--samples", 30)
    numbers = run("vae_digits", *options)
    for low, high in (("0.3", "1"), ("1", "40")):
        assert numbers[f"beta_{low}_rate"] > 1.2 * numbers[f"beta_{high}_rate"]
        assert numbers[f"beta_{low}_distortion"] < numbers[f"beta_{high}_distortion"]
    assert numbers["beta_1_active_units"] >= 5
    assert numbers["beta_40_active_units"] <= 1
    assert numbers["beta_1_bound"] < numbers["beta_40_bound"]
    for beta in ("0.3", "1", "40"):
        assert numbers[f"beta_{beta}_nll"] < numbers[f"beta_{beta}_bound"]


def test_of_each_digit_the_image_that_is_reconstructed_best_is_shown(recipe):
    class Model:
        def reconstruct(self, x):
            return x - torch.tensor([0.1, 3.0, 2.0, 0.5, 1.0])[:, None, None, None]

    x, y = torch.arange(5.0).view(5, 1, 1, 1), torch.tensor([0, 1, 1, 2, 1])
    assert recipe("vae_digits").pick(Model(), x, y, (1, 2, 0)).flatten().tolist() == [4, 3, 0]


def fake_mnist(root, count):
    """Files in MNIST's format: stripes of one of four widths."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    labels = torch.arange(count) % 4
    columns = torch.arange(28)
    images = (255 * ((columns // (2 + labels[:, None])) % 2)).to(torch.uint8)[:, None].expand(-1, 28, -1)
    for name in ("train", "t10k"):
        pixels = struct.pack(">IIII", 2051, count, 28, 28) + images.contiguous().numpy().tobytes()
        digits = struct.pack(">II", 2049, count) + labels.to(torch.uint8).numpy().tobytes()
        for kind, content in (("images-idx3", pixels), ("labels-idx1", digits)):
            (folder / f"{name}-{kind}-ubyte").write_bytes(content)


def test_the_benchmark_measures_what_it_says(run, tmp_path):
    fake_mnist(tmp_path, 512)
    options = ("--root", tmp_path, "--epochs", 20, "--hidden", 32, "--latents", 4, "--samples", 20, "--threads", 1)
    numbers = run("benchmarks/vae_mnist", *options, picture=False)
    # four pictures, equally often: nothing below ln 4 nats
    assert math.log(4) < numbers["nll"] < numbers["bound"] < 784 * math.log(2)
    assert numbers["bound"] == pytest.approx(numbers["reconstruction"] + numbers["kl"], rel=1e-5)
    assert numbers["distance_to_published"] == pytest.approx(numbers["nll"] - 89.78)
    assert 1 <= numbers["active_units"] <= 4
