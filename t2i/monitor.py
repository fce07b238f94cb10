"""Each rank's look-out for the others: one that is dead or hangs ends the whole job, with a line that says which and why.

    with Monitor(rank, ranks, local_rank=0, folder=run_dir / "logs", watchdog=1800, share=...) as monitor:
        ...
        monitor.progress.step(1)

A thread on every rank writes a beat a second into a key-value store (TCPStore) that rank 0 holds. It uses no collectives,
since a collective may never return. Rank 0 judges the beats (`t2i.liveness` has the rules); the others judge rank 0 by its
beat and by their connection to it. After a verdict each rank ends its own process, whatever its main thread is in.
"""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import psutil
from torch.distributed import DistError, TCPStore

from t2i.liveness import BEAT_SECONDS, EXIT_DEAD_RANK, QUIET_SECONDS, SILENT_SECONDS, Beat, Judge, Verdict
from t2i.rank_log import Progress, RankLog, place, write_stacks

CONNECT_SECONDS = 30.0
"""How long a rank tries to reach the store of rank 0."""
POLL_SECONDS = 0.1
"""Between two looks of a rank that only waits for the others."""
TOLD_SECONDS = 5.0
"""How long rank 0 waits for the others to read a verdict, and each of them for the others to have written their stacks."""
BACKSTOP_SECONDS = 5.0
"""The process ends this long after a verdict even if it cannot be written down: the disk may be what hangs."""
STACKS_SECONDS = 3.0
"""How long a rank's monitor waits for its stacks to be written: the disk may be what hangs."""
LEAVE_SECONDS = QUIET_SECONDS + 3 * BEAT_SECONDS
"""How long a rank that is ended by a signal looks for a dead one that may be the reason."""
FAREWELL_SECONDS = 60.0
"""How long rank 0, once done, waits for the others."""

_ECHO = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed ?out", re.IGNORECASE)
_COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")


class Monitor:
    """The look-out of one rank; use as a context manager around all that the ranks do together.

    Leaving it with an error tells the others. Where that error came out of a collective, it does not return: once the cause
    is known, or is known to be unknown, the process ends with `EXIT_DEAD_RANK` or `EXIT_HANG`.
    """

    def __init__(
        self, rank: int, ranks: int, *, local_rank: int, folder: Path, watchdog: float,
        share: Callable[[Callable[[], bytes]], bytes],
    ) -> None:  # fmt: skip
        """`folder` takes logs and stacks; `watchdog` is in seconds, 0 for none. `share(make)` is called once, on every
        rank, and gives all of them what `make` returns on rank 0, which the others reach as MASTER_ADDR."""
        self.rank, self.ranks, self.folder, self.watchdog = rank, ranks, folder, watchdog
        self.log = RankLog(folder / f"rank-{rank:05d}.log")
        self.progress = Progress(self.log.line)
        self._local_rank, self._share = local_rank, share
        self._me = Beat(rank, socket.gethostname(), os.getpid(), os.getppid())
        self._beats, self._answers, self._has_stacks = 0, 0, False
        self._clock, self._looked = 0.0, 0.0
        self._judge_of_first = Judge([0], 0.0, "", self._clock)
        self._beside: dict[int, Beat] = {}
        self._wake, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def __enter__(self) -> Self:
        """Raises ConnectionError where rank 0 cannot be reached."""
        self._store = self._connect()
        self._looked = time.monotonic()
        self.log.__enter__()
        # Launchers end the ranks that are left, and one of these has to say why. The training loop has its own way.
        signal.signal(signal.SIGTERM, self._on_signal)
        self._thread.start()
        if self.rank:
            threading.Thread(target=self._expect_answers, name="monitor-answers", daemon=True).start()
        return self

    def open_log(self) -> None:
        """Write the log to its file from now on. Raises OSError where that cannot be."""
        self.log.open(f"rank {self.rank} of {self.ranks} on {self._me.host}, pid {self._me.pid}")

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._me.state == "running":
            self._me = replace(self._me, state="leaving")
            raise SystemExit(128 + number)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        patience = FAREWELL_SECONDS
        if error is None:
            self._me = replace(self._me, state="finished")
        elif self._me.state == "leaving":
            patience = LEAVE_SECONDS
        else:
            for line in "".join(traceback.format_exception(error)).splitlines():
                self.log.line(line)
            text = f"{type(error).__name__}: {error}".partition("\n")[0][:500]
            self._me = replace(self._me, state="failed", error=text, echo=self.ranks > 1 and is_echo(error))
        self._wake.set()
        self._thread.join(patience)
        self.log.__exit__()

    def _connect(self) -> TCPStore:
        host = os.environ["MASTER_ADDR"]
        stores = []

        def listen() -> bytes:
            # Even rank 0's own connection takes five seconds now and then, when many processes start at once.
            store = TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_SECONDS)
            )
            store.set_timeout(timedelta(seconds=SILENT_SECONDS))
            # What is there is answered at once; what is not would be waited for.
            store.set("verdict", "")
            for rank, key in enumerate(self._keys()):
                store.set(key, Beat(rank).to_json())
            stores.append(store)
            return json.dumps(store.port).encode()

        port = json.loads(self._share(listen))
        if stores:
            return stores[0]
        try:
            store = TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_SECONDS))
        except DistError as error:
            raise ConnectionError(
                f"rank {self.rank} on {self._me.host} cannot reach the monitor of rank 0 at {host}:{port} "
                f"({str(error).splitlines()[0]}); allow connections between the hosts on all ports, which collectives need too"
            ) from error
        store.set_timeout(timedelta(seconds=SILENT_SECONDS))
        return store

    def _keys(self) -> list[str]:
        return [f"beat/{rank}" for rank in range(self.ranks)]

    # The thread

    def _run(self) -> None:
        try:
            verdict = self._lead() if self.rank == 0 else self._follow()
            if verdict is not None:
                self._conclude(verdict)
            self._done.set()
        except BaseException:  # nobody would notice the end of a thread, and everybody would miss its beats
            os.write(2, f"the monitor of rank {self.rank} has failed:\n{traceback.format_exc()}".encode())
            os._exit(EXIT_DEAD_RANK)

    def _lead(self) -> Verdict | None:
        """Rank 0: judge until there is a verdict, or None once all is done."""
        judge = Judge(range(self.ranks), self.watchdog, f"{self.folder}/rank-*.stacks", self._clock)
        ended: set[int] = set()
        while True:
            self._beat()
            # Looked for before beats are read, and twice, since a process that ends may just have said why.
            before, ended = ended, self._ended_beside()
            beats = [Beat.from_json(text) for text in self._store.multi_get(self._keys())]
            now = self._time()
            for beat in beats:
                judge.hear(beat, now)
            if judge.ended():
                return None
            self._beside |= {beat.rank: beat for beat in beats[1:] if is_sibling(beat, self._me.host)}
            verdict = judge.gone(before & ended, "its process has ended") or judge.verdict(now)
            if verdict is not None:
                break
            self._pause()
        others = len(set(judge.listeners(verdict)) - {0})
        self._write_stacks(verdict)  # once another rank has ended, this one's collective fails
        self._store.set("listeners", str(others))
        self._store.set("verdict", verdict.to_json())
        self._wait_for("told", others)
        return verdict

    def _wait_for(self, key: str, ranks: int) -> None:
        """Until as many ranks have counted themselves, or for a while."""
        limit = time.monotonic() + TOLD_SECONDS
        while self._store.add(key, 0) < ranks and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)

    def _ended_beside(self) -> set[int]:
        """Ranks on this host whose process has been there and is no more."""
        return {rank for rank, beat in self._beside.items() if not is_sibling(beat, self._me.host)}

    def _follow(self) -> Verdict | None:
        """Other ranks: wait for a verdict of rank 0, and watch it; None once this rank is done."""
        judge = self._judge_of_first
        try:
            while True:
                sent = self._beat()
                # As it was sent: a state of meanwhile is still to be told, or rank 0 takes the end for a death.
                if sent.state == "finished" or (sent.state == "failed" and not sent.echo):
                    return None
                told, first = self._store.multi_get(["verdict", "beat/0"])
                self._answers += 1
                now = self._time()
                judge.hear(Beat.from_json(first), now)
                if told:
                    heard = Verdict.from_json(told)
                    self._write_stacks(heard)
                    with contextlib.suppress(DistError):  # rank 0 has ended, which waits for a while only
                        # The others' stacks are to be those of the hang, not of this rank's end.
                        if heard.kind == "hangs":
                            self._store.add("stacks", 1)
                            self._wait_for("stacks", int(self._store.get("listeners")))
                        self._store.add("told", 1)  # the last word: rank 0 may end now, and the store with it
                    return heard
                verdict = judge.dead(now)
                if verdict is not None:
                    break
                self._pause()
        except DistError as error:
            if self._me.state == "leaving" and judge.ended():
                return None  # a signal has ended both
            verdict = judge.gone([0], f"or cut off: {str(error).splitlines()[0]}")
        return verdict and self._alone(verdict)

    def _expect_answers(self) -> None:
        """Another thread, since a request to a process that is stopped may not return."""
        silence, before = 0.0, self._answers
        while not self._done.wait(BEAT_SECONDS):
            # Counted, not taken from a clock, which runs on while something keeps Python's lock.
            silence, before = (0.0 if self._answers != before else silence + BEAT_SECONDS), self._answers
            verdict = self._judge_of_first.gone([0], f"no answer for {silence:.0f} s")
            if silence > SILENT_SECONDS and verdict is not None:
                self._conclude(self._alone(verdict))

    def _time(self) -> float:
        """Seconds on a clock that stands still while this process is stopped, or something keeps Python's lock."""
        now = time.monotonic()
        self._clock, self._looked = self._clock + min(now - self._looked, 2 * BEAT_SECONDS), now
        return self._clock

    def _alone(self, verdict: Verdict) -> Verdict:
        # Without rank 0 the others know nothing of each other. On its host the next one speaks, on the others the first.
        return replace(verdict, speakers=(self.rank,) if self._local_rank == 0 or self.rank == 1 else ())

    def _pause(self) -> None:
        if self._me.state == "running":
            self._wake.wait(BEAT_SECONDS)
        else:  # the main thread waits
            time.sleep(POLL_SECONDS)

    def _beat(self) -> Beat:
        """Tell the others of this rank; returns what they are told."""
        self._beats += 1
        where, waits = place()
        progress = self.progress
        beat = replace(
            self._me, count=self._beats, signs=progress.signs, step=progress.done, doing=progress.doing, where=where,
            waits=waits, lines=self.log.last,
        )  # fmt: skip
        self._store.set(f"beat/{self.rank}", beat.to_json())
        return beat

    def _write_stacks(self, verdict: Verdict) -> None:
        """Write the stacks of this process, once, if it ends for a hang."""
        if verdict.kind != "hangs" or self._has_stacks:
            return
        self._has_stacks = True
        title = f"{self._me}: {verdict.text.splitlines()[0]}"

        def write() -> None:
            with contextlib.suppress(OSError):
                write_stacks(self.log.path.with_suffix(".stacks"), title)

        # Nobody waits for long: what the ranks hang for may be this very file system.
        writer = threading.Thread(target=write, name="stacks", daemon=True)
        writer.start()
        writer.join(STACKS_SECONDS)

    def _conclude(self, verdict: Verdict) -> None:
        """Tell of the verdict and end the process, unless it is about to end by an error of its own."""
        me = self._me
        if me.state == "failed" and not me.echo:
            return
        backstop = threading.Timer(BACKSTOP_SECONDS, os._exit, [verdict.exit_code])
        backstop.daemon = True
        backstop.start()
        if self.rank in verdict.speakers:
            # Past Python's streams, whose locks the main thread may hold.
            os.write(2, f"\nerror: {verdict.text}\n".encode())
        for beat in verdict.dead:
            end_stopped(beat, me.host)
        self._write_stacks(verdict)
        for line in verdict.text.splitlines():
            self.log.line(line)
        os._exit(verdict.exit_code)


def is_echo(error: BaseException) -> bool:
    """Whether an error may be the fault of another rank: it came out of a collective."""
    if not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError":
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(_ECHO.search(str(error))) or any(
        part in frame.filename for frame in frames[-2:] for part in _COLLECTIVES
    )


def is_sibling(beat: Beat, host: str) -> bool:
    """Whether a rank's process is on this host, a child of this process's parent, and has not ended."""
    if beat.host != host or not beat.pid:
        return False
    try:
        process = psutil.Process(beat.pid)
        return process.ppid() == beat.parent == os.getppid() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_stopped(beat: Beat, host: str) -> None:
    """Kill a silent rank of this host that is stopped or stuck, which its launcher would give another half minute."""
    with contextlib.suppress(psutil.Error):
        if is_sibling(beat, host):
            psutil.Process(beat.pid).kill()
