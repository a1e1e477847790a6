import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from torchvision.transforms import ToPILImage, ToTensor

from lightning_ae.data import EpochOrder, FileLoader, TensorLoader


def tensor_loader(num_examples=10, batch_size=3, *, shuffle=True, **options):
    return TensorLoader(
        [torch.arange(num_examples)[:, None]], EpochOrder(num_examples, batch_size, shuffle=shuffle, **options)
    )


def file_loader(num_examples=10, batch_size=3, *, shuffle=True, num_workers=0):
    examples = [torch.tensor([float(i)]) for i in range(num_examples)]
    return FileLoader(examples, EpochOrder(num_examples, batch_size, shuffle=shuffle), num_workers)


def with_workers(**options):
    return file_loader(num_workers=1, **options)


def listed(batches):
    return [batch.flatten().int().tolist() for batch in batches]


every_kind = pytest.mark.parametrize("make", [tensor_loader, file_loader, with_workers])


@every_kind
def test_each_plain_pass_is_a_new_epoch_of_all_examples(make):
    loader = make()
    first, second = listed(loader), listed(loader)
    assert first != second
    for epoch, batches in enumerate((first, second)):
        order = EpochOrder(10, 3, shuffle=True)
        order.set_epoch(epoch)
        assert batches == [batch.tolist() for batch in order]


@every_kind
def test_set_epoch_as_lightning_calls_it_decides_the_order(make):
    loader = make()
    expected = [listed(loader) for _ in range(3)]
    iterator = iter(loader)  # Lightning makes the iterator first
    _set_sampler_epoch(loader, 1)
    assert listed(iterator) == expected[1]
    _set_sampler_epoch(loader, 1)
    assert listed(loader) == expected[1]


@every_kind
def test_resumes_after_the_batches_handed_out(make):
    whole = make()
    expected = [listed(whole), listed(whole)]
    broken_off = make()
    iterator = iter(broken_off)
    seen = listed([next(iterator), next(iterator)])
    state = broken_off.state_dict()
    assert state == {"epoch": 0, "batch": 2}

    resumed = make()
    resumed.load_state_dict(state)
    assert seen + listed(resumed) == expected[0]
    assert listed(resumed) == expected[1]


@every_kind
def test_a_pass_broken_off_is_not_continued(make):
    loader = make(shuffle=False)
    next(iter(loader))
    assert listed(loader) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


@every_kind
def test_state_at_the_end_of_an_epoch_leads_to_the_next(make):
    loader = make()
    listed(loader)
    state = loader.state_dict()
    assert state == {"epoch": 0, "batch": 4}
    resumed = make()
    resumed.load_state_dict(state)
    assert listed(resumed) == listed(loader)


def test_another_epoch_set_after_loading_starts_at_its_first_batch():
    loader = tensor_loader()
    loader.load_state_dict({"epoch": 0, "batch": 2})
    _set_sampler_epoch(loader, 1)
    assert loader.state_dict() == {"epoch": 1, "batch": 0}
    assert len(listed(loader)) == 4


def test_lightning_sees_a_stateful_loader_without_a_sampler_to_replace():
    loader = tensor_loader()
    assert isinstance(loader, _Stateful)
    assert not isinstance(loader, torch.utils.data.DataLoader)
    assert not hasattr(loader, "sampler")
    assert not hasattr(loader, "dataset")


def test_loader_tells_what_a_prediction_writer_needs():
    loader = tensor_loader(11, 4, shuffle=True, rank=1, world_size=2, even=True)
    assert (loader.num_examples, loader.batch_size, len(loader)) == (11, 4, 2)
    for batch_idx, batch in enumerate(loader):
        assert loader.indices(batch_idx).tolist() == batch.flatten().int().tolist()


@pytest.mark.parametrize("state", [{"epoch": 1}, {"batch": 1}, {}])
def test_incomplete_state_is_an_error(state):
    with pytest.raises(ValueError, match="state_dict: expected the keys 'epoch' and 'batch', missing"):
        tensor_loader().load_state_dict(state)


def test_negative_place_is_an_error():
    with pytest.raises(ValueError, match="batch: expected a whole number >= 0, got -1"):
        tensor_loader().load_state_dict({"epoch": 0, "batch": -1})


def test_bytes_become_what_torchvision_makes_of_them():
    x = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    (batch,) = TensorLoader([x], EpochOrder(4, 4, shuffle=False))
    assert batch.equal(torch.stack([ToTensor()(ToPILImage()(image)) for image in x]))
    assert batch.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool])
def test_counts_become_float32_unscaled(dtype):
    x = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    (batch,) = TensorLoader([x], EpochOrder(2, 2, shuffle=False))
    assert batch.dtype == torch.float32
    assert batch.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_floating_dtypes_are_kept_and_other_tensors_untouched(dtype):
    x, y = torch.rand(4, 2).to(dtype), torch.arange(4, dtype=torch.uint8)
    ((batch, labels),) = TensorLoader([x, y], EpochOrder(4, 4, shuffle=False))
    assert batch.equal(x)
    assert batch.dtype == dtype
    assert labels.equal(y)
    assert labels.dtype == torch.uint8


def test_a_batch_changed_in_place_leaves_the_data_as_they_are():
    x = torch.ones(4, 2)
    for batch in TensorLoader([x], EpochOrder(4, 2, shuffle=False)):
        batch.zero_()
    assert x.equal(torch.ones(4, 2))


def test_rows_restrict_the_examples():
    x = torch.arange(6.0)
    loader = TensorLoader([x], EpochOrder(2, 2, shuffle=False), rows=torch.tensor([4, 1]))
    assert [batch.tolist() for batch in loader] == [[4.0, 1.0]]
    assert loader.indices(0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "tensors: expected at least one"),
        ([torch.zeros(3), torch.zeros(2)], "all with the same first dimension"),
        ([torch.tensor(1.0)], "all with the same first dimension"),
        ([torch.zeros(3), torch.zeros(3, device="meta")], "tensors: expected all on one device"),
        ([torch.zeros(4)], "order: expected num_examples=4, got 3"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors, message):
    with pytest.raises(ValueError, match=message):
        TensorLoader(tensors, EpochOrder(3, 1, shuffle=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_made_where_the_tensors_are():
    x = torch.arange(8, dtype=torch.uint8)
    (batch,) = TensorLoader([x.cuda()], EpochOrder(8, 8, shuffle=True))
    (expected,) = TensorLoader([x], EpochOrder(8, 8, shuffle=True))
    assert batch.is_cuda
    assert batch.cpu().equal(expected)
