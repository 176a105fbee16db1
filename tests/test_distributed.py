"""Two processes over gloo: DDP and FSDP2 keep each rank's budget, and gradients are what they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo to talk over",
)


def ranks_of(folder, *programs):
    """What each rank saw: {program: seen}.  One start for several programs, since a start takes seconds."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(HERE / "data_parallel.py"), *programs, str(folder / "seen")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"seen.{rank}").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return ranks_of(
        tmp_path_factory.mktemp("quick"),
        "ddp_around_optimized",
        "ranks_that_plan_otherwise",
        "collectives_in_the_graph",
        "tensor_parallel",
        "collective_that_ends_after_a_measurement",
        "compiled_ddp",
    )


@pytest.fixture(scope="module")
def in_graphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    return ranks_of(folder, "sharded", "compiled_ddp_at_other_sizes")


def assert_kept(both):
    """Twenty steps with the wanted gradients; each rank's bytes; one plan."""
    for seen in both:
        assert seen["wrong"] == []
        assert seen["held"] <= seen["budget"]
        assert seen["held"] < seen["unchanged"]
    assert both[0]["plans"] == both[1]["plans"]


def test_ddp_around_an_optimized_module(quick):
    assert_kept([seen["ddp_around_optimized"] for seen in quick])


def test_the_first_plan_is_everybodys(quick):
    both = [seen["ranks_that_plan_otherwise"] for seen in quick]
    assert both[0]["alone"] != both[1]["alone"]
    assert both[0]["together"] == both[1]["together"]
    assert both[0]["together"] in {seen["alone"] for seen in both}
    assert not any(seen["wrong"] for seen in both)


def test_no_collective_is_called_twice(quick):
    for seen in (seen["collectives_in_the_graph"] for seen in quick):
        name = "_c10d_functional.all_reduce.default"
        assert seen["planned"] == {name: seen["eager"][name]} == {name: 2}
        assert seen["equal"]
        assert seen["kept"]


def test_tensors_made_of_tensors_are_refused(quick):
    for seen in (seen["tensor_parallel"] for seen in quick):
        assert len(seen["errors"]) == 2
        assert all("0.weight is a tensor made of other tensors" in e for e in seen["errors"])
        assert seen["beside"] == [True, 1]  # what the error says to try


def test_graphs_of_ddps_buckets_share_a_budget(quick):
    both = [seen["compiled_ddp"] for seen in quick]
    assert_kept(both)
    assert all(peak <= seen["budget"] for seen in both for peak in seen["first"])
    # One with small plans, then as planned for all graphs; the step that makes buckets anew holds no more.
    assert all(first < second == third for first, second, third in (s["first"] for s in both))
    assert len(both[0]["plans"]) == 3


def test_a_measurement_is_over_for_collectives_that_end_later(quick):
    assert [seen["collective_that_ends_after_a_measurement"] for seen in quick] == [0, 0]


@pytest.mark.slow
def test_fsdp_keeps_a_budget(in_graphs):
    both = [seen["sharded"] for seen in in_graphs]
    assert_kept(both)
    assert len(both[0]["plans"]) == 2


@pytest.mark.slow
def test_graphs_of_ddps_buckets_keep_statistics_and_serve_other_sizes(in_graphs):
    for seen in (seen["compiled_ddp_at_other_sizes"] for seen in in_graphs):
        want, got = seen["losses"]
        assert got == want
        assert len(set(want)) > 3
        assert seen["wrong"] == 0
        assert seen["graphs"] > 1
