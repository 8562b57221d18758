"""What measurements of ranks and hosts mean: ok, warn or bad. Arithmetic alone; `pretrain.doctor` measures.

    Measured, one a rank ─┐
    Needs, of the run ────┴─> judge ─> Finding, one a host and check ─> excluded: the hosts to leave out

Most limits are relative to the other ranks: the median rank shows what the cluster can do, and a rank that differs from it is
named.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median, median_high, median_low

from pretrain.chips import DATASHEETS

EVERYWHERE = "all hosts"
"""Stands for the host where what is found is nobody's in particular."""
_SEVERITY = {"ok": 0, "warn": 1, "bad": 2}


@dataclass(frozen=True)
class Measured:
    """What a rank found on its host. None: it could not be measured, or there is nothing of the kind."""

    rank: int
    host: str
    versions: dict[str, str]
    """Of everything that must be the same."""
    device: str
    """The chip's name; "cpu"."""
    memory_bytes: int = 0
    """Of the device."""
    device_problem: str | None = None
    """Why the device could not be measured."""
    compile_problem: str | None = None
    """Why nothing can be compiled here, where the run compiles."""
    product_flops: float | None = None
    """A large matrix product, bf16 on a GPU (FLOP/s)."""
    memory_bytes_per_s: float | None = None
    """Copying in the device's memory, read and written bytes together."""
    health: dict[str, str] = field(default_factory=dict)
    """What the driver complains about: its word for it, and its value; or that nvidia-smi did not answer."""
    write_bytes_per_s: float | None = None
    """Writing into the run's folder, or the nearest one above it that exists, until it is on the disk, all ranks at once."""
    read_bytes_per_s: float | None = None
    """Reading sequences of the shards at random places."""
    shard_problem: str | None = None
    """Why the shards cannot be used here."""
    shards_seen: str = ""
    """A fingerprint of names, sizes and times of the shards' files: that all see the same ones."""
    folder_problem: str | None = None
    """Why the run's folder cannot be used here."""
    clock_skew_s: float = 0.0
    """How far this host's clock is before rank 0's (seconds)."""


@dataclass(frozen=True)
class Link:
    """An all-reduce between two ranks or among a host's."""

    hosts: tuple[str, ...]
    """One host: within it."""
    bytes_per_s: float
    """What each rank sends, and receives, in a second (the "bus bandwidth")."""
    rail: int = 0
    """Between two hosts: the local rank at both ends; all rails of a pair are measured at once."""


@dataclass(frozen=True)
class Needs:
    """What the run asks of machines."""

    checkpoint_bytes: float
    kept: int
    """Checkpoints that lie on the disk at the same time, the one being written included."""
    free_bytes: float
    """In the file system of the run's folder."""
    save_every_s: float | None
    """Seconds between two checkpoints, by an estimate of the step time; None: it saves at the end only."""
    read_bytes_per_s: float
    """What each rank reads of the shards, by the same estimate."""
    send_bytes_per_s: float
    """What each host sends to others, by the same estimate, if that is all that a step does."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    host: str
    check: str
    status: str
    """"ok", "warn" or "bad" """
    found: str
    wanted: str = ""


def judge(measured: list[Measured], links: list[Link], needs: Needs) -> list[Finding]:
    """All findings: those of hosts in the order of the checks, then those of nobody in particular."""
    findings = [*_versions(measured), *_devices(measured), *_compilers(measured), *_links(measured, links, needs)]
    findings += [
        *_shards(measured, needs),
        *_folder(measured),
        *_clocks(measured),
        *_saving(measured, needs),
        _space(needs),
    ]
    return sorted(findings, key=lambda finding: finding.host == EVERYWHERE)


def excluded(findings: list[Finding]) -> list[str]:
    """The hosts with something bad; none where that is all of them: then it is not the hosts."""
    hosts = sorted({finding.host for finding in findings} - {EVERYWHERE})
    bad = [host for host in hosts if any(f.host == host and f.status == "bad" for f in findings)]
    return bad if len(bad) < len(hosts) else []


def _by_host(measured: list[Measured], check: str, one: Callable[[Measured], Finding]) -> list[Finding]:
    """One finding a host: the worst of its ranks', which is named where there are several."""
    result: dict[str, Finding] = {}
    for rank in measured:
        finding = one(rank)
        before = result.get(rank.host)
        if before is None or _SEVERITY[finding.status] > _SEVERITY[before.status]:
            several = finding.status != "ok" and sum(m.host == rank.host for m in measured) > 1
            found = f"rank {rank.rank}: {finding.found}" if several else finding.found
            result[rank.host] = Finding(rank.host, check, finding.status, found, finding.wanted)
    return list(result.values())


def _versions(measured: list[Measured]) -> list[Finding]:
    names = sorted({name for rank in measured for name in rank.versions})
    usual = {name: Counter(rank.versions.get(name, "none") for rank in measured).most_common(1)[0][0] for name in names}

    def one(rank: Measured) -> Finding:
        mine = {name: rank.versions.get(name, "none") for name in names}
        other = {name: version for name, version in mine.items() if version != usual[name]}
        found = ", ".join(f"{name} {version}" for name, version in (other or mine).items())
        wanted = ", ".join(f"{name} {usual[name]}" for name in other)
        return Finding(rank.host, "versions", "bad" if other else "ok", found, wanted)

    return _by_host(measured, "versions", one)


def _compilers(measured: list[Measured]) -> list[Finding]:
    bad = [
        Finding(rank.host, "torch.compile", "bad", rank.compile_problem) for rank in measured if rank.compile_problem
    ]
    return bad or [Finding(EVERYWHERE, "torch.compile", "ok", "compiles, or is not asked to")]


def _devices(measured: list[Measured]) -> list[Finding]:
    """GPUs alike, healthy, and as fast as the table and each other; nothing on a CPU."""
    if all(rank.device == "cpu" for rank in measured):
        return []
    usual = Counter((rank.device, rank.memory_bytes >> 30) for rank in measured).most_common(1)[0][0]

    def alike(rank: Measured) -> Finding:
        if rank.device_problem:
            return Finding(rank.host, "GPU", "bad", rank.device_problem)
        status = "ok" if (rank.device, rank.memory_bytes >> 30) == usual else "bad"
        found = f"{rank.device}, {rank.memory_bytes / 2**30:.1f} GiB"
        return Finding(rank.host, "GPU", status, found, "" if status == "ok" else f"{usual[0]}, {usual[1]} GiB")

    def healthy(rank: Measured) -> Finding:
        complaints = ", ".join(f"{name} {value}" for name, value in rank.health.items())
        lasting = any(not name.startswith(("throttled", "nvidia-smi")) for name in rank.health)
        status = "ok" if not complaints else "bad" if lasting else "warn"
        return Finding(rank.host, "GPU health", status, complaints or "no complaint")

    findings = [*_by_host(measured, "GPU", alike), *_by_host(measured, "GPU health", healthy)]
    chip = {name: DATASHEETS.get(name) for name in {rank.device for rank in measured}}
    products = {name: c.flops if c else None for name, c in chip.items()}
    copies = {name: c.bytes_per_s if c else None for name, c in chip.items()}
    findings += _speed(measured, "matrix product", lambda r: r.product_flops, products, (0.55, 0.7), 1e12, "TFLOP/s")
    return findings + _speed(measured, "GPU memory", lambda r: r.memory_bytes_per_s, copies, (0.6, 0.75), 1e9, "GB/s")


def _speed(
    measured: list[Measured],
    check: str,
    of: Callable[[Measured], float | None],
    peaks: dict[str, float | None],
    least: tuple[float, float],
    unit: float,
    unit_name: str,
) -> list[Finding]:
    """Judge by the datasheet's peak (bad and warn below `least` of it, where it is known) and by the ranks' median."""
    known = [speed for rank in measured if (speed := of(rank)) is not None]
    typical = median(known) if known else 0.0

    def one(rank: Measured) -> Finding:
        speed, peak = of(rank), peaks.get(rank.device)
        if speed is None:
            return Finding(rank.host, check, "bad", "it could not be measured")
        of_peak = speed / peak if peak else None
        bad = (of_peak is not None and of_peak < least[0]) or speed < 0.85 * typical
        warn = (of_peak is not None and of_peak < least[1]) or speed < 0.93 * typical
        share = f", {100 * of_peak:.0f}% of the datasheet" if of_peak is not None else ", no datasheet known"
        found = f"{speed / unit:,.0f} {unit_name}{share}"
        return Finding(
            rank.host, check, "bad" if bad else "warn" if warn else "ok", found, f"median {typical / unit:,.0f}"
        )

    return _by_host(measured, check, one)


def _links(measured: list[Measured], links: list[Link], needs: Needs) -> list[Finding]:
    """Within each host, and between hosts: who is slow on all of its links, though they go to hosts that are not.

    A host is slow if even its fastest link is; between hosts, on any one rail, for the slowest one's sums are waited for. It is
    compared with the median of the same rail of all hosts (of two hosts within themselves the faster one's: a link can only be
    slower than it should be); the one pair that two hosts make has only its other rails to be compared with. Within a host also
    with NVLink's datasheet, of which a ring attains three quarters and PCIe less than a tenth. Between hosts, for which no
    datasheet speaks, all rails together also with what the run sends: bad if sending takes longer than the step, a warning if it
    takes more than half of it. With two hosts nobody can tell which end is slow.
    """
    devices = {rank.host: rank.device for rank in measured}
    findings = []
    for check, size in (("all-reduce within", 1), ("all-reduce across", 2)):
        best: dict[str, dict[int, float]] = {}
        pairs: dict[tuple[str, ...], float] = {}
        for link in (link for link in links if len(link.hosts) == size):
            pairs[link.hosts] = pairs.get(link.hosts, 0.0) + link.bytes_per_s
            for host in link.hosts:
                rails = best.setdefault(host, {})
                rails[link.rail] = max(rails.get(link.rail, 0.0), link.bytes_per_s)
        for host, rails in best.items():
            alone = size == 2 and len(best) == 2
            usual = {rail: _usual(best, None if alone else rail) for rail in rails}
            slowest = min(rails, key=lambda rail: rails[rail] / usual[rail])
            speed, typical = rails[slowest], usual[slowest]
            together = max(total for pair, total in pairs.items() if host in pair)
            chip = DATASHEETS.get(devices.get(host, "")) if size == 1 else None
            peak = chip.link if chip else None
            of_peak = speed / peak if peak else 1.0
            need = needs.send_bytes_per_s if size == 2 else 0.0
            bad = speed < 0.6 * typical or of_peak < 0.2 or together < need
            warn = speed < 0.8 * typical or of_peak < 0.4 or together < 2 * need
            share = f", {100 * of_peak:.0f}% of NVLink" if peak else ""
            share += f" by local rank {slowest}, {together / 1e9:.2f} by all {len(rails)}" if len(rails) > 1 else ""
            status = "bad" if bad else "warn" if warn else "ok"
            found, wanted = f"{speed / 1e9:.2f} GB/s{share}", f"usual {typical / 1e9:.2f} GB/s"
            wanted += f", a host sends {need / 1e9:.2g} GB/s" if need else ""
            findings.append(Finding(host, check, status, found, wanted))
    return findings


def _usual(best: dict[str, dict[int, float]], rail: int | None) -> float:
    """The median of all hosts' speeds on a rail; None: on any."""
    return median_high(speed for rails in best.values() for n, speed in rails.items() if rail is None or n == rail)


def _shards(measured: list[Measured], needs: Needs) -> list[Finding]:
    usual = Counter(rank.shards_seen for rank in measured if not rank.shard_problem).most_common(1)
    need = needs.read_bytes_per_s

    def there(rank: Measured) -> Finding:
        if rank.shard_problem:
            return Finding(rank.host, "shards", "bad", rank.shard_problem)
        same = rank.shards_seen == usual[0][0]
        found = "open, whole by size, a sampled checksum agrees" if same else "other files than most ranks see"
        return Finding(rank.host, "shards", "ok" if same else "bad", found)

    def fast(rank: Measured) -> Finding:
        speed = rank.read_bytes_per_s
        if speed is None:
            return Finding(rank.host, "reading shards", "bad", "it could not be measured")
        status = "bad" if speed < need else "warn" if speed < 3 * need else "ok"
        return Finding(
            rank.host, "reading shards", status, f"{speed / 1e6:,.1f} MB/s a rank", f"needs {need / 1e6:,.2f}"
        )

    return [*_by_host(measured, "shards", there), *_by_host(measured, "reading shards", fast)]


def _folder(measured: list[Measured]) -> list[Finding]:
    speeds = [rank.write_bytes_per_s for rank in measured if rank.write_bytes_per_s]
    typical = median(speeds) if speeds else 0.0

    def one(rank: Measured) -> Finding:
        if rank.folder_problem or rank.write_bytes_per_s is None:
            return Finding(rank.host, "run folder", "bad", rank.folder_problem or "it could not be written")
        status = "warn" if rank.write_bytes_per_s < 0.5 * typical else "ok"
        found = f"writes {rank.write_bytes_per_s / 1e6:,.0f} MB/s a rank"
        return Finding(rank.host, "run folder", status, found, f"median {typical / 1e6:,.0f}")

    return _by_host(measured, "run folder", one)


def _clocks(measured: list[Measured]) -> list[Finding]:
    """A run stops when the first clock says that its job is over; logs, certificates and file times need the time, too."""
    typical = median_low(rank.clock_skew_s for rank in measured)

    def one(rank: Measured) -> Finding:
        skew = rank.clock_skew_s - typical
        status = "bad" if abs(skew) > 60 else "warn" if abs(skew) > 1 else "ok"
        return Finding(rank.host, "clock", status, f"{1000 * skew:+,.0f} ms", "within 1 s")

    return _by_host(measured, "clock", one)


def _saving(measured: list[Measured], needs: Needs) -> Iterable[Finding]:
    speeds = [rank.write_bytes_per_s for rank in measured if rank.write_bytes_per_s]
    if len(speeds) < len(measured) or needs.save_every_s is None:
        return
    seconds = needs.checkpoint_bytes / (min(speeds) * len(speeds))  # each writes its share; the slowest ends it
    share = seconds / needs.save_every_s
    status = "bad" if share > 0.5 else "warn" if share > 0.2 else "ok"
    found = f"{needs.checkpoint_bytes / 2**30:.2f} GiB in {seconds:,.1f} s"
    wanted = f"one every {needs.save_every_s:,.0f} s (estimate)"
    yield Finding(EVERYWHERE, "saving", status, found, wanted)


def _space(needs: Needs) -> Finding:
    wanted = needs.kept * needs.checkpoint_bytes
    status = "bad" if needs.free_bytes < wanted else "warn" if needs.free_bytes < 1.5 * wanted else "ok"
    found = f"{needs.free_bytes / 2**30:,.1f} GiB free"
    text = f"{needs.kept} checkpoints are {wanted / 2**30:,.1f} GiB"
    return Finding(EVERYWHERE, "space for checkpoints", status, found, text)
