"""Judging what the ranks have told: pure functions from findings to rows."""

from collections.abc import Callable, Sequence

from t2i.costs import checkpoint_bytes
from t2i.doctor.findings import Findings, Row, differing, gib, names, seconds

CLOCK_YELLOW, CLOCK_RED = 1.0, 30.0
"""Seconds by which hosts' clocks may differ. Logs and file times get confusing with the former; with the latter make-like
comparisons of file times and certificates go wrong."""
SLOW_SAVE = 300.0
"""Seconds of a save that are worth knowing."""
SLOW_REDUCE = 2.0
"""Seconds for the gradients of a step."""
SLOW_LINK = 1e9
"""Bytes a second of bus bandwidth, below which GPUs on several hosts talk over something else than their fast network."""


def versions(f: Findings) -> list[Row]:
    """The same software on all hosts."""
    rows = []
    found = f.by_host(lambda facts: facts.versions)
    for name in dict.fromkeys(name for versions in found.values() for name in versions):
        if odd := differing({host: versions.get(name, "none") for host, versions in found.items()}):
            remedy = "install the same version on all hosts, or one environment on a shared folder"
            if name == "source files":
                remedy = "bring all hosts to the same commit of this project"
            rows.append(Row("yellow" if name == "driver" else "red", "versions", f"{name}: {odd}", remedy))
    if not rows and found:
        one = next(iter(found.values()))
        shown = ("python", "torch", "deepspeed", "CUDA", "NCCL", "nar-t2i")
        text = ", ".join(f"{name} {one[name]}" for name in shown if one.get(name, "None") != "None")
        rows.append(Row("green", "versions", text + f.together))
    return rows


def files(f: Findings) -> list[Row]:
    """The same recipe and DeepSpeed JSON on all hosts."""
    rows = []
    for path in map(str, f.plan.files):
        every = f.by_host(lambda facts: facts.files)
        found = {host: str(digests.get(path, "cannot be read")) for host, digests in every.items()}
        absent = [host for host, digest in found.items() if digest.startswith("cannot")]
        if absent:
            rows.append(
                Row("red", "files", f"{path} {found[absent[0]]} on {names(absent)}",
                    "copy it there, or put it on a shared folder and give its full path")
            )  # fmt: skip
        elif odd := differing({host: digest[:12] for host, digest in found.items()}):
            rows.append(Row("red", "files", f"{path}: {odd}", "copy one of them to all hosts"))
    for host, error in f.by_host(lambda facts: facts.init_error).items():
        if error is not None:
            rows.append(
                Row("red", "files", f"{error}: {host}", "copy it there, or give the full path on a shared folder")
            )
    return rows or [Row("green", "files", f"{names(f.plan.files)}: readable{f.together}")]


def devices(f: Findings) -> list[Row]:
    """The same accelerators, as many as ranks."""
    rows = []
    kinds = f.by_host(
        lambda facts: f"{facts.device.name}{f', {gib(facts.device.memory)}' if facts.device.memory else ''}"
    )
    if odd := differing(kinds):
        rows.append(
            Row("yellow", "devices", odd, "the slowest sets the pace and the smallest the micro-batch; leave the odd host "
                "out, if that is not meant")
        )  # fmt: skip
    if odd := differing({host: kind.device.kind for host, kind in f.by_host(lambda facts: facts).items()}):
        rows.append(
            Row("red", "devices", odd, "find out why torch sees no GPU there (driver, CUDA_VISIBLE_DEVICES), or leave it out")
        )  # fmt: skip
    for facts in f.by_host(lambda facts: facts).values():
        if facts.device.kind == "cuda" and facts.device.count < facts.local_ranks:
            rows.append(
                Row("red", "devices", f"{f.host(facts.node)} has {facts.device.count} for {facts.local_ranks} ranks",
                    f"write slots={facts.device.count} for it in the hostfile")
            )  # fmt: skip
    if not rows and f.local:
        counts = names(f"{host} {count}" for host, count in f.by_host(lambda facts: facts.local_ranks).items())
        rows.append(Row("green", "devices", f"{next(iter(kinds.values()))}; ranks: {counts}"))
    return rows


def clocks(f: Findings) -> list[Row]:
    """Clocks that agree."""
    found = [clock for facts in f.group for clock in facts.clocks]
    if not f.group:
        return []
    if not found:
        return [Row("green", "clocks", "one host")]
    rows: list[Row] = []
    for clock in found:
        ahead = abs(clock.offset) - clock.uncertainty
        if ahead <= CLOCK_YELLOW:
            continue
        side = "ahead of" if clock.offset > 0 else "behind"
        rows.append(
            Row("red" if ahead > CLOCK_RED else "yellow", "clocks",
                f"{f.host(clock.node)} is {abs(clock.offset):.1f} s {side} {f.host(0)}, give or take "
                f"{seconds(clock.uncertainty)}",
                "start a time service there (chrony, systemd-timesyncd): timedatectl set-ntp true")
        )  # fmt: skip
    worst = max(found, key=lambda clock: abs(clock.offset))
    slowest = max(found, key=lambda clock: clock.round_trip)
    return rows or [
        Row("green", "clocks", f"at most {seconds(abs(worst.offset))} apart, give or take {seconds(worst.uncertainty)}; "
            f"slowest answer {seconds(slowest.round_trip)}, of {f.host(slowest.node)}")
    ]  # fmt: skip


def shards(f: Findings) -> list[Row]:
    """Every shard where it is needed, and the same set everywhere."""
    path = f.plan.recipe.data.path
    copy = f"copy or mount {path} there, whole; if it has changed on purpose, run `t2i data index {path}`"
    rows: list[Row] = []
    told: set[tuple[str, object]] = set()
    for facts in f.local:
        host, data = f.host(facts.node), facts.data
        if data.error is not None and (host, data.error) not in told:
            told.add((host, data.error))
            gone = f" (not there: {names(data.missing, 6)})" if data.missing else ""
            rows.append(Row("red", "shards", f"on {host}: {data.error}{gone}", copy))
        if data.unreadable and (host, data.unreadable) not in told:
            told.add((host, data.unreadable))
            rows.append(
                Row("red", "shards", f"rank {facts.rank} on {host} cannot read {names(data.unreadable)}",
                    f"copy it there, with its .idx.npz file, or run `t2i data index {path}`")
            )  # fmt: skip
    digests = f.by_host(lambda facts: facts.data.digest)
    if odd := differing({host: digest[:12] for host, digest in digests.items() if digest}):
        rows.append(Row("red", "shards", f"different sets: {odd}", f"copy {path} from one host to the others"))
    if not rows and f.local:
        needed = [facts.data.needed for facts in f.local]
        share = f"{min(needed)}" if min(needed) == max(needed) else f"{min(needed)} to {max(needed)}"
        rows.append(
            Row(
                "green",
                "shards",
                f"{f.local[0].data.shards} in {path}{f.together}; each rank can read its {share}",
            )
        )
    return rows


def inputs(f: Findings) -> list[Row]:
    """Set, tokenizer, text encoder and earlier checkpoints fit the recipe."""
    first = next((facts for facts in f.group if facts.rank == 0), None)
    if first is None:
        return []
    if first.set_error is not None and any(facts.data.error == first.set_error for facts in f.local):
        return []  # has a line already
    if first.set_error is not None:
        return [Row("red", "recipe and set", first.set_error, "as it says; training would stop with the same message")]
    return [Row("green", "recipe and set", "set, tokenizer, text encoder and run folder fit the recipe")]


def run_folder(f: Findings) -> list[Row]:
    """One folder for all, and writable."""
    rows, told = [], set()
    for facts in f.group:
        problem = facts.folder_error
        key = (f.host_of(facts.rank), problem)
        if problem is None or key in told:
            continue
        told.add(key)
        remedy = (
            "put --run-dir on a folder that all hosts share (NFS, Lustre), under the same path"
            if "not the folder" in problem
            else "give write permission to the user who trains, or another --run-dir"
        )
        rows.append(Row("red", "run folder", f"on {key[0]}: {problem}", remedy))
    if not rows and f.group:
        return [Row("green", "run folder", f"{f.plan.recipe.run_dir}: one folder for all ranks, and writable")]
    return rows


def saving(f: Findings) -> list[Row]:
    """Write speed, free space and memory against a checkpoint."""
    train = f.plan.recipe.train
    size = checkpoint_bytes(f.parameters, f.stage, f.item, train.ema_decay > 0)
    if not f.group or any(facts.folder_error for facts in f.group):
        return []
    rows = [_write_speed(f, size)] if any(facts.write_seconds > 0 for facts in f.group) else []
    free, kept = min(facts.free for facts in f.group), max(facts.kept for facts in f.group)
    # Old checkpoints go once a new one is whole.
    needed = max(0, size * (train.keep_last + 1) - kept)
    forever = size * (train.steps // train.keep_every) if train.keep_every else 0
    seen = f"{gib(free)} free; {train.keep_last} + 1 checkpoints of {gib(size)}"
    if kept:
        seen += f", {gib(kept)} of which are there"
    room = "make room, set train.keep_last lower, or choose another --run-dir"
    if free < needed:
        rows.append(Row("red", "free space", f"{seen}: {gib(needed - free)} too few", room))
    elif free < needed + forever:
        rows.append(
            Row("yellow", "free space", f"{seen}, and {gib(forever)} for those of every {train.keep_every} steps, which stay",
                f"{room}, or set train.keep_every higher")
        )  # fmt: skip
    else:
        rows.append(Row("green", "free space", seen))
    return rows + _memory(f, size)


def _write_speed(f: Findings, size: int) -> Row:
    train, writers = f.plan.recipe.train, [facts for facts in f.group if facts.write_seconds > 0]
    speed = sum(facts.written for facts in writers) / max(facts.write_seconds for facts in writers)
    takes = size / speed
    seen = (
        f"{gib(speed)}/s from {len(writers)} host{'s' if len(writers) > 1 else ''} at once; a checkpoint of {gib(size)} takes "
        f"about {seconds(takes)}"
    )
    # In the background too: the last checkpoint is waited for, and one that is not whole when the next begins.
    if 0 < train.watchdog_seconds < takes:
        limit = f"{seen}, and train.watchdog_seconds {train.watchdog_seconds:g} ends a run that waits longer"
        remedy = (
            f"use a faster file system for --run-dir, or set train.watchdog_seconds above {takes:,.0f} (0: no limit)"
        )
        return Row("red", "write speed", limit, remedy)
    if takes > SLOW_SAVE:
        return Row("yellow", "write speed", seen, "use a faster file system for --run-dir, keep train.background_save on, and "
                   f"a larger train.save_every than {train.save_every} if a save takes longer than so many steps")  # fmt: skip
    return Row("green", "write speed", seen)


def _memory(f: Findings, size: int) -> list[Row]:
    if not f.plan.recipe.train.background_save:
        return []
    for facts in f.by_host(lambda facts: facts).values():
        share = size * facts.local_ranks // max(1, f.ranks)
        if facts.memory < share:
            return [
                Row("red", "memory for saving", f"{f.host(facts.node)} has {gib(facts.memory)} available, and its copy of a "
                    f"checkpoint takes {gib(share)}", "free memory there, or set train.background_save False")
            ]  # fmt: skip
    return [Row("green", "memory for saving", "every host has room for its copy of a checkpoint")]


def all_reduce(f: Findings) -> list[Row]:
    """Right sums, and fast enough."""
    if not f.group:
        return []
    rows = []
    wrong = {facts.rank: facts.wrong_sums for facts in f.group if facts.wrong_sums}
    if wrong:
        rank, cases = next(iter(wrong.items()))
        hosts = names(f.host_of(rank) for rank in wrong)
        rows.append(
            Row("red", "all-reduce", f"wrong sums on {len(wrong)} ranks ({hosts}); rank {rank}: "
                + names(f"{count} of {case}" for case, count in cases.items()),
                "do not train: with NCCL try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1, to find the faulty link; have the "
                "hosts checked")
        )  # fmt: skip
    else:
        sums = f.group[0].sums
        rows.append(Row("green", "all-reduce", f"{sums} of {sums} sizes and types right on every rank"))
    if f.ranks > 1:
        rows.append(_reduce_speed(f))
    return rows


def _reduce_speed(f: Findings) -> Row:
    took = max(facts.reduce_seconds for facts in f.group)
    speed = f.plan.reduce_bytes / took
    bus = speed * 2 * (f.ranks - 1) / f.ranks
    gradients = f.parameters * f.item
    step = gradients / speed
    seen = (
        f"{gib(f.plan.reduce_bytes)} in {seconds(took)}: algorithm {speed / 1e9:.2f} GB/s, bus {bus / 1e9:.2f} GB/s; "
        f"{gib(gradients)} of gradients take about {seconds(step)}"
    )
    gpus = any(facts.device.kind != "cpu" for facts in f.local)
    if gpus and len(f.by_host(lambda facts: facts.node)) > 1 and bus < SLOW_LINK:
        return Row("yellow", "all-reduce speed", seen, "see with NCCL_DEBUG=INFO which network is used; set NCCL_SOCKET_IFNAME "
                   "or NCCL_IB_HCA to the fast one")  # fmt: skip
    if step > SLOW_REDUCE:
        return Row("yellow", "all-reduce speed", seen, "raise gradient_accumulation_steps, so that it happens less often, or "
                   "use a faster network")  # fmt: skip
    return Row("green", "all-reduce speed", seen)


CHECKS: Sequence[Callable[[Findings], list[Row]]] = (
    versions, files, devices, clocks, shards, inputs, run_folder, saving, all_reduce,
)  # fmt: skip
