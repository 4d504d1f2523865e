"""The GPU side of expert_mixture without a GPU: the sort on the host, the products in Triton's interpreter."""

import itertools
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planmill import kernels
from planmill.kernels.common import cuda
from planmill.kernels.routing.expert_mixture import _cuda
from planmill.kernels.routing.expert_mixture.cases import mixture

ROOT = Path(__file__).parents[3]
SIZES = (16, 32, 64, 128)
ON_DEVICE = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels were compiled for the device")


def draw_indices(rng: np.random.Generator, rows: int, experts: int) -> np.ndarray:
    """Uniform, skewed, all to one, or with dropped and impossible experts."""
    kind = rng.integers(0, 5)
    if kind == 0:
        return np.full(rows, rng.integers(0, experts))
    if kind == 1:
        return np.minimum(rng.geometric(0.3, rows) - 1, experts - 1)
    if kind == 2:
        return rng.choice([-1, 0, experts - 1, experts, 2**31 - 1, -(2**31)], rows)
    return rng.integers(-int(kind == 3), experts, rows)


def sorted_blocks(indices: np.ndarray, experts: int, size: int, empty: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and owners of blocks by a stable sort: an expert's rows in order; what is left of its last holds `empty`."""
    want, owners = [np.empty(0, np.int64)], []
    order = np.argsort(indices, kind="stable")
    for expert in np.unique(indices[(indices >= 0) & (indices < experts)]):
        own = order[np.searchsorted(indices[order], expert) : np.searchsorted(indices[order], expert, "right")]
        blocks = -(-len(own) // size)
        want += [own, np.full(blocks * size - len(own), empty)]
        owners += [expert] * blocks
    return np.concatenate(want), np.array(owners, np.int64)


def check_sort(indices: np.ndarray, experts: int, size: int) -> None:
    found = _cuda.sort_experts(torch.from_numpy(indices.astype(np.int32))[:, None], experts, size)
    want, owners = sorted_blocks(indices, experts, size, empty=len(indices))
    assert int(found.count[0]) == len(owners) <= found.bound
    assert found.rows.shape == (found.bound * size,)
    for got, expected in ((found.rows, want), (found.expert, owners)):
        np.testing.assert_array_equal(got.numpy()[: len(expected)], expected)
        assert (got.numpy()[len(expected) :] == -7).all(), "written past the last block"


def test_a_plan_sorts_with_operators() -> None:
    """The same blocks without the launch, down to what kernels read: they ask whether a row is below R."""
    rng = np.random.default_rng(7)
    for turn in range(120):
        rows, experts, size = int(rng.integers(1, 300)), int(rng.choice([1, 2, 8, 33, 200])), SIZES[turn % 4]
        indices = np.full(rows, -1) if turn == 0 else draw_indices(rng, rows, experts)
        with cuda.followed():
            found = _cuda.sort_experts(torch.from_numpy(indices.astype(np.int32))[:, None], experts, size)
        want, owners = sorted_blocks(indices, experts, size, _cuda.NO_ROW)
        assert int(found.count[0]) == len(owners) <= found.bound
        assert found.rows.shape == (found.bound * size,)
        assert found.rows.dtype == found.expert.dtype == found.count.dtype == torch.int32
        np.testing.assert_array_equal(found.rows.numpy()[: len(want)], want)
        np.testing.assert_array_equal(found.expert.numpy()[: len(owners)], owners)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: (x := empty(*a, **k)).fill_(torch.nan if x.is_floating_point() else -7)
    )


@pytest.mark.usefixtures("cuda_on_the_host", "poisoned")
class TestSort:
    @pytest.mark.parametrize("seed", range(4))
    def test_random_routings(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_cuda, "MAX_WARPS", 8)  # 1024 threads on a few cores would be all the time of this test
        rng = np.random.default_rng(seed)
        for turn in range(40):
            rows = int(rng.choice([1, 2, 31, 32, 33, 255, 256, 257, int(rng.integers(1, 2000))]))
            experts = int(rng.choice([1, 2, 8, 31, 32, 33, int(rng.integers(1, 301))]))
            check_sort(draw_indices(rng, rows, experts), experts, SIZES[turn % 4])

    @pytest.mark.parametrize("experts", [1, 8, 300, 2000, 8000])
    def test_many_rows(self, experts: int) -> None:
        rng = np.random.default_rng(experts)
        check_sort(rng.integers(-1, experts, 20_000), experts, 64)

    def test_every_row_dropped(self) -> None:
        check_sort(np.full(100, -1), 7, 16)

    def test_too_many_experts(self) -> None:
        with pytest.raises(ValueError, match=r"up must have at most 8192 experts on a GPU, got 8193"):
            _cuda.sort_experts(torch.zeros(3, 1, dtype=torch.int32), 8193, 16)

    def test_too_many_rows(self) -> None:
        huge = torch.zeros(1, 1, dtype=torch.int32).expand(2**31 - 1, 1)  # one number of memory
        with pytest.raises(ValueError, match=r"fewer than 2\^31 rows in whole blocks, got 2147483648"):
            _cuda.sort_experts(huge, 1, 64)


def test_no_data_race(tmp_path: Path) -> None:
    """Every thread of the block is a thread here: a missing barrier is a race that the sanitizer reports."""
    program = tmp_path / "check"
    source = Path(__file__).with_name("sort_check.cpp")
    flags = ["-O1", "-std=c++20", "-fsanitize=thread", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert "12 routings sorted" in result.stdout


def check_launch(args: tuple, dtype: torch.dtype) -> None:
    spec = kernels.ops()["expert_mixture"]
    assert spec.compare is not None
    got = spec.load(str(spec.cuda))(*args)
    atol, rtol = spec.tolerances[dtype]
    spec.compare(args, (got,), (spec.reference(*args),), max(atol, 1e-5), rtol)


@ON_DEVICE
@pytest.mark.usefixtures("cuda_on_the_host", "poisoned")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestProducts:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("gated", [True, False])
    def test_every_block_size(self, size: int, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks of one expert that are full, partly full and absent; every tile that ships, in both forms."""
        from planmill.kernels.routing.expert_mixture import _triton

        g = torch.Generator().manual_seed(size)
        dtypes = (torch.float16, torch.float32) if size in _triton.FULL else (torch.float16,)
        for dtype in dtypes:
            monkeypatch.setattr(_triton, "rows_of_block", lambda *a: size)
            check_launch(mixture(dtype, g, 67, 2, 3, 40, 72, gated=gated, bias=True, d_out=33), dtype)

    @pytest.mark.parametrize("processors", [1, 60])
    def test_splits(self, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The sum over hidden channels in parts, the last one shorter; the bias is added once."""
        from planmill.kernels.routing.expert_mixture import _triton

        monkeypatch.setattr(_triton, "processors", lambda x: processors)
        monkeypatch.setattr(_triton, "SHORTEST_RUN", 32)
        g = torch.Generator().manual_seed(1)
        for tokens, hidden in ((1, 300), (3, 129)):
            check_launch(mixture(torch.float32, g, tokens, 2, 4, 24, hidden, bias=True), torch.float32)
        splits, run = _triton.split_hidden(2, 1, 300, 64, 2 * processors)
        assert (splits - 1) * run < 300 <= splits * run
        assert (splits > 1) == (processors > 1)

    def test_impossible_experts_are_dropped(self) -> None:
        args = mixture(torch.float32, torch.Generator().manual_seed(2), 12, 2, 3, 8, 16)
        wrong, right = args[1].clone(), args[1].clone()
        wrong[::3, 0], wrong[1::3, 1], right[::3, 0], right[1::3, 1] = 3, -(2**31), -1, -1
        spec = kernels.ops()["expert_mixture"]
        got = spec.load(str(spec.cuda))(args[0], wrong, *args[2:])
        torch.testing.assert_close(got, spec.reference(args[0], right, *args[2:]), atol=1e-5, rtol=1e-5)

    def test_random(self) -> None:
        rng = np.random.default_rng(3)
        g = torch.Generator().manual_seed(3)
        for _ in range(10):
            tokens, experts, d, f = (int(n) for n in rng.integers(1, (40, 9, 90, 90)))
            options: dict[str, Any] = {
                "gated": bool(rng.integers(2)), "bias": bool(rng.integers(2)), "d_out": int(rng.integers(1, 90)),
                "weight_on_input": bool(rng.integers(2)),
                "activation": str(rng.choice(["silu", "gelu", "gelu_tanh", "relu"])),
            }  # fmt: skip
            args = mixture(torch.float32, g, tokens, int(rng.integers(1, experts + 1)), experts, d, f, **options)
            args[1][torch.rand(args[1].shape, generator=g) < rng.choice([0, 0.3])] = -1
            check_launch(args, torch.float32)


def test_splits_cover_the_hidden_channels_once() -> None:
    from planmill.kernels.routing.expert_mixture._triton import split_hidden

    for blocks, tiles, hidden, depth in itertools.product((1, 2, 100), (1, 12), (0, 1, 64, 1000, 3072), (32, 128)):
        splits, run = split_hidden(blocks, tiles, hidden, depth, 264)
        assert splits >= 1
        assert run % depth == 0
        assert (splits - 1) * run < max(hidden, 1) <= splits * run
