"""Whether a job can start with the ranks that it has: judged from their facts alone, and one page that says so."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from exfm.data.finding import Finding
from exfm.trainer.facts import Facts, from_median
from exfm.trainer.fits import Needs
from exfm.trainer.links import MIB, SlowLink, Speeds

GIB = 2**30
SKEW_WARN_S, SKEW_ERROR_S = 1.0, 5.0  # of a clock, from that of most ranks
MOST_LINES = 8  # of one kind on the page


@dataclass(frozen=True)
class Storing:
    """How commits use up a disk. folder: where they go; commits: those there; keep: how many stay; full_every: of so many one is
    full.
    """

    folder: str
    commits: int
    keep: int
    full_every: int

    @property
    def ahead(self) -> int:
        """Full checkpoints that must fit before older ones make room: of the next two the second may take the place of one."""
        return 1 if self.commits >= self.keep or self.full_every > 1 else 2


def judge(
    facts: Sequence[Facts], needs: Needs | None = None, storing: Storing | None = None, slow: Sequence[SlowLink] = ()
) -> list[Finding]:
    """What stands in a job's way, errors first. needs: None where they are not known."""
    found = [*_folders(facts), *_different(facts), *_clocks(facts)]
    if needs is not None:
        found += _memory(facts, needs)
        if storing is not None:
            found += _disk(facts, needs, storing)
    found += _links(facts, slow)
    return sorted(found, key=lambda f: f.level != "error")


def _folders(facts: Sequence[Facts]) -> list[Finding]:
    by_word: dict[str, list[Facts]] = defaultdict(list)
    for f in facts:
        for word in f.trouble:
            by_word[word].append(f)
    fix = "mount the same folder there, writable, or set another run.folder"
    return [Finding("error", f"{ranks_of(who)} {word}", fix) for word, who in by_word.items()]


def _different(facts: Sequence[Facts]) -> list[Finding]:
    found = []
    for key in {k: None for f in facts for k in f.own}:
        common, number = Counter(f.own[key] for f in facts).most_common(1)[0]
        others: dict[str, list[Facts]] = defaultdict(list)
        for f in facts:
            if f.own[key] != common:
                others[f.own[key]].append(f)
        odd = ", ".join(f"{ranks_of(who)} {value}" for value, who in others.items())
        fix = (
            "start all ranks with one config file and the same --set"
            if key.startswith("config")
            else "install the same on every host"
        )
        found.append(Finding("error", f"{key} is {odd}, and {common} on {_others(number)}", fix))
    return found


def _clocks(facts: Sequence[Facts]) -> list[Finding]:
    found = []
    for f, ahead in zip(facts, from_median(facts), strict=True):
        if abs(ahead) > SKEW_WARN_S:
            level, limit = ("error", SKEW_ERROR_S) if abs(ahead) > SKEW_ERROR_S else ("warn", SKEW_WARN_S)
            word = "ahead of" if ahead > 0 else "behind"
            what = f"the clock of {f.who} is {abs(ahead):.1f} s {word} the others'; {limit:g} s are allowed"
            found.append(Finding(level, what, f"set the clock of host {f.host} (chronyc makestep)"))  # type: ignore[arg-type]
    return found


def _memory(facts: Sequence[Facts], needs: Needs) -> list[Finding]:
    found = []
    for f in facts:
        if f.device_bytes is not None and f.device_bytes < (need := needs.device_bytes[f.rank]):
            what = f"{f.who} has {_size(f.device_bytes)} of GPU memory free, the plan puts {_size(need)} there"
            found.append(Finding("error", what, "end what else uses that GPU, or use more ranks"))
    by_host: dict[str, list[Facts]] = defaultdict(list)
    for f in facts:
        by_host[f.host].append(f)
    for host, ranks in by_host.items():
        free, need = min(f.host_bytes for f in ranks), sum(needs.host_bytes[f.rank] for f in ranks)
        if free < need:
            what = f"host {host} has {_size(free)} of memory free, the plan puts {_size(need)} there on {len(ranks)} rank(s)"
            found.append(
                Finding("error", what, "end what else runs there, start fewer ranks per host or use more hosts")
            )
    return found


def _disk(facts: Sequence[Facts], needs: Needs, storing: Storing) -> list[Finding]:
    free = min((f.disk_bytes for f in facts if f.disk_bytes is not None), default=None)
    need = storing.ahead * needs.checkpoint_bytes
    if free is None or free >= need:
        return []
    what = f"{storing.folder} has {_size(free)} free, the next {storing.ahead} checkpoint(s) take {_size(need)}"
    return [Finding("error", what, "free space there, lower checkpoint.keep or set another checkpoint.folder")]


def _links(facts: Sequence[Facts], slow: Sequence[SlowLink]) -> list[Finding]:
    found = []
    for s in sorted(slow, key=lambda s: s.link.bytes_per_s):
        a, b = facts[s.link.sender], facts[s.link.receiver]
        expected = {
            "others": f"the others {_rate(s.expected)}",
            "Ethernet": f"{_rate(s.expected / 4)} is the least between hosts",
        }.get(s.why, f"{s.why} says {_rate(s.expected)}")
        what = f"slow link {a.host} - {b.host}: {_rate(s.link.bytes_per_s)} from rank {a.rank} to rank {b.rank}, {expected}"
        found.append(Finding("warn", what, "look at cables, switch and interface of these hosts, or leave them out"))
    return found


# ---- words


def ranks_of(facts: Sequence[Facts]) -> str:
    """'rank 3 (host n2)', and of several 'ranks 3, 4, ... (host n2)'."""
    if len(facts) == 1:
        return facts[0].who
    numbers = ", ".join(str(f.rank) for f in facts[:6]) + ("" if len(facts) <= 6 else f" and {len(facts) - 6} more")
    hosts = list(dict.fromkeys(f.host for f in facts))
    names = ", ".join(hosts[:4]) + ("" if len(hosts) <= 4 else f" and {len(hosts) - 4} more")
    return f"ranks {numbers} (host{'s' * (len(hosts) > 1)} {names})"


def _others(number: int) -> str:
    return f"the {number} others" if number > 1 else "the other"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / GIB:.2f} GiB/s" if bytes_per_s >= 0.1 * GIB else f"{bytes_per_s / MIB:.1f} MiB/s"


@dataclass(frozen=True)
class Report:
    """One preflight. slow: the slow links among speeds' links; speeds: None where they were not measured."""

    facts: tuple[Facts, ...]
    findings: tuple[Finding, ...]
    needs: Needs | None
    storing: Storing | None
    speeds: Speeds | None
    seconds: float

    @property
    def hosts(self) -> list[str]:
        return list(dict.fromkeys(f.host for f in self.facts))

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "error"]

    def line(self) -> str:
        """All in one line, where nothing stands in the way."""
        ranks, hosts = len(self.facts), len(self.hosts)
        parts = [f"{ranks} rank{'s' * (ranks > 1)} on {hosts} host{'s' * (hosts > 1)} agree{'s' * (ranks == 1)}"]
        words = [self._speeds(), self._storing(), f"{self.seconds:.2f} s"]
        return f"preflight: {'; '.join(parts)}; {', '.join(w for w in words if w)}"

    def _speeds(self) -> str:
        if self.speeds is None:
            return ""
        slowest = min(self.speeds.links, key=lambda link: link.bytes_per_s)
        a, b = self.facts[slowest.sender].host, self.facts[slowest.receiver].host
        pair = f"inside {a}" if a == b else f"{a} - {b}"
        return (
            f"all-reduce {_rate(self.speeds.all_reduce)}, all-to-all {_rate(self.speeds.all_to_all)}, slowest link {pair} "
            f"{_rate(slowest.bytes_per_s)}"
        )

    def _storing(self) -> str:
        free = min((f.disk_bytes for f in self.facts if f.disk_bytes is not None), default=None)
        if free is None or self.needs is None:
            return ""
        number = free // max(1, self.needs.checkpoint_bytes)
        return (
            f"disk for {number:,} checkpoint{'s' * (number != 1)}"
            if number < 1000
            else "disk for 1,000 checkpoints or more"
        )

    def message(self, path: str) -> str:
        """Of the error that ends a job: the first cause with its remedy, and where the rest is."""
        first, *more = self.errors
        rest = f"; {len(more)} more in {path}" if more else f"; see {path}"
        return f"preflight: {first.what}; {first.fix}{rest}"

    def page(self) -> str:
        """The findings, errors on top, then what every host has."""
        lines = [self.line() if not self.errors else f"preflight: this job cannot start ({self.seconds:.2f} s)", ""]
        counted: Counter[str] = Counter()
        for f in self.findings:
            counted[f.level] += 1
            if counted[f.level] <= MOST_LINES:
                lines += [f"{f.level.upper():5}  {f.what}", f"       {f.fix}"]
        lines += [
            f"{level.upper():5}  {n - MOST_LINES} more in preflight.json"
            for level, n in counted.items()
            if n > MOST_LINES
        ]
        lines += [""] * bool(self.findings)
        lines += [
            f"{'host':20} {'ranks':>12} {'memory free':>12} {'needed':>10} {'GPU free':>10} {'needed':>10} {'clock':>9}"
        ]
        lines += [self._host(host) for host in self.hosts[:20]]
        lines += [f"and {len(self.hosts) - 20} hosts more, in preflight.json"] * (len(self.hosts) > 20)
        return "\n".join([*lines, "", *self._rest()]).rstrip() + "\n"

    def _host(self, host: str) -> str:
        ranks = [f for f in self.facts if f.host == host]
        offsets = dict(zip((f.rank for f in self.facts), from_median(self.facts), strict=True))
        gpus = [f.device_bytes for f in ranks if f.device_bytes is not None]
        free, needed, gpu, gpu_needed = _size(min(f.host_bytes for f in ranks)), "", "", ""
        if self.needs is not None:
            needed = _size(sum(self.needs.host_bytes[f.rank] for f in ranks))
            gpu_needed = _size(max(self.needs.device_bytes[f.rank] for f in ranks)) if gpus else ""
        if gpus:
            gpu = _size(min(gpus))
        clock = max((offsets[f.rank] for f in ranks), key=abs)
        numbers = f"{ranks[0].rank}" if len(ranks) == 1 else f"{ranks[0].rank}..{ranks[-1].rank}"
        return f"{host:20} {numbers:>12} {free:>12} {needed:>10} {gpu:>10} {gpu_needed:>10} {clock:>+8.3f}s"

    def _rest(self) -> list[str]:
        lines = []
        if self.storing is not None and self.needs is not None and self._storing():
            lines.append(f"{self.storing.folder}: {self._storing()} of {_size(self.needs.checkpoint_bytes)}")
        if self.speeds is not None:
            lines.append(self._speeds())
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {"ok": not self.errors} | asdict(self)


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / MIB:.2f} MiB"
