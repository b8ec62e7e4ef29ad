"""From measurements over several nodes to findings: pure functions, a table of which is in docs/en/doctor.md."""

import collections
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from megatron_ru.doctor.all_reduce import bus_bandwidth
from megatron_ru.doctor.finding import Finding
from megatron_ru.doctor.measurements import AllReduce, Description, Measurements, Skew

# Munge and Kerberos refuse what is five minutes off; from a second on the times of files and logs mislead.
_BROKEN_SKEW, _SLOW_SKEW = 300.0, 1.0
# Of the usual rate.
_SLOW_SHARE = 0.5
# So many pairs are shown one by one.
_LISTED_PAIRS = 10


def judge(found: Measurements) -> Iterator[Finding]:
    """The report, in the order in which one thing depends on another."""
    yield from attendance(found)
    yield from own_findings(found.descriptions)
    yield from same_versions(found.descriptions)
    yield from same_gpus(found.descriptions)
    if found.backend == "gloo" and len({node.host for node in found.nodes}) > 1:
        yield from host_names(found.descriptions)
    yield from clocks(found.skews)
    yield from files(found)
    for (node, what), why in found.errors.items():
        yield Finding(subject=f"{node}: {what}", verdict="broken", detail=f"{why}: look at that host")
    yield from all_reduces(found.inside, found.backend, "inside")
    yield from all_reduces(found.pairs, found.backend, "pair")


def attendance(found: Measurements) -> Iterator[Finding]:
    """Who came and who stayed; a node that stopped answering is named with what it was doing."""
    if found.missing_ranks:
        ranks = ", ".join(map(str, found.missing_ranks))
        hosts = f" (nothing came from {', '.join(found.missing_hosts)})" if found.missing_hosts else ""
        detail = (
            f"did not come within {found.limit:.0f} s{hosts}: look whether the launcher could start them there and "
        )
        detail += "what they wrote, and whether their host reaches rank 0"
        yield Finding(subject=f"ranks {ranks}", verdict="broken", detail=detail)
    for node, what in found.silent.items():
        detail = (
            f"stopped answering during {what}, {found.limit:.0f} s were not enough: look for processes in state T or "
        )
        detail += "D there, at the network and at dmesg, or leave the host out; its other measurements are missing"
        yield Finding(subject=node, verdict="broken", detail=detail)
    here = [node for node in found.nodes if node.name not in found.silent]
    ranks_here = sum(len(node.ranks) for node in here)
    verdict = "ok" if ranks_here == found.world_size else "broken"
    names = ", ".join(node.name for node in here[:8]) + (", …" if len(here) > 8 else "")
    detail = f"{ranks_here} of {found.world_size} ranks on {len(here)} {'node' if len(here) == 1 else 'nodes'}: {names}"
    yield Finding(
        subject="nodes", verdict=verdict, detail=detail if verdict == "ok" else f"{detail}; see the lines above"
    )


def own_findings(descriptions: Mapping[str, Description]) -> Iterator[Finding]:
    """What is not well on some nodes by itself, one line for what several have in common."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for node, description in descriptions.items():
        for finding in description.findings:
            if not finding.good:
                places.setdefault((finding.subject, finding.verdict, finding.detail), []).append(node)
    for (subject, verdict, detail), nodes in places.items():
        yield Finding(subject=f"{_named(nodes, descriptions)}: {subject}", verdict=verdict, detail=detail)


def same_versions(descriptions: Mapping[str, Description]) -> Iterator[Finding]:
    """Ranks that differ in what they import end in hangs and wrong sums; the majority is taken for right."""
    names = dict.fromkeys(name for description in descriptions.values() for name in description.versions)
    different = False
    for name in names:
        by_node = {node: description.versions.get(name, "none") for node, description in descriptions.items()}
        usual = _usual(by_node.values())
        places: dict[str, list[str]] = {}
        for node, version in by_node.items():
            if version != usual:
                places.setdefault(version, []).append(node)
        for version, nodes in places.items():
            different = True
            detail = (
                f"{version} there, {usual} elsewhere: install the same {name} everywhere, or start the run from one "
            )
            detail += "shared environment or image"
            yield Finding(subject=f"{', '.join(nodes)}: {name}", verdict="broken", detail=detail)
    if descriptions and not different:
        usual_versions = next(iter(descriptions.values())).versions
        known = ", ".join(f"{name} {usual_versions[name]}" for name in ("python", "torch", "megatron-core", "nccl")
                          if name in usual_versions)  # fmt: skip
        yield Finding(subject="versions", verdict="ok", detail=f"the same everywhere: {known}")


def same_gpus(descriptions: Mapping[str, Description]) -> Iterator[Finding]:
    """As many GPUs everywhere, and of one kind."""
    counts = {node: description.gpus for node, description in descriptions.items()}
    usual = _usual(counts.values())
    for node, count in counts.items():
        if count != usual:
            detail = (
                f"torch sees {count} there and {usual} elsewhere: look at nvidia-smi, at CUDA_VISIBLE_DEVICES, and at "
            )
            detail += "what the scheduler gave"
            yield Finding(subject=f"{node}: gpus", verdict="broken", detail=detail)
    kinds = {node: description.gpu for node, description in descriptions.items() if description.gpu}
    usual_kind = _usual(kinds.values())
    for node, kind in kinds.items():
        if kind != usual_kind:
            detail = f"{kind} there and {usual_kind} elsewhere: all wait for the slowest, ask for nodes of one kind"
            yield Finding(subject=f"{node}: gpus", verdict="slow", detail=detail)
    if usual and len(set(counts.values())) == 1 and len(set(kinds.values())) == 1:
        yield Finding(subject="gpus", verdict="ok", detail=f"{usual} x {usual_kind} on each node")


def host_names(descriptions: Mapping[str, Description]) -> Iterator[Finding]:
    """Gloo binds to the address that the host's name stands for."""
    nodes = [node for node, description in descriptions.items() if description.loopback]
    if nodes:
        yield Finding(
            subject=f"{_named(nodes, descriptions)}: name",
            verdict="slow",
            detail="the host's own name stands for a loopback address, to which gloo binds: export GLOO_SOCKET_IFNAME "
            "with the interface that leads to the other hosts, or correct /etc/hosts",
        )


def clocks(skews: Mapping[str, Skew]) -> Iterator[Finding]:
    """How far the clocks are apart, measured from rank 0's node."""
    wrong = False
    for node, skew in skews.items():
        off = abs(skew.seconds) - skew.uncertainty_seconds
        if off < _SLOW_SKEW:
            continue
        wrong = True
        way = "ahead of" if skew.seconds > 0 else "behind"
        what = "logins and file locks fail" if off >= _BROKEN_SKEW else "times of files and logs mislead"
        yield Finding(
            subject=f"{node}: clock",
            verdict="broken" if off >= _BROKEN_SKEW else "slow",
            detail=f"{abs(skew.seconds):.1f} s {way} rank 0's node, so that {what}: set the clock there by chrony",
            values={"skew_seconds": skew.seconds, "uncertainty_seconds": skew.uncertainty_seconds},
        )
    if skews and not wrong:
        most = max(abs(skew.seconds) for skew in skews.values())
        sure = max(skew.uncertainty_seconds for skew in skews.values())
        yield Finding(
            subject="clocks",
            verdict="ok",
            detail=f"at most {most * 1e3:.2g} ms apart, measured to {sure * 1e3:.2g} ms",
            values={"skew_seconds": most, "uncertainty_seconds": sure},
        )


def files(found: Measurements) -> Iterator[Finding]:
    """The folder on each node, and whether it is one folder."""
    for node, finding in found.files.items():
        yield Finding(
            subject=f"{node}: files", verdict=finding.verdict, detail=finding.detail, values=finding.values,
            listed=len(found.files) <= _LISTED_PAIRS,
        )  # fmt: skip
    strangers = [node for node, seen in found.folder_seen.items() if not seen]
    if strangers:
        detail = (
            f"{found.folder} is another folder there than on rank 0's node: checkpoints would be torn apart, use a "
        )
        detail += "path on the shared file system (--folder)"
        yield Finding(subject=f"{_named(strangers, found.folder_seen)}: shared folder", verdict="broken", detail=detail)
    elif found.folder_seen:
        yield Finding(subject="shared folder", verdict="ok", detail=f"{found.folder} is the same on all nodes")


def all_reduces(measured: Sequence[AllReduce], backend: str, what: str) -> Iterator[Finding]:
    """A line for each, those below half of the usual rate slow; a node whose pairs all fail or all are slow is named.

    The usual rate is the median, over the nodes, of each node's best: of three hosts one bad one makes two of the three
    pairs slow, and the median of the pairs would take that for usual.
    """
    good = [item for item in measured if item.error is None and item.right]
    rates = {item.nodes: bus_bandwidth(item.ranks, item.bytes, item.seconds) for item in good}
    usual = _usual_rate(rates)
    bad: dict[tuple[str, ...], str] = {}
    for item in measured:
        finding = _all_reduce(item, rates.get(item.nodes), usual, backend, what, listed=len(measured) <= _LISTED_PAIRS)
        if not finding.good:
            bad[item.nodes] = finding.verdict
        yield finding
    if what == "pair":
        yield from _culprits([item.nodes for item in measured], bad)
    if len(rates) > 1:
        (lowest, low), (highest, high) = (choose(rates.items(), key=lambda rate: rate[1]) for choose in (min, max))
        yield Finding(
            subject=f"{backend} {what}s",
            verdict="ok" if not bad else max(bad.values(), key=("slow", "broken").index),
            detail=f"usual {_rate(usual)}, lowest {_rate(low)} ({' - '.join(lowest)}), "
            f"highest {_rate(high)} ({' - '.join(highest)})" + ("; see the lines above" if bad else ""),
            values={
                "usual_bytes_per_second": usual,
                "lowest_bytes_per_second": low,
                "highest_bytes_per_second": high,
            },
        )


def _usual_rate(rates: Mapping[tuple[str, ...], float]) -> float:
    best: dict[str, float] = {}
    for nodes, rate in rates.items():
        for node in nodes:
            best[node] = max(rate, best.get(node, 0.0))
    return statistics.median(best.values()) if best else 0.0


def _all_reduce(item: AllReduce, rate: float | None, usual: float, backend: str, what: str, *, listed: bool) -> Finding:
    subject = f"{what} {' - '.join(item.nodes)}"
    interface = "NCCL_SOCKET_IFNAME or NCCL_IB_HCA" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    if item.error is not None:
        there = f"cables and firewall between the two, and whether {interface} names the right interface"
        here = "NVLink and the driver on that host" if backend == "nccl" else "memory and free ports on that host"
        detail = f"{backend} all-reduce failed ({item.error}): look at {there if what == 'pair' else here}"
        return Finding(subject=subject, verdict="broken", detail=detail)
    if rate is None:
        detail = f"{backend} all-reduce gave wrong sums: leave these hosts out and have memory and network cards tested"
        return Finding(subject=subject, verdict="broken", detail=detail)
    values = {"bytes_per_second": rate, "latency_seconds": item.latency_seconds, "ranks": float(item.ranks)}
    detail = f"{backend} all-reduce of {item.ranks} ranks: {_rate(rate)}, latency {item.latency_seconds * 1e6:.0f} us"
    if rate < _SLOW_SHARE * usual:
        detail += f": below half of the usual {_rate(usual)}: look at link speed, PCIe width, and {interface}"
        return Finding(subject=subject, verdict="slow", detail=detail, values=values)
    return Finding(subject=subject, verdict="ok", detail=detail, values=values, listed=listed)


def _culprits(pairs: Sequence[tuple[str, ...]], bad: Mapping[tuple[str, ...], str]) -> Iterator[Finding]:
    """Nodes of which every pair is bad while a pair without them is good."""
    for node in dict.fromkeys(node for pair in pairs for node in pair):
        own = [pair for pair in pairs if node in pair]
        others_good = any(pair not in bad for pair in pairs if node not in pair)
        if len(own) > 1 and others_good and all(pair in bad for pair in own):
            verdict = "broken" if all(bad[pair] == "broken" for pair in own) else "slow"
            detail = (
                f"all {len(own)} pairs with it are {verdict} and others are not: it is this host, leave it out and "
            )
            detail += "look at its network card and cable"
            yield Finding(subject=node, verdict=verdict, detail=detail)


def _usual[Value](values: Iterable[Value]) -> Value | None:
    """The most frequent one, of equally frequent ones the first, which is that of rank 0's node."""
    counted = collections.Counter(values)
    return counted.most_common(1)[0][0] if counted else None


def _named(nodes: Sequence[str], all_nodes: Mapping[str, object]) -> str:
    return "all nodes" if len(nodes) == len(all_nodes) > 1 else ", ".join(nodes)


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s"
