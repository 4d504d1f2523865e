"""Shards in processes of Ray against one process, bit for bit; a process that is killed; indexes of FAISS."""

import os
import signal
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from planmill.distributed import FaissIndex, ShardedBank, ShardedIndex, connect, score_mutually_in_shards
from planmill.distributed import index as index_module
from planmill.distributed import mutual as mutual_module
from planmill.distributed.blocks import Block
from planmill.distributed.cluster import Placement
from planmill.distributed.index import merge
from planmill.distributed.mutual import deal
from planmill.distributed.shard import ImageShard
from planmill.errors import PlanmillError
from planmill.kernels.neighbors import MemoryBank, find_neighbors, score_mutually


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    """One start for the module: it costs seconds."""
    ray = connect(cpus=2, store_bytes=128 << 20)
    yield ray
    ray.shutdown()


class Killer:
    """Kills the process of the first shard when calls are awaited for the n-th time by `name` of a module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, at: int) -> None:
        self.left, self.before, self.actors = at, 0, list[Any]()
        self.started, self.awaited = module.start_actors, getattr(module, name)
        monkeypatch.setattr(module, "start_actors", self.start)
        monkeypatch.setattr(module, name, self.wait)

    def start(self, ray: Any, *args: Any) -> list[Any]:
        self.actors = self.started(ray, *args)
        self.before = ray.get(self.actors[0].process.remote())
        return self.actors

    def wait(self, ray: Any, references: Sequence[Any], *timeout: Any) -> Any:
        self.left -= 1
        if self.left == 0:  # the calls have just been sent
            os.kill(self.before, signal.SIGKILL)
            found = self.awaited(ray, references, *timeout)
            assert ray.get(self.actors[0].process.remote()) != self.before
            return found
        return self.awaited(ray, references, *timeout)


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def rows_of(count: int, width: int) -> torch.Tensor:
    """Clustered rows, of which some are copies of others far away and some match nothing."""
    centres = torch.randn(20, width)
    rows = centres[torch.randint(20, (count,))] + 0.1 * torch.randn(count, width) + 5
    rows[count // 2 : count // 2 + 40] = rows[:40]
    rows[3, 1], rows[-1, 0] = torch.nan, torch.inf
    return rows


@pytest.mark.parametrize("metric", ["l2", "l2sq", "cosine", "dot"])
def test_merged_lists_are_those_of_the_whole(metric: str) -> None:
    rows = rows_of(700, 40)
    for queries, k in ((torch.cat([rows[:30], torch.randn(9, 40)]), 7), (rows[:2], 300)):
        found = []
        for first, last in ((0, 5), (5, 420), (420, 700)):
            distances, index = find_neighbors(queries, rows[first:last], k, metric)
            found.append((distances, torch.where(index < 0, -1, index.long() + first)))
        distances, index = merge(found, k, metric)
        same((distances, index.int()), find_neighbors(queries, rows, k, metric))


@pytest.mark.slow
def test_bank_and_its_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = rows_of(1500, 72).clamp(-20, 20).nan_to_num()
    bank = MemoryBank(rows, extractor="x")
    bank.save(tmp_path / "bank")
    images = torch.cat([rows[:50], torch.randn(150, 72)]).view(2, 4, 25, 72) + 0.01
    images[1, 2, 3, 4] = torch.nan
    killer = Killer(monkeypatch, index_module, "collect", at=2)  # 1: the start
    with ShardedBank.load(tmp_path / "bank", "x", shards=2) as sharded:
        assert (len(sharded), sharded.index.shards) == (1500, 2)
        same(sharded(images), bank(images))  # a process is killed in between
        assert killer.left < 0
        same(sharded.search(images, 5), bank.search(images, 5))
        for metric in ("dot", "cosine"):
            queries = images.reshape(-1, 72)
            same(sharded.index.search(queries, 9, metric), find_neighbors(queries, rows, 9, metric))
        same(
            sharded.index.search(rows, 3, exclude_self=True),
            find_neighbors(rows, rows, 3, exclude_self=True),
        )
        same(sharded(images[:0]), bank(images[:0]))
        check_bad_input(sharded, tmp_path / "bank")


def check_bad_input(bank: ShardedBank, path: Path) -> None:
    with pytest.raises(ValueError, match=r"k must be from 1 to 1500, the rows of the bank, got 1501"):
        bank.search(torch.zeros(1, 72), 1501)
    with pytest.raises(ValueError, match=r"k must be from 1 to 1024, got 1025"):
        bank.index.search(torch.zeros(1, 72), 1025)
    with pytest.raises(ValueError, match=r"queries must be \[n, 72\] like the rows, got \[1, 71\]"):
        bank.index.search(torch.zeros(1, 71), 1)
    with pytest.raises(TypeError, match=r"queries must be torch.float32 like the rows, got torch.float16"):
        bank.index.search(torch.zeros(1, 72).half(), 1)
    with pytest.raises(ValueError, match=r"exclude_self needs as many queries as rows, got 1 and 1500"):
        bank.index.search(torch.zeros(1, 72), 1, exclude_self=True)
    for at in ([0, 1500], [-1], []):
        with pytest.raises(ValueError, match=r"at must hold rows from 0 to 1499"):
            bank.index.take("rows", torch.tensor(at, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"name must be rows, or table"):
        bank.index.take("row", torch.tensor([0]))
    with pytest.raises(ValueError, match=r"P at least 1, got \[2, 0, 72\]"):
        bank(torch.zeros(2, 0, 72))
    with pytest.raises(ValueError, match=r"holds features of 'x', not of 'y'"):
        ShardedBank.load(path, "y")
    with pytest.raises(ValueError, match=r"the bank is empty"):
        ShardedBank.of(MemoryBank())
    with pytest.raises(PlanmillError, match=r"3 shards need 3 processors; the Ray cluster has 2"):
        ShardedIndex(torch.zeros(9, 2), shards=3)
    with pytest.raises(ValueError, match=r"2 sources make 2 shards, got shards=3"):
        ShardedIndex([torch.zeros(9, 2)] * 2, shards=3)


def images_of(count: int, patches: int, channels: int) -> torch.Tensor:
    """Unit rows, with copies and a row that matches nothing."""
    images = torch.nn.functional.normalize(torch.randn(count, patches, channels), dim=2)
    images[-1, :4], images[1, 7, 0] = images[0, :4], torch.nan
    return images


@pytest.mark.parametrize("radius", [None, 1.5])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.3), (0.2, 0.9), (1.0, 4.0)])
def test_minima_and_means_of_shards(low: float, high: float, radius: float | None) -> None:
    images = images_of(7, 36, 30) + 3
    for sizes in ([1, 4, 2], [2, 5], [7]):
        parts = images.split(sizes)
        starts = [sum(sizes[:s]) for s in range(len(sizes))]
        shards = [ImageShard(Block.of(part), torch.get_num_threads()) for part in parts]
        places, minima = [[] for _ in sizes], [[] for _ in sizes]  # type: ignore[var-annotated]
        for own, rows, other, columns in chain.from_iterable(deal(sizes)):
            others = None if other == own else Block.of(parts[other])
            there, back = shards[own].minima(rows, others, columns, radius, (6, 6))
            places[own].append((rows[0], starts[other] + columns[0]))
            minima[own].append(there)
            if other != own:
                places[other].append((columns[0], starts[own] + rows[0]))
                minima[other].append(back)
        scores = [
            shard.means(first, 7, low, high, place, *part).tensor()
            for shard, first, place, part in zip(shards, starts, places, minima, strict=True)
        ]
        same([torch.cat(scores)], [score_mutually(images, low, high, radius=radius, grid=(6, 6))])


@pytest.mark.parametrize("sizes", [[5], [3, 4], [1, 1], [2, 1, 3], [4, 1, 2, 3], [1, 2, 3, 4, 5], [1] * 8], ids=str)
def test_each_pair_of_images_is_dealt_once(sizes: list[int]) -> None:
    names = [[(s, i) for i in range(size)] for s, size in enumerate(sizes)]
    met = []
    for turn in deal(sizes):
        assert len({task.own for task in turn}) == len(turn) <= len(sizes)
        assert len({task.other for task in turn}) == len(turn)  # each block is read by one shard
        for own, rows, other, columns in turn:
            pairs = [(a, b) for a in names[own][slice(*rows)] for b in names[other][slice(*columns)]]
            met += [frozenset(pair) for pair in pairs if own != other or pair[0] < pair[1]]
    count = sum(sizes)
    assert len(met) == len(set(met)) == count * (count - 1) // 2


@pytest.mark.slow  # processes of their own; the arithmetic is test_minima_and_means_of_shards'
def test_mutual_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(8, 64, 200)
    killer = Killer(monkeypatch, mutual_module, "finish", at=1)
    scores = score_mutually_in_shards([lambda: images[:5], images[5:]], 0.1, 0.6)
    same([scores], [score_mutually(images, 0.1, 0.6)])
    assert killer.left < 0


@pytest.mark.slow
def test_a_bank_behind_faiss(ray: Any) -> None:
    pytest.importorskip("faiss")
    bank = MemoryBank(rows_of(3000, 32).nan_to_num(0, 5, 5))
    queries = bank.features[:200] + 0.05 * torch.randn(200, 32)
    expected = bank.search(queries, 10)
    index, once = FaissIndex("IVF32,Flat", probes=12), Placement(restarts=0)
    with ShardedBank.of(bank, shards=2, index=index, placement=once) as sharded:
        distances, found = sharded.search(queries, 10)
        _, images = sharded(queries[None])
        with pytest.raises(ValueError, match=r"^FaissIndex: made for 'l2', asked for 'dot'"):
            sharded.index.search(queries, 1, "dot")
        os.kill(ray.get(sharded.index.actors[1].process.remote()), signal.SIGKILL)
        with pytest.raises(PlanmillError, match="a shard was lost for good: The actor died"):
            sharded.search(queries, 1)
    hits = found[:, :, None] == expected[1][:, None]
    assert hits.any(2).float().mean() > 0.9
    of_same = expected[0].gather(1, hits.int().argmax(2))
    torch.testing.assert_close(distances[hits.any(2)], of_same[hits.any(2)], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(images, bank(queries[None])[1], rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("description", "metric"),
    [
        ("Flat", "l2"),
        ("Flat", "l2sq"),
        ("Flat", "cosine"),
        ("Flat", "dot"),
        ("HNSW16", "l2"),
        ("PCA24,IVF16,Flat", "l2"),
    ],
)
def test_an_index_of_faiss_in_one_shard(description: str, metric: str) -> None:
    rows = torch.randn(800, 24)
    rows[3, 1], rows[-1, 0], rows[700] = torch.nan, torch.inf, rows[5]
    queries = torch.cat([rows[5:6], torch.randn(40, 24), torch.full((1, 24), torch.nan)])
    distances, found = FaissIndex(description, metric, probes=200)(rows).search(queries, 5, metric)
    expected = find_neighbors(queries, rows, 5, metric)
    assert (found == expected[1]).float().mean() > 0.95
    assert found[0, :2].tolist() == [5, 700] or metric == "dot"
    assert found[-1].eq(-1).all()
    torch.testing.assert_close(distances, expected[0], rtol=1e-5 if description == "Flat" else 0.05, atol=1e-6)
    with pytest.raises(ValueError, match="made for"):
        FaissIndex(description, metric)(rows).search(queries, 5, "l1")
