"""From measurements to verdicts: the table of docs/en/doctor.md, line by line."""

import dataclasses

import pytest

from megatron_ru.doctor import verdicts
from megatron_ru.doctor.finding import Finding
from megatron_ru.doctor.measurements import AllReduce, Description, Measurements, Skew
from megatron_ru.doctor.nodes import Node

VERSIONS = {"python": "3.12.3", "torch": "2.13.0", "megatron-core": "0.19.2", "nccl": "2.27.3"}


def description(gpus=8, gpu="H200", loopback=False, findings=(), **versions):
    return Description(
        versions={**VERSIONS, **{name.replace("_", "-"): version for name, version in versions.items()}},
        gpus=gpus,
        gpu=gpu if gpus else "",
        loopback=loopback,
        findings=tuple(findings),
    )


def node(name, *ranks):
    return Node(name=name, host=name, ranks=ranks)


def measurements(**more):
    return Measurements(
        **{"world_size": 2, "limit": 30.0, "folder": "/data", "nodes": [node("a", 0), node("b", 1)], **more}
    )


def short(findings):
    return [(finding.subject, finding.verdict) for finding in findings]


def test_all_came():
    (finding,) = verdicts.attendance(measurements())
    assert (finding.subject, finding.verdict) == ("nodes", "ok")
    assert finding.detail == "2 of 2 ranks on 2 nodes: a, b"


def test_ranks_that_never_came_are_broken_with_their_hosts():
    found = list(verdicts.attendance(measurements(world_size=4, missing_ranks=[2, 3], missing_hosts=["c"])))
    assert short(found) == [("ranks 2, 3", "broken"), ("nodes", "broken")]
    assert found[0].detail.startswith("did not come within 30 s (nothing came from c): ")


def test_a_node_that_fell_silent_is_broken_with_what_it_did():
    found = list(verdicts.attendance(measurements(silent={"b": "round 1 of the all-reduces in pairs"})))
    assert short(found) == [("b", "broken"), ("nodes", "broken")]
    assert found[0].detail.startswith("stopped answering during round 1 of the all-reduces in pairs, 30 s were not")
    assert found[1].detail.startswith("1 of 2 ranks on 1 node: a")


def test_what_nodes_have_in_common_is_one_line():
    ops = Finding(subject="ops", verdict="slow", detail="no compiled ops")
    gpu = Finding(subject="gpu 3", verdict="broken", detail="3 uncorrected memory errors")
    well = Finding(subject="torch", verdict="ok", detail="2.13.0")
    found = verdicts.own_findings({
        "a": description(findings=[ops, well]), "b": description(findings=[ops, gpu, well]),
    })  # fmt: skip
    assert short(found) == [("all nodes: ops", "slow"), ("b: gpu 3", "broken")]


@pytest.mark.parametrize(
    ("others", "subjects"),
    [
        ([{}, {}], [("versions", "ok")]),
        ([{"torch": "2.12.0"}, {}], [("b: torch", "broken")]),
        # Two against rank 0's node.
        ([{"torch": "2.12.0"}, {"torch": "2.12.0"}], [("a: torch", "broken")]),
        ([{"deepspeed": "0.19.8"}, {}], [("b: deepspeed", "broken")]),
        ([{"nccl": "2.26.2"}, {"python": "3.12.9"}], [("c: python", "broken"), ("b: nccl", "broken")]),
        ([{"torch": "2.11.0"}, {"torch": "2.12.0"}], [("b: torch", "broken"), ("c: torch", "broken")]),
    ],
)
def test_versions(others, subjects):
    nodes = {"a": description(), "b": description(**others[0]), "c": description(**others[1])}
    assert short(verdicts.same_versions(nodes)) == subjects


def test_versions_of_two_nodes_are_compared_with_rank_0s():
    (finding,) = verdicts.same_versions({"a": description(), "b": description(torch="2.12.0")})
    assert finding.subject == "b: torch"
    assert finding.detail.startswith("2.12.0 there, 2.13.0 elsewhere: install the same torch everywhere")


@pytest.mark.parametrize(
    ("counts", "subjects"),
    [([8, 8, 8], [("gpus", "ok")]), ([8, 7, 8], [("b: gpus", "broken")]), ([0, 0, 0], [])],
)
def test_gpus(counts, subjects):
    nodes = {name: description(gpus=count) for name, count in zip("abc", counts, strict=True)}
    assert short(verdicts.same_gpus(nodes)) == subjects


def test_gpus_of_two_kinds_are_slow():
    nodes = {"a": description(), "b": description(gpu="A100"), "c": description()}
    (finding,) = verdicts.same_gpus(nodes)
    assert (finding.subject, finding.verdict) == ("b: gpus", "slow")
    assert finding.detail.startswith("A100 there and H200 elsewhere: all wait for the slowest")


@pytest.mark.parametrize(
    ("backend", "hosts", "said"),
    [("gloo", ("a", "b"), True), ("nccl", ("a", "b"), False), ("gloo", ("a", "a"), False)],
)
def test_host_name_of_the_loopback(backend, hosts, said):
    nodes = [Node(name=f"{host}{rank}", host=host, ranks=(rank,)) for rank, host in enumerate(hosts)]
    found = measurements(
        nodes=nodes, backend=backend, descriptions={item.name: description(loopback=True) for item in nodes}
    )
    lines = [finding for finding in verdicts.judge(found) if "GLOO_SOCKET_IFNAME" in finding.detail]
    assert short(lines) == ([("all nodes: name", "slow")] if said else [])


@pytest.mark.parametrize(
    ("seconds", "uncertainty", "subject", "verdict"),
    [
        (0.02, 0.001, "clocks", "ok"),
        (-0.9, 0.001, "clocks", "ok"),
        (1.5, 0.001, "b: clock", "slow"),
        # No more than 0.9 s is sure.
        (1.5, 0.6, "clocks", "ok"),
        (-299, 0.5, "b: clock", "slow"),
        (-301, 0.5, "b: clock", "broken"),
    ],
)
def test_clocks(seconds, uncertainty, subject, verdict):
    (finding,) = verdicts.clocks({"b": Skew(seconds=seconds, uncertainty_seconds=uncertainty)})
    assert (finding.subject, finding.verdict) == (subject, verdict)
    assert finding.values["skew_seconds"] == (seconds if subject == "b: clock" else abs(seconds))


def test_clock_says_which_way_it_is_off():
    (finding,) = verdicts.clocks({"b": Skew(seconds=-7.04, uncertainty_seconds=0.0)})
    assert finding.detail.startswith("7.0 s behind rank 0's node, so that ")


def test_folder_that_is_not_shared_is_broken():
    fast = Finding(subject="files", verdict="ok", detail="/data (ext4)", values={"rename_seconds": 1e-3})
    found = measurements(files={"a": fast, "b": fast}, folder_seen={"b": True})
    assert short(verdicts.files(found)) == [("a: files", "ok"), ("b: files", "ok"), ("shared folder", "ok")]
    found = dataclasses.replace(found, folder_seen={"b": False, "c": True})
    assert short(verdicts.files(found))[-1] == ("b: shared folder", "broken")


def test_a_measurement_that_failed_is_broken_with_its_reason():
    found = list(verdicts.judge(measurements(errors={("b", "measuring /data"): "no answer within 30 s"})))
    assert [finding.detail for finding in found if finding.subject == "b: measuring /data"] == [
        "no answer within 30 s: look at that host"
    ]


def pair(first, second, rate=10e9, **more):
    """Two ranks: on a ring of two every byte passes a link once."""
    size = 2**28
    return AllReduce(
        **{"nodes": (first, second), "ranks": 2, "bytes": size, "seconds": size / rate, "latency_seconds": 2e-5, **more}
    )


def test_pair_below_half_of_the_usual_rate_is_slow():
    pairs = [pair("a", "b"), pair("a", "c", 5.1e9), pair("b", "c", 4.9e9), pair("a", "d"), pair("b", "d")]
    found = list(verdicts.all_reduces(pairs, "nccl", "pair"))
    assert short(found) == [
        ("pair a - b", "ok"), ("pair a - c", "ok"), ("pair b - c", "slow"), ("pair a - d", "ok"), ("pair b - d", "ok"),
        ("nccl pairs", "slow"),
    ]  # fmt: skip
    assert found[0].detail == "nccl all-reduce of 2 ranks: 10 GB/s, latency 20 us"
    assert "4.9 GB/s, latency 20 us: below half of the usual 10 GB/s" in found[2].detail
    assert found[5].detail.startswith("usual 10 GB/s, lowest 4.9 GB/s (b - c), highest 10 GB/s (a - b)")
    assert found[2].values["bytes_per_second"] == pytest.approx(4.9e9)


def test_one_bad_host_of_three_is_not_taken_for_usual():
    pairs = [pair("a", "b"), pair("a", "c", 1e9), pair("b", "c", 1e9)]
    assert short(verdicts.all_reduces(pairs, "nccl", "pair")) == [
        ("pair a - b", "ok"), ("pair a - c", "slow"), ("pair b - c", "slow"), ("c", "slow"), ("nccl pairs", "slow"),
    ]  # fmt: skip


def test_ranks_of_a_pair_count_by_the_bytes_of_a_ring():
    (finding,) = verdicts.all_reduces([pair("a", "b", ranks=16)], "nccl", "pair")
    assert finding.values["bytes_per_second"] == pytest.approx(2 * 15 / 16 * 10e9)


def test_one_pair_is_compared_with_nothing():
    assert short(verdicts.all_reduces([pair("a", "b", 1e6)], "gloo", "pair")) == [("pair a - b", "ok")]


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        (
            {"error": "rank 1: no answer within 30 s"},
            "broken",
            "all-reduce failed (rank 1: no answer within 30 s): look",
        ),
        ({"right": False}, "broken", "gave wrong sums: leave these hosts out"),
    ],
)
def test_failing_pairs(change, verdict, words):
    found = list(verdicts.all_reduces([pair("a", "b"), pair("a", "c"), pair("b", "c", **change)], "gloo", "pair"))
    assert short(found) == [
        ("pair a - b", "ok"), ("pair a - c", "ok"), ("pair b - c", verdict), ("gloo pairs", verdict),
    ]  # fmt: skip
    assert words in found[2].detail


@pytest.mark.parametrize(("change", "verdict"), [({"error": "timeout"}, "broken"), ({"rate": 1e9}, "slow")])
def test_a_node_of_which_all_pairs_are_bad_is_named(change, verdict):
    pairs = [pair("a", "b"), pair("a", "c", **change), pair("b", "c", **change), pair("a", "d"), pair("b", "d"),
             pair("c", "d", **change)]  # fmt: skip
    found = list(verdicts.all_reduces(pairs, "gloo", "pair"))
    assert short(found)[6] == ("c", verdict)
    assert found[6].detail.startswith(f"all 3 pairs with it are {verdict} and others are not: it is this host")


def test_nobody_is_named_when_all_pairs_fail():
    pairs = [pair(first, second, error="timeout") for first, second in ("ab", "ac", "bc")]
    assert short(verdicts.all_reduces(pairs, "gloo", "pair")) == [
        ("pair a - b", "broken"), ("pair a - c", "broken"), ("pair b - c", "broken"),
    ]  # fmt: skip


def test_many_good_pairs_are_one_line():
    names = "abcdef"
    pairs = [pair(first, second) for place, first in enumerate(names) for second in names[place + 1 :]]
    pairs[3] = pair(*pairs[3].nodes, rate=1e9)
    found = list(verdicts.all_reduces(pairs, "nccl", "pair"))
    assert len(found) == 16
    assert [finding.subject for finding in found if finding.listed or not finding.good] == ["pair a - e", "nccl pairs"]


def test_report_of_two_healthy_nodes_in_order():
    fast = Finding(subject="files", verdict="ok", detail="/data (ext4)")
    found = measurements(
        descriptions={"a": description(), "b": description()},
        skews={"b": Skew(seconds=0.001, uncertainty_seconds=0.0001)},
        files={"a": fast, "b": fast},
        folder_seen={"b": True},
        backend="nccl",
        inside=[pair("a", "b")],
        pairs=[pair("a", "b")],
    )
    assert [finding.subject for finding in verdicts.judge(found)] == [
        "nodes", "versions", "gpus", "clocks", "a: files", "b: files", "shared folder", "inside a - b", "pair a - b",
    ]  # fmt: skip
