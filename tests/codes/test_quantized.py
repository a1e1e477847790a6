"""The learned codebook: gradients, averages, k-means, expiry."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ae import VectorQuantizerCode
from lightning_ae.codes import codebook as functions
from lightning_ae.codes.ranks import Ranks


def brute_nearest(x, codebook):
    x, codebook = np.asarray(x, np.float64), np.asarray(codebook, np.float64)
    return ((x[:, None] - codebook[None]) ** 2).sum(-1).argmin(1)


def with_codebook(codebook, **options):
    codebook = torch.as_tensor(codebook)
    code = VectorQuantizerCode(*codebook.shape, kmeans=False, **{"expire": 0.0, **options}).to(codebook.dtype)
    with torch.no_grad():
        code.codebook.copy_(codebook)
    return code


def numeric_gradient(function, at, step=1e-6):
    grad = torch.zeros_like(at)
    for i in range(at.numel()):
        shift = torch.zeros_like(at).flatten()
        shift[i] = step
        shift = shift.view_as(at)
        grad.view(-1)[i] = (function(at + shift) - function(at - shift)) / (2 * step)
    return grad


# -- the code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 6), (4, 3, 5), (3, 6, 2, 4)])
def test_each_vector_of_dim_channels_is_replaced_by_the_nearest_code(shape):
    code = with_codebook(torch.randn(9, 3)).eval()
    h = torch.randn(shape)
    z, indices = code(h).z, code.indices(h)
    groups = shape[1] // 3
    assert indices.shape == (shape[0], groups, *shape[2:])
    for b in range(shape[0]):
        for g in range(groups):
            columns = h[b, 3 * g : 3 * g + 3].reshape(3, -1).T
            expected = brute_nearest(columns, code.codebook)
            assert indices[b, g].flatten().tolist() == expected.tolist()
            found = z[b, 3 * g : 3 * g + 3].reshape(3, -1).T
            assert torch.equal(found, code.codebook[torch.as_tensor(expected)])
    assert torch.equal(code.lookup(indices), z)
    assert torch.equal(code.encode(h), z)


def test_the_gradient_is_that_of_the_decoder_at_the_code():
    code = with_codebook(10 * torch.randn(5, 3, dtype=torch.float64))
    weight = torch.randn(6, 6, dtype=torch.float64)
    h = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def decoded(z):
        return torch.sin(0.1 * z @ weight).sum()

    decoded(code(h).z).backward()
    at_code = numeric_gradient(decoded, code.lookup(code.indices(h)))
    torch.testing.assert_close(h.grad, at_code, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("decay", [0.99, None])
def test_terms_have_the_gradients_of_squared_distances_with_one_end_held(decay):
    code = with_codebook(10 * torch.randn(5, 3, dtype=torch.float64), decay=decay)
    h = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    penalties = code(h).penalties
    chosen = code.lookup(code.indices(h)).detach()
    expected = numeric_gradient(lambda at: (at - chosen).square().sum(), h.detach())
    (grad,) = torch.autograd.grad(penalties["commitment"].sum(), h)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)
    assert dict(code.weights()) == {"commitment": 0.25, **({} if decay else {"codebook": 1.0})}
    if decay is None:
        used = code.indices(h)

        def held(codebook):
            return (
                (h.detach() - torch.nn.functional.embedding(used, codebook).movedim(-1, 2).flatten(1, 2)).square().sum()
            )

        # each term moves one end only
        code.zero_grad()
        h.grad = None
        code(h).penalties["commitment"].sum().backward()
        assert code.codebook.grad is None
        h.grad = None
        code(h).penalties["codebook"].sum().backward()
        assert h.grad is None
        grad = code.codebook.grad
        torch.testing.assert_close(grad, numeric_gradient(held, code.codebook.detach()), rtol=1e-6, atol=1e-6)


def test_the_commitment_is_a_sum_over_the_example_whatever_the_batch():
    code = with_codebook(torch.randn(4, 2)).eval()
    h = torch.randn(6, 2, 3, 3)
    whole = code(h).penalties["commitment"]
    assert whole.shape == (6,)
    for i in range(6):
        alone = h[i].reshape(2, -1).T.numpy()
        codes = code.codebook.numpy()[brute_nearest(alone, code.codebook)]
        assert float(whole[i]) == pytest.approx(((alone - codes) ** 2).sum(), rel=1e-5)
        torch.testing.assert_close(code(h[i : i + 1]).penalties["commitment"][0], whole[i])


def test_nearest_is_right_in_pieces_and_far_from_the_origin(monkeypatch):
    monkeypatch.setattr(functions, "_CHUNK", 100)
    x, codes = torch.randn(333, 4) + 1000, torch.randn(17, 4) + 1000
    assert functions.nearest(x, codes).tolist() == brute_nearest(x, codes).tolist()
    assert functions.nearest(x[:0], codes).shape == (0,)


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_the_order_of_rows_is_theirs_under_autocast(size):
    rows, valid = size * torch.randn(300, 2), torch.arange(300) % 3 > 0
    rows[~valid] = torch.nan
    expected = functions.in_fixed_order(rows, valid)[:200]
    assert expected.isfinite().all()
    other = torch.randperm(300)
    with torch.autocast("cpu", torch.float16):  # holds no more than 65504
        assert torch.equal(functions.in_fixed_order(rows[other], valid[other])[:200], expected)


# -- averages -------------------------------------------------------------------------------------------------


def test_the_codebook_is_the_documented_moving_average_and_unused_codes_stay():
    codes = np.random.default_rng(0).normal(size=(5, 2))
    codes[4] = 100.0
    code = with_codebook(torch.as_tensor(codes), decay=0.8).train()
    code.managed = True
    share = np.zeros(5)
    for _ in range(12):
        h = torch.randn(6, 4, 3, dtype=torch.float64)
        code(h)
        code.after_step(Ranks())
        rows = h.reshape(6, 2, 2, 3).permute(0, 1, 3, 2).reshape(-1, 2).numpy()
        owner = brute_nearest(rows, codes)
        number = np.bincount(owner, minlength=5)
        share = 0.8 * share + 0.2 * number
        for i in range(5):
            if number[i]:
                codes[i] += 0.2 / share[i] * (rows[owner == i] - codes[i]).sum(0)
        np.testing.assert_allclose(code.codebook.numpy(), codes, rtol=1e-10)
        np.testing.assert_allclose(code.share.numpy(), share, rtol=1e-6)
    assert code.codebook[4].tolist() == [100.0, 100.0]


def test_cumulative_weights_are_sequential_k_means():
    # MacQueen 1967: the first k points are the centres, and each further point moves its centre to the running mean
    x = np.random.default_rng(1).normal(size=(60, 2))
    centres, number = x[:4].copy(), np.zeros(4)
    code = with_codebook(torch.as_tensor(centres), decay=0.0).train()
    code.managed = True
    for t, point in enumerate(x, start=1):
        owner = ((point - centres) ** 2).sum(1).argmin()
        number[owner] += 1
        centres[owner] += (point - centres[owner]) / number[owner]
        code.decay = 1 - 1 / t
        code(torch.as_tensor(point)[None])
        code.after_step(Ranks())
        np.testing.assert_allclose(code.codebook.numpy(), centres, rtol=1e-9, atol=1e-12)


def test_evaluation_and_encode_change_nothing():
    code = VectorQuantizerCode(4, 2, kmeans=False).train()
    code(torch.randn(8, 2))
    before = copy.deepcopy(code.state_dict())
    code.encode(torch.randn(8, 2))
    code.indices(torch.randn(8, 2))
    code.eval()(torch.randn(8, 2))
    for name, value in code.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), name


def test_a_step_in_which_nothing_was_seen_changes_nothing():
    code = with_codebook(torch.randn(4, 2), expire=0.5).train()
    code(torch.randn(8, 2))
    code.after_step(Ranks())
    before = {name: value.clone() for name, value in code.named_buffers()}
    code.after_step(Ranks())
    code(torch.zeros(0, 2))
    code.after_step(Ranks())
    for name, value in code.named_buffers():
        assert torch.equal(value, before[name]), name


def test_infinite_and_nan_vectors_do_not_spoil_the_codebook():
    results = []
    for spoiled in (False, True):
        code = with_codebook(torch.tensor([[0.0], [1.0], [2.0]]), expire=0.2, decay=0.5).train()
        h = torch.tensor([[0.1], [0.8], [0.9]])
        code(torch.cat([h, torch.tensor([[torch.nan], [torch.inf], [-torch.inf]])]) if spoiled else h)
        code.after_step(Ranks())
        results.append(code)
    assert torch.equal(results[0].codebook, results[1].codebook)
    assert torch.equal(results[0].share, results[1].share)


# -- accumulation, ranks --------------------------------------------------------------------------------------


class Together(Ranks):
    """What the others have, put beside what this rank has."""

    def __init__(self, codes):
        self.codes = codes
        self.world_size = len(codes)

    def sum(self, tensor):
        return sum(torch.cat([code.counts[:, None], code.sums], 1) for code in self.codes)

    def gather(self, tensor):
        if tensor.shape == self.codes[0].codebook.shape:  # k-means, which all have done alike
            return tensor.expand(self.world_size, -1, -1)
        parts = []
        for code in self.codes:
            rows = code.recent[: tensor.shape[0]]
            valid = torch.arange(len(rows)) < code.recent_seen
            parts.append(torch.cat([rows, valid[:, None].float()], 1))
        return torch.stack(parts)


def batches(kmeans):
    code = VectorQuantizerCode(12, 3, kmeans=kmeans, expire=0.3, decay=0.9).train()
    return code, torch.randn(15, 128, 3) * torch.linspace(1, 2, 15)[:, None, None]


@pytest.mark.parametrize("kmeans", [True, False])
def test_four_small_batches_make_the_codebook_of_one_large(kmeans):
    one, x = batches(kmeans)
    four = copy.deepcopy(one)
    one.managed = four.managed = True
    for batch in x:
        one(batch)
        one.after_step(Ranks())
        for part in batch.flip(0).split(32):
            four(part)
        four.after_step(Ranks())
    assert int(one.moved) > 0
    assert int(one.moved) == int(four.moved)
    torch.testing.assert_close(four.codebook, one.codebook, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(four.share, one.share)


@pytest.mark.parametrize("kmeans", [True, False])
def test_two_ranks_make_the_codebook_of_one(kmeans):
    one, x = batches(kmeans)
    codes = [copy.deepcopy(one), copy.deepcopy(one)]
    for code in (one, *codes):
        code.managed = True
    for batch in x:
        one(batch)
        one.after_step(Ranks())
        for i, code in enumerate(codes):
            code(batch[i::2])
        before = [copy.deepcopy(code) for code in codes]
        for code in codes:
            code.after_step(Together(before))
        assert torch.equal(codes[0].codebook, codes[1].codebook)
        assert torch.equal(codes[0].pool, codes[1].pool)
    assert int(one.moved) > 0
    torch.testing.assert_close(codes[0].codebook, one.codebook, rtol=1e-4, atol=1e-5)


def test_ranks_start_with_the_same_codebook_where_their_sums_are_rounded_otherwise():
    class Second(Ranks):
        rank, world_size = 1, 2

        def gather(self, tensor):
            if tensor.shape == (4, 3):  # centres
                return torch.stack([first, tensor])
            return torch.stack([tensor, tensor])

    code = VectorQuantizerCode(4, 3, decay=None).train()
    code.managed = True
    code(torch.randn(20, 3))
    alone = copy.deepcopy(code)
    alone.after_step(Ranks())
    first = alone.codebook.detach() * (1 + 1e-6)
    assert not torch.equal(first, alone.codebook)
    code.after_step(Second())
    assert torch.equal(code.codebook, first)


# -- the start ------------------------------------------------------------------------------------------------


def clusters(k, n, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(k, dim, generator=generator)
    x = centres[torch.arange(n) % k] + 0.1 * torch.randn(n, dim, generator=generator)
    return x[torch.randperm(n, generator=generator)]


def inertia(x, centres):
    x, centres = np.asarray(x), np.asarray(centres)
    return ((x - centres[brute_nearest(x, centres)]) ** 2).sum()


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_what_scikit_learn_finds(seed):
    x = clusters(12, 500, seed=seed)
    reference = KMeans(12, n_init=10, random_state=seed).fit(x.numpy())
    assert inertia(x, functions.kmeans(x, 12)) == pytest.approx(reference.inertia_, rel=1e-4)
    # without clusters many optima are about as good
    cloud = torch.randn(600, 4, generator=torch.Generator().manual_seed(seed))
    reference = KMeans(20, n_init=1, random_state=seed).fit(cloud.numpy())
    assert inertia(cloud, functions.kmeans(cloud, 20)) < 1.05 * reference.inertia_


def test_k_means_of_few_distinct_rows_is_finite():
    x = torch.tensor([[1.0], [2.0]]).repeat(10, 1)
    assert functions.kmeans(x, 6).unique().tolist() == [1.0, 2.0]


def test_h_passes_free_of_charge_until_there_are_as_many_vectors_as_codes():
    x = clusters(8, 40, dim=2)
    code = VectorQuantizerCode(8, 2, decay=None).train()
    with pytest.raises(RuntimeError, match="no codebook yet"):
        code.indices(x)
    for batch in x.split(5)[:2]:
        output = code(batch)
        assert torch.equal(output.z, batch)
        assert output.penalties["commitment"].tolist() == output.penalties["codebook"].tolist() == [0.0] * 5
        # DDP waits for a gradient of each parameter
        assert not torch.autograd.grad(output.penalties["codebook"].sum(), code.codebook)[0].any()
        assert code.statistics(batch) == {}
    code.eval()(x)
    assert not code.started
    output = code.train()(x[10:15])
    assert code.started
    # ten vectors, eight codes: k-means of these ten
    reference = KMeans(8, n_init=20, random_state=0).fit(x[:10].numpy())
    assert inertia(x[:10], code.codebook.detach()) == pytest.approx(reference.inertia_, rel=1e-3)
    assert float(output.penalties["commitment"].detach().sum()) > 0
    # they count as the first step of the averages
    number = np.bincount(brute_nearest(x[:10], code.codebook.detach()), minlength=8)
    np.testing.assert_allclose(code.share.numpy(), 0.01 * number, rtol=1e-5)


def test_the_start_does_not_depend_on_the_order_or_on_random_numbers():
    x, codebooks = torch.randn(300, 3), []
    for seed in (1, 2):
        code = VectorQuantizerCode(16, 3).train()
        torch.manual_seed(seed)
        code(x[torch.randperm(300)])
        state = torch.get_rng_state()
        code.after_step(Ranks())
        assert torch.equal(torch.get_rng_state(), state)
        codebooks.append(code.codebook)
    torch.testing.assert_close(codebooks[0], codebooks[1])


def test_the_codebook_comes_from_all_parts_of_a_batch_too_large_to_remember():
    code = VectorQuantizerCode(4, 1).train()
    h = torch.tensor([-30.0, -10.0, 10.0, 30.0])[:, None].repeat_interleave(2048, 0)
    code(h)
    code.after_step(Ranks())
    assert code.codebook.flatten().sort().values.tolist() == [-30.0, -10.0, 10.0, 30.0]


# -- expiry ---------------------------------------------------------------------------------------------------


def test_codes_below_the_share_move_onto_recent_vectors_and_the_others_stay():
    code = with_codebook(torch.tensor([[0.0], [1.0], [50.0], [60.0]]), expire=0.2, decay=0.5).train()
    plain = with_codebook(code.codebook, decay=0.5).train()
    h = torch.tensor([0.02, 0.05, 0.98, 1.04, 1.1, 48.0] + [0.0] * 30)[:, None]
    for each in (code, plain):
        each(h)
        each.after_step(Ranks())
    # N = 0.5 * [32, 3, 1, 0]; a fifth of the even share is 0.9
    assert plain.share.tolist() == [16.0, 1.5, 0.5, 0.0]
    assert torch.equal(code.codebook[:2], plain.codebook[:2])
    moved = code.codebook[2:].flatten().tolist()
    assert all(value in h.flatten().tolist() for value in moved)
    assert code.share.tolist() == [16.0, 1.5, 4.5, 4.5]
    assert int(code.moved) == 2


def test_moved_codes_go_to_different_vectors():
    code = with_codebook(torch.full((64, 2), 1e3) + torch.arange(64)[:, None], expire=0.1).train()
    x = torch.randn(256, 2)
    code(x)
    code.after_step(Ranks())
    assert int(code.moved) == 63
    copied = code.codebook[(code.codebook[:, None] == x).all(2).any(1)]
    assert len(copied.unique(dim=0)) == 63


def test_no_more_codes_move_than_vectors_are_known():
    code = with_codebook(torch.full((64, 2), 1e3) + torch.arange(64)[:, None], expire=0.1).train()
    for known in (3, 6):
        before = int(code.moved)
        code(torch.randn(3, 2))
        code.after_step(Ranks())
        assert int(code.moved) - before == known


@pytest.mark.parametrize("decay", [0.99, None])
def test_expiry_brings_all_codes_into_use(decay):
    used = {}
    for expire in (0.0, 0.1):
        # all but one start where no vector comes
        codebook = torch.full((32, 2), 100.0)
        codebook[0] = 0.0
        code = with_codebook(codebook, expire=expire, decay=decay).train()
        for _ in range(20):
            code(torch.randn(256, 2))
        indices = code.eval().indices(torch.randn(4096, 2))
        used[expire] = len(indices.unique())
    assert used == {0.0: 1, 0.1: 32}


class Operations(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decay", [0.99, None])
def test_nothing_waits_for_the_device_once_there_is_a_codebook(decay):
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "item"}
    code = VectorQuantizerCode(8, 2, decay=decay).train()
    h = torch.randn(20, 4, 3, requires_grad=True)
    with Operations() as start:
        code(h)
        code.after_step(Ranks())
    assert "_local_scalar_dense" in start.names
    with Operations() as training:
        for _ in range(3):
            z, penalties = code(h)
            (z.sum() + penalties["commitment"].sum()).backward()
    assert {"argmin", "index_add_", "sort"} & training.names
    assert not waits & training.names


# -- precision, copies, errors --------------------------------------------------------------------------------


def test_the_search_and_the_terms_are_in_single_precision_under_autocast():
    code = with_codebook(torch.randn(512, 8)).train()
    h = torch.randn(2000, 8)
    with torch.autocast("cpu", torch.bfloat16):
        z, penalties = code(h)
        indices = code.indices(h)
    assert penalties["commitment"].dtype == z.dtype == torch.float32
    assert indices.flatten().tolist() == brute_nearest(h, code.codebook).tolist()
    assert torch.equal(z, code.codebook[indices[:, 0]])
    half = h.to(torch.bfloat16)
    assert code(half).z.dtype == torch.bfloat16


def test_averages_are_single_precision_in_a_bfloat16_model():
    code = with_codebook(torch.zeros(1, 1), decay=0.999).to(torch.bfloat16).train()
    h = torch.ones(4, 1, dtype=torch.bfloat16)
    code(h)
    for _ in range(20):
        code(h * 3)
    assert code.codebook.dtype == torch.float32
    share = mean = 0.0
    for value in [1.0] + [3.0] * 19:
        share = 0.999 * share + 0.001 * 4
        mean += 0.001 * 4 * (value - mean) / share
    assert float(code.codebook) == pytest.approx(mean, rel=1e-5)


def test_copies_and_pickles_go_on_alike():
    code = VectorQuantizerCode(6, 2).train()
    code(torch.randn(20, 2))
    others = [copy.deepcopy(code), pickle.loads(pickle.dumps(code))]
    loaded = VectorQuantizerCode(6, 2)
    loaded.load_state_dict(code.state_dict())
    others.append(loaded.train())
    for batch in torch.randn(5, 20, 2):
        for each in (code, *others):
            each(batch)
    assert code.started
    for each in others:
        assert torch.equal(each.codebook, code.codebook)


def test_settings_are_kept_with_the_weights():
    code = VectorQuantizerCode(3, 2, kmeans=False)
    code.commitment, code.decay, code.expire = 2.0, 0.5, 0.0
    other = VectorQuantizerCode(3, 2)
    other.load_state_dict(code.state_dict())
    assert (other.commitment, other.decay, other.expire, other.started) == (2.0, 0.5, 0.0, True)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_codes": 0}, "num_codes"),
        ({"dim": -1}, "dim"),
        ({"commitment": -1.0}, "commitment"),
        ({"decay": 1.0}, "decay"),
        ({"expire": 1.0}, "expire"),
        ({"expire": -0.1}, "expire"),
    ],
)
def test_numbers_out_of_range_are_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        VectorQuantizerCode(**{"num_codes": 4, "dim": 2, **options})


def test_sizes_that_do_not_fit_are_refused():
    code = VectorQuantizerCode(4, 3, kmeans=False)
    for shape in ((2, 4), (5,), (2, 0)):
        with pytest.raises(ValueError, match=r"^h: expected \(B, g \* 3"):
            code(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^code: expected a latent"):
        code.h_shape((4, 2, 2))
    assert code.h_shape((6, 2, 2)) == (6, 2, 2)
    for indices in (torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"^indices: expected whole numbers"):
            code.lookup(indices)


def test_a_codebook_that_learns_by_gradient_refuses_to_be_sharded():
    class Parts(Ranks):
        world_size, sharded = 2, True

        def sum(self, tensor):
            return 2 * tensor

        def gather(self, tensor):
            return torch.stack([tensor, tensor])

    averaged = VectorQuantizerCode(4, 3).train()
    averaged.managed = True
    averaged(torch.randn(20, 3))
    averaged.after_step(Parts())
    assert averaged.started
    with pytest.raises(ValueError, match=r"decay: .* needs whole parameters .* moving averages \(decay=0.99\)"):
        VectorQuantizerCode(4, 3, decay=None).after_step(Parts())
