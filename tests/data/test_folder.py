import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_ae.data import ImageFolderDataModule


def write(folder, count=6, size=(8, 8), first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.new("RGB", size, (number, 2 * number, 3 * number)).save(folder / f"{number:02}.png")


def reds(loader):
    return sorted(round(255 * x) for batch in loader for x in batch[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_images_below_root_are_split_into_train_and_val(tmp_path, num_workers):
    write(tmp_path / "a", 6)
    write(tmp_path / "b" / "c", 4, first=6)
    (tmp_path / "notes.txt").write_text("not an image")
    data = ImageFolderDataModule(tmp_path, image_size=8, batch_size=4, num_workers=num_workers, val_fraction=0.2)
    assert data.num_train_examples == 8
    train, val = data.train_dataloader(), data.val_dataloader()
    for _ in range(2):
        assert sorted(reds(train) + reds(val)) == list(range(10))


def test_named_folders_are_the_splits(tmp_path):
    for first, name in enumerate(("train", "val", "test")):
        write(tmp_path / name, 3, first=10 * first)
    data = ImageFolderDataModule(tmp_path, image_size=8)
    assert reds(data.train_dataloader()) == [0, 1, 2]
    assert reds(data.val_dataloader()) == [10, 11, 12]
    assert reds(data.test_dataloader()) == reds(data.predict_dataloader()) == [20, 21, 22]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_equal_those_of_pillow(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    data = ImageFolderDataModule(tmp_path, image_size=8, channels=channels, val_fraction=0)
    (batch,) = data.train_dataloader()
    expected = np.array(Image.fromarray(pixels).convert("RGB" if channels == 3 else "L"))
    assert batch.shape == (1, *data.in_shape)
    torch.testing.assert_close(batch, torch.tensor(expected).reshape(8, 8, channels).permute(2, 0, 1)[None] / 255)


def test_images_of_any_size_are_scaled_and_cut_to_the_centre(tmp_path):
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, 4:12] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.new("RGB", (3, 5), "white").save(tmp_path / "small.png")
    data = ImageFolderDataModule(tmp_path, image_size=4, val_fraction=0)
    (batch,) = data.train_dataloader()
    assert batch.shape == (2, 3, 4, 4)
    assert (batch[:, :, :, 1:3] == 1).all()


def test_the_transform_is_for_training_only(tmp_path):
    write(tmp_path, 10)
    invert = v2.Lambda(lambda x: 1 - x)
    data = ImageFolderDataModule(tmp_path, image_size=8, transform=invert, val_fraction=0.5)
    assert min(reds(data.train_dataloader())) >= 245
    assert max(reds(data.val_dataloader())) <= 10


@pytest.mark.parametrize(("content", "num_workers"), [(b"", 0), (b"nonsense", 2), (b"\x89PNG\r\n\x1a\n", 0)])
def test_a_broken_image_is_named(tmp_path, content, num_workers):
    (tmp_path / "broken.png").write_bytes(content)
    data = ImageFolderDataModule(tmp_path, image_size=8, val_fraction=0, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"could not read .*broken\.png"):
        list(data.train_dataloader())


def test_a_truncated_image_is_named(tmp_path):
    write(tmp_path, 1, size=(64, 64))
    (image := tmp_path / "00.png").write_bytes(image.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"could not read .*00\.png"):
        list(ImageFolderDataModule(tmp_path, image_size=8, val_fraction=0).train_dataloader())


def test_missing_folders_are_named(tmp_path):
    where = re.escape(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"root: expected images .* under {where}, found none"):
        ImageFolderDataModule(tmp_path, image_size=8).setup()
    with pytest.raises(FileNotFoundError, match=rf"root: expected a folder of images, found none at {where}/away"):
        ImageFolderDataModule(tmp_path / "away", image_size=8).setup()
    write(tmp_path / "test")
    with pytest.raises(FileNotFoundError, match=rf"root: expected {where}/train beside test"):
        ImageFolderDataModule(tmp_path, image_size=8).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size: expected a positive whole number, got 0"),
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
        ({"num_workers": -1}, "num_workers: expected a whole number >= 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(**{"root": "photos", "image_size": 8} | arguments)
