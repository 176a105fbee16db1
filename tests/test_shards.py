"""What FSDP2 and DDP hold beside the graphs, counted without other processes."""

import torch

from fxmem.analysis import shards
from fxmem.basics.budget import read_reserve
from fxmem.basics.sizes import storages_in


def group(elements, in_turn=True):
    """One parameter of so many elements, half of which are in this process."""
    shard, whole = torch.empty(elements // 2), torch.empty(elements)
    return shards.ShardGroup((shard,), (whole,), in_turn=in_turn, reduced=0, step=7)


def test_two_groups_in_turn_are_there_at_one_time(monkeypatch):
    groups = [group(100), group(400), group(300), group(50, in_turn=False)]
    monkeypatch.setattr(shards, "shard_groups", lambda: groups)
    input_ = torch.empty(10)
    given = {
        k: n for t in [input_, *(g.whole[0] for g in groups)] for k, n in storages_in(t).items()
    }
    assert shards.resident_bytes(given) == 4 * (10 + 50 + 400 + 300)


def test_shards_stay_and_the_largest_group_has_buffers(monkeypatch):
    groups, stranger = [group(100), group(400)], group(1000)
    monkeypatch.setattr(shards, "shard_groups", lambda: groups)
    reserve = read_reserve(0)
    found = shards.with_parallelism(reserve, [groups[0].whole[0]])
    gathering, scattering = 4 * (200 + 400), 2 * 4 * 400
    assert found.nbytes == 4 * (50 + 200) + gathering + scattering
    assert "FSDP" in found.what
    assert shards.with_parallelism(reserve, [stranger.whole[0]]) is reserve
