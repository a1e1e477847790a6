import pickle
import re
import struct

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms import ToTensor

from lightning_ae.data import VisionDataModule


def write_mnist(root, name="MNIST", train=30, test=10):
    """Write random bytes in the IDX format that torchvision reads."""
    (raw := root / name / "raw").mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_batches_equal_those_of_torchvision(tmp_path, name):
    write_mnist(tmp_path, name)
    data = VisionDataModule(name, tmp_path, batch_size=10, val_fraction=0)
    ((x, y),) = data.test_dataloader()
    reference = getattr(torchvision.datasets, name)(tmp_path, train=False, transform=ToTensor())
    images, labels = zip(*reference, strict=True)
    assert x.equal(torch.stack(images))
    assert y.tolist() == list(labels)
    assert y.dtype == torch.int64
    assert data.num_train_examples == 30


def test_colour_images_equal_those_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda _: None)
    (folder := tmp_path / "cifar-10-batches-py").mkdir()
    random = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        entry = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [3, 1, 4, 1]}
        (folder / name).write_bytes(pickle.dumps(entry))
    ((x, y),) = VisionDataModule("CIFAR10", tmp_path).test_dataloader()
    images, labels = zip(*torchvision.datasets.CIFAR10(tmp_path, train=False, transform=ToTensor()), strict=True)
    assert x.equal(torch.stack(images))
    assert y.tolist() == list(labels)


def test_pixels_stay_bytes_in_memory(tmp_path):
    write_mnist(tmp_path)
    loader = VisionDataModule("MNIST", tmp_path).train_dataloader()
    assert loader.tensors[0].dtype == torch.uint8
    assert next(iter(loader))[0].dtype == torch.float32


def test_flat_examples_are_the_same_pixels(tmp_path):
    write_mnist(tmp_path)
    flat = VisionDataModule("MNIST", tmp_path, flat=True)
    ((x, _),) = flat.test_dataloader()
    ((images, _),) = VisionDataModule("MNIST", tmp_path).test_dataloader()
    assert flat.in_shape == (784,)
    assert x.equal(images.flatten(1))


@pytest.mark.parametrize(("name", "shape"), [("MNIST", (1, 28, 28)), ("USPS", (1, 16, 16)), ("CIFAR100", (3, 32, 32))])
def test_in_shape_is_known_before_the_data(name, shape):
    assert VisionDataModule(name, "nowhere").in_shape == shape


@pytest.mark.parametrize("name", ["MNIST", "USPS", "CIFAR10"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"of {name} in {re.escape(str(tmp_path))}.*download=True"):
        VisionDataModule(name, tmp_path).setup()


def test_an_unknown_set_is_named():
    with pytest.raises(ValueError, match=r"dataset: expected one of MNIST, .*, got 'ImageNet'"):
        VisionDataModule("ImageNet")


def test_only_download_true_downloads(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, train, download: asked.append((train, download)))
    VisionDataModule("MNIST", tmp_path).prepare_data()
    assert asked == []
    VisionDataModule("MNIST", tmp_path, download=True).prepare_data()
    assert asked == [(True, True), (False, True)]
