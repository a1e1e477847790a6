from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch

import lightning_ae
from lightning_ae.data import InMemoryDataModule, TensorDataModule
from lightning_ae.data.base import hold_out
from lightning_ae.data.tensors import as_tensors


def numbers(count=50):
    return torch.arange(float(count))[:, None]


def seen(loader):
    return sorted(torch.cat([batch.flatten() for batch in loader]).tolist())


def attach(data, rank=0, world_size=1, overfit_batches=0):
    shard = {"rank": rank, "num_replicas": world_size}
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=shard, overfit_batches=overfit_batches)
    return data


def test_held_out_examples_are_disjoint_and_seeded():
    data = TensorDataModule(numbers(), val_fraction=0.2, seed=3)
    train, val = seen(data.train_dataloader()), seen(data.val_dataloader())
    assert sorted(train + val) == list(range(50))
    assert len(val) == 10
    assert data.num_train_examples == 40
    assert seen(TensorDataModule(numbers(), val_fraction=0.2, seed=3).val_dataloader()) == val
    assert seen(TensorDataModule(numbers(), val_fraction=0.2, seed=4).val_dataloader()) != val


def test_holding_out_copies_no_example():
    x = numbers()
    data = TensorDataModule(x, val_fraction=0.2)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.tensors[0].data_ptr() == x.data_ptr()


def test_a_given_val_split_is_used_and_nothing_held_out():
    data = TensorDataModule(numbers(), val=numbers(3) + 100)
    assert seen(data.train_dataloader()) == list(range(50))
    assert seen(data.val_dataloader()) == [100, 101, 102]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"predict": numbers(2), "test": numbers(3), "val": numbers(4)}, 2),
        ({"test": numbers(3), "val": numbers(4)}, 3),
        ({"val": numbers(4)}, 4),
        ({"val_fraction": 0.1}, 5),
        ({"val_fraction": 0}, 50),
    ],
)
def test_prediction_falls_back_on_test_val_train(given, expected):
    assert TensorDataModule(numbers(), **given).predict_dataloader().num_examples == expected


def test_labels_stay_with_their_examples():
    x = numbers()
    data = TensorDataModule((x, 2 * x.flatten().long()), batch_size=7)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch, labels in loader:
            assert labels.equal(2 * batch.flatten().long())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_data(world_size):
    data = [attach(TensorDataModule(numbers(), batch_size=4), rank, world_size) for rank in range(world_size)]
    train = [list(each.train_dataloader()) for each in data]
    assert len({tuple(len(batch) for batch in batches) for batches in train}) == 1
    everything = set(seen(batch for batches in train for batch in batches))
    validated = sorted(x for each in data for x in seen(each.val_dataloader()))
    assert len(validated) == 5
    assert everything | set(validated) == set(range(50))
    assert not everything & set(validated)


def test_training_is_shuffled_unless_overfitting():
    data = TensorDataModule(numbers(), batch_size=50, val_fraction=0)
    (batch,) = data.train_dataloader()
    assert batch.flatten().tolist() != list(range(50))
    (batch,) = attach(data, overfit_batches=0.5).train_dataloader()
    assert batch.flatten().tolist() == list(range(50))


def test_drop_last_is_for_training_only():
    data = TensorDataModule(numbers(), val=numbers(5), batch_size=4, drop_last=True)
    assert [len(batch) for batch in data.train_dataloader()] == [4] * 12
    assert [len(batch) for batch in data.val_dataloader()] == [4, 1]


def test_numpy_float64_becomes_float32_and_tensors_keep_theirs():
    (array,) = as_tensors("train", np.zeros((3, 2)))
    (tensor,) = as_tensors("train", torch.zeros(3, 2, dtype=torch.float64))
    assert array.dtype == torch.float32
    assert tensor.dtype == torch.float64


def test_numpy_memory_is_shared_where_it_can_be():
    array = np.zeros((3, 2), dtype=np.uint8)
    (tensor,) = as_tensors("train", array)
    array[0, 0] = 7
    assert tensor[0, 0] == 7


@pytest.mark.parametrize("change", [lambda a: a[::-1], lambda a: np.broadcast_to(a[:1], (3, 2))])
def test_numpy_arrays_that_torch_refuses_are_copied(change):
    array = change(np.arange(6, dtype=np.float32).reshape(3, 2))
    (tensor,) = as_tensors("train", array)
    assert tensor.tolist() == array.tolist()


def test_gradients_do_not_flow_into_the_data():
    (tensor,) = as_tensors("train", torch.zeros(2, 2, requires_grad=True))
    assert not tensor.requires_grad


def test_a_subclass_only_returns_its_splits():
    class Ramp(InMemoryDataModule):
        in_shape = (1,)

        def splits(self):
            return {"train": numbers(20), "test": (numbers(3) + 50)}

    data = Ramp(batch_size=6, val_fraction=0.25)
    assert data.num_train_examples == 15
    assert len(seen(data.val_dataloader())) == 5
    assert seen(data.test_dataloader()) == [50, 51, 52]


def test_device_resident_data_move_to_the_device_of_the_trainer():
    data = TensorDataModule(numbers(), device_resident=True)
    attach(data).trainer.strategy = SimpleNamespace(root_device=torch.device("meta"))
    data.setup("fit")
    assert data.train_dataloader().tensors[0].is_meta
    data.trainer.strategy.root_device = torch.device("cpu")
    data.setup("test")
    assert not data.train_dataloader().tensors[0].is_meta
    train, val = data.train_dataloader(), data.val_dataloader()
    assert train.tensors[0].data_ptr() == val.tensors[0].data_ptr()


def test_in_shape_is_known_before_setup():
    assert TensorDataModule(torch.zeros(4, 3, 8, 8)).in_shape == (3, 8, 8)


def test_a_missing_test_split_is_named():
    with pytest.raises(ValueError, match=r"test: this TensorDataModule has no such split, only \['train', 'val'\]"):
        TensorDataModule(numbers()).test_dataloader()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"train": None},
            TypeError,
            "train: expected a tensor, a NumPy array.* or a tuple of them, got NoneType",
        ),
        ({"train": "x"}, TypeError, "train: expected a tensor"),
        ({"train": (numbers(), [1, 2])}, TypeError, "train: expected a tensor.*got list"),
        ({"train": np.array(["a", "b"])}, TypeError, "train: expected an array of a dtype that torch knows"),
        ({"train": torch.tensor(1.0)}, ValueError, "train: expected arrays of shape"),
        ({"train": ()}, ValueError, "train: expected arrays of shape"),
        ({"train": torch.zeros(0, 3)}, ValueError, "train: expected arrays of shape .* not empty"),
        ({"test": torch.zeros(3, 0)}, ValueError, "test: expected arrays of shape .* not empty"),
        ({"val": (numbers(3), torch.zeros(2))}, ValueError, "val: expected arrays with the same first dimension"),
        ({"val": torch.zeros(3, 2)}, ValueError, r"val: expected examples of shape \(1,\) as in train, got \(2,\)"),
        ({"batch_size": 0}, ValueError, "batch_size: expected a positive whole number, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size: expected a positive whole number, got 1.5 of type float"),
        ({"val_fraction": 1.0}, ValueError, r"val_fraction: expected a number in \[0, 1\), got 1.0"),
        ({"val_fraction": -0.1}, ValueError, "val_fraction: expected a number"),
        ({"val_fraction": "0.1"}, TypeError, "val_fraction: expected a number .* of type str"),
        ({"seed": -1}, ValueError, "seed: expected a whole number >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named_at_the_door(arguments, error, message):
    with pytest.raises(error, match=message):
        TensorDataModule(**{"train": numbers()} | arguments)


def test_holding_out_everything_is_an_error():
    with pytest.raises(ValueError, match=r"holding out 0\.1 of 1 examples leaves none to train on"):
        hold_out(1, 0.1, seed=0)


# -- bytes, sparse matrices and tables ---------------------------------------------------------------------------


def first(data: TensorDataModule) -> torch.Tensor:
    return next(iter(data.predict_dataloader()))


def test_bytes_are_grey_levels_in_images_and_numbers_in_rows():
    images = torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)
    assert first(TensorDataModule(images, val_fraction=0)).eq(0.2).all()
    assert first(TensorDataModule(images[:, 0], val_fraction=0)).eq(0.2).all()
    assert first(TensorDataModule(images, val_fraction=0, scale_bytes=False)).eq(51).all()
    rows = images.flatten(1)
    with pytest.warns(UserWarning, match="scale_bytes: train: bytes in rows of 4 are taken for numbers"):
        assert first(TensorDataModule(rows, val_fraction=0)).eq(51).all()
    # said, either is taken without a word
    assert first(TensorDataModule(rows, val_fraction=0, scale_bytes=True)).eq(0.2).all()
    assert first(TensorDataModule(rows, val_fraction=0, scale_bytes=False)).eq(51).all()


def test_counts_in_bytes_train_under_a_likelihood_of_counts():
    model = lightning_ae.MLPAutoencoder(4, 2, hidden=(3,), loss=lightning_ae.PoissonNLL())
    data = TensorDataModule(torch.randint(0, 9, (8, 4), dtype=torch.uint8), val_fraction=0, scale_bytes=False)
    model.check_input(first(data))


@pytest.mark.parametrize("form", ["csr_matrix", "csc_array", "coo_matrix", "tensor"])
def test_sparse_rows_are_the_dense_ones_batch_by_batch(form):
    dense = torch.poisson(torch.full((23, 7), 0.3), generator=torch.Generator().manual_seed(0))
    matrix = dense.to_sparse() if form == "tensor" else getattr(scipy.sparse, form)(dense.double().numpy())
    sparse, plain = (TensorDataModule((x, torch.arange(23)), batch_size=5, val_fraction=0.2) for x in (matrix, dense))
    assert sparse.in_shape == (7,)
    for name in ("train_dataloader", "val_dataloader", "predict_dataloader"):
        for ours, theirs in zip(getattr(sparse, name)(), getattr(plain, name)(), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
    with pytest.raises(ValueError, match=r"val: expected examples of shape \(7,\)"):
        TensorDataModule(matrix, val=dense[:, :6])


def test_entries_that_occur_twice_are_added():
    twice = scipy.sparse.coo_matrix((np.ones(2), ([0, 0], [1, 1])), (1, 3))
    assert first(TensorDataModule(twice, val_fraction=0)).tolist() == [[0, 2, 0]]


class Frame:
    """What pandas and polars have in common."""

    def __init__(self, **columns) -> None:
        self.columns, self._of = list(columns), columns

    def __getitem__(self, name):
        return Frame(**{name: self._of[name]})

    def to_numpy(self):
        return np.stack([np.asarray(column) for column in self._of.values()], 1)


def test_tables_are_their_columns():
    data = TensorDataModule(Frame(a=[1.0, 2.0], b=[3.0, 4.0]), val_fraction=0)
    assert first(data).tolist() == [[1, 3], [2, 4]]
    gaps = TensorDataModule(Frame(a=np.array([1, None], object), b=[3.0, 4.0]), val_fraction=0)
    assert torch.equal(first(gaps).nan_to_num(-1), torch.tensor([[1.0, 3.0], [-1.0, 4.0]]))
    with pytest.raises(TypeError, match=r"train: expected columns of numbers, got others in \['b'\].*encode or drop"):
        TensorDataModule(Frame(a=np.array([1, 2], object), b=np.array(["x", "y"], object)), val_fraction=0)


def test_tables_of_pandas_are_taken():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "c": pandas.array([1, None, 3], "Int64")})
    data = TensorDataModule((table, table["a"]), val_fraction=0)
    x, label = first(data)
    assert x.dtype == torch.float32
    assert x.nan_to_num(-1).tolist() == [[1, 0.5, 1], [2, 1.5, -1], [3, 2.5, 3]]
    assert label.tolist() == [1, 2, 3]
