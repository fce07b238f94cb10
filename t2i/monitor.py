"""Each rank's look-out for the others: one that is dead or hangs ends the whole job, with a line that says which and why.

    with Monitor(rank, ranks, local_rank=0, folder=run_dir / "logs", watchdog=1800, share=...) as monitor:
        ...
        monitor.progress.step(1)

It works in a thread and over connections of its own, since a collective may never return: rank 0 listens, and every other
rank holds one connection to it. The system ends a connection the moment a process dies, however it dies, so death is
noticed at once; a host without power or a stopped process by its silence (`t2i.liveness` has the rules). Rank 0
judges; the others judge rank 0. A verdict reaches every rank, and each then ends its process, whatever its main
thread is in. Work and messages are proportional to the number of ranks, on rank 0 alone.

Only plain JSON lines are sent, after a secret that rank 0 has shared by a collective: what else connects is turned away.
"""

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from t2i.beats import EXIT_DEAD_RANK, Beat, Progress, State, Verdict, beat_from, speaker, verdict_from, verdict_to_json
from t2i.liveness import BEAT_SECONDS, SILENT_SECONDS, Judge
from t2i.rank_log import RankLog, born, place, write_stacks

TICK_SECONDS = 0.5
"""Between two looks at what has come."""
PARTING_SECONDS = 2.0
"""How long rank 0 waits for the others to have read its last word."""
FAREWELL_SECONDS = 30.0
"""How long a rank that has finished waits for the others."""
BACKSTOP_SECONDS = 5.0
"""The process ends this long after a verdict even if it cannot be written down: the disk may be what hangs."""
LINGER_SECONDS = 20.0
"""The same for a rank that ends by an error of its own, and has that to tell."""
LINE_LIMIT = 1 << 22
"""Bytes of a message."""

_ECHO = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed ?out", re.IGNORECASE)
_COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")


class Monitor:
    """The look-out of one rank; use as a context manager around all that the ranks do together.

    Leaving it without an error tells the others that this rank is done. Leaving it with an error tells them of that, and
    does not return where another rank turns out to be the cause: the process then ends with `EXIT_DEAD_RANK`.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        *,
        local_rank: int,
        folder: Path,
        watchdog: float,
        share: Callable[[Callable[[], bytes]], bytes],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        """`folder` takes logs and stacks; `watchdog` is in seconds, 0 for none. `share(make)` is called once, on every
        rank, and gives all of them what `make` returns on rank 0, which the others reach as MASTER_ADDR."""
        self.rank, self.ranks, self.folder, self.watchdog = rank, ranks, folder, watchdog
        self.progress = Progress()
        self.log = RankLog(folder / f"rank-{rank:05d}.log")
        self._share, self._end = share, end
        self._me = Beat(rank, local_rank, socket.gethostname(), os.getpid(), born(os.getpid()))
        self._state: State = "running"
        self._error, self._echo = "", False
        self._socket: socket.socket | None = None
        self._peers: dict[int, asyncio.StreamWriter] = {}
        self._told: Verdict | None = None
        self._dismissed = False
        self._over = threading.Event()

    def __enter__(self) -> Self:
        """Raises OSError where rank 0 cannot be reached."""
        if self.ranks > 1:
            self._connect()
        self.log.__enter__()
        threading.Thread(target=self._run, name="monitor", daemon=True).start()
        return self

    def open_log(self) -> None:
        """Write the log to its file from now on. Raises OSError where that cannot be."""
        self.log.open(f"rank {self.rank} of {self.ranks} on {self._me.host}, pid {self._me.pid}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._state = "finished"
            self._over.wait(FAREWELL_SECONDS)
        else:
            for line in "".join(traceback.format_exception(error)).splitlines():
                self.log.line(line)
            self._error, self._echo = f"{type(error).__name__}: {error}".partition("\n")[0][:500], is_echo(error)
            self._state = "failed"
            # In the second case the process is most often ended here, by the monitor's thread.
            self._over.wait(SILENT_SECONDS + BACKSTOP_SECONDS if self._echo else BACKSTOP_SECONDS)
        self.log.__exit__()

    # Connections

    def _connect(self) -> None:
        def listen() -> bytes:
            self._socket = _listener(self.ranks)
            return json.dumps({"port": self._socket.getsockname()[1], "secret": secrets.token_hex(16)}).encode()

        address = json.loads(self._share(listen))
        self._secret = address["secret"]
        if self.rank:
            host = os.environ["MASTER_ADDR"]
            try:
                self._socket = socket.create_connection((host, address["port"]), timeout=SILENT_SECONDS)
            except OSError as error:
                raise OSError(
                    f"rank {self.rank} on {self._me.host} cannot reach the monitor of rank 0 at {host}:{address['port']} "
                    f"({error}); allow connections between the hosts on all ports, as collectives need them too"
                ) from error

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Rank 0: somebody has connected."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, asyncio.TimeoutError):
            hello = json.loads(await asyncio.wait_for(reader.readline(), BACKSTOP_SECONDS))
            if secrets.compare_digest(str(hello["secret"]), self._secret) and 0 < hello["rank"] < self.ranks:
                await self._converse(hello["rank"], reader, writer)
        writer.close()

    async def _converse(self, peer: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take in what a rank says, until the connection ends."""
        self._peers[peer] = writer
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            async for line in reader:
                message = json.loads(line)
                if "beat" in message:
                    beat = beat_from(message["beat"])
                    self._judge.hear(beat, time.monotonic())
                    if beat.state == "finished" and self.rank == 0:
                        writer.write(b'{"bye": true}\n')
                elif "verdict" in message:
                    self._told = verdict_from(message["verdict"])
                else:
                    self._dismissed = True
        self._judge.end(peer, time.monotonic())
        self._peers.pop(peer, None)
        writer.close()

    # The thread

    def _run(self) -> None:
        try:
            verdict = asyncio.run(self._watch())
            if verdict is not None:
                self._conclude(verdict)
        except BaseException:  # nobody would notice the end of a thread, and everybody would miss its beats
            os.write(2, f"the monitor of rank {self.rank} has failed:\n{traceback.format_exc()}".encode())
            self._end(EXIT_DEAD_RANK)
        self._over.set()

    async def _watch(self) -> Verdict | None:
        """Listen and speak until there is a verdict, or None once all is done."""
        leads = self.rank == 0
        self._judge = Judge(
            range(self.ranks) if leads else [0], self.watchdog if leads else 0.0,
            f"{self.folder}/rank-*.stacks", time.monotonic(),
        )  # fmt: skip
        if self._socket is not None and leads:
            server = await asyncio.start_server(self._welcome, sock=self._socket, limit=LINE_LIMIT)
        elif self._socket is not None:
            reader, writer = await asyncio.open_connection(sock=self._socket, limit=LINE_LIMIT)
            writer.write(json.dumps({"secret": self._secret, "rank": self.rank}).encode() + b"\n")
            talk = asyncio.create_task(self._converse(0, reader, writer))
            await asyncio.sleep(0)
        said, at = "", -BEAT_SECONDS
        verdict: Verdict | None = None
        while True:
            now = time.monotonic()
            if now - at >= BEAT_SECONDS or said != self._state:
                own = self._beat()
                said, at = own.state, now
                if leads:
                    self._judge.hear(own, now)
                self._say(json.dumps({"beat": asdict(own)}))
            verdict = self._told or self._judge.verdict(now)
            if verdict is not None:
                if leads:
                    self._say(f'{{"verdict": {verdict_to_json(verdict)}}}')
                break
            if (
                self._judge.all_finished()
                if leads
                else self._dismissed or (self._judge.has_ended(0) and self._is_done())
            ):
                break
            await asyncio.sleep(TICK_SECONDS)
        if leads and self._socket is not None:
            # A process that goes while words to it are unread takes along words of its own that are on their way.
            limit = time.monotonic() + PARTING_SECONDS
            while self._peers and time.monotonic() < limit:
                await asyncio.sleep(0.05)
            server.close()
        elif self._socket is not None:
            writer.close()
            talk.cancel()
        return verdict

    def _is_done(self) -> bool:
        return self._state == "finished" or self._judge.all_finished()

    def _beat(self) -> Beat:
        where, waits = place()
        progress = self.progress
        return replace(
            self._me, state=self._state, step=progress.done, ticks=progress.ticks, phase=progress.phase, where=where,
            waits=waits, error=self._error, follow_up=self._echo, lines=self.log.last,
        )  # fmt: skip

    def _say(self, message: str) -> None:
        for writer in self._peers.values():
            if not writer.is_closing():
                writer.write(message.encode() + b"\n")

    def _conclude(self, verdict: Verdict) -> None:
        """Write the verdict down and end the process, unless it is about to end by an error of its own."""
        fault = self._state == "failed" and (not self._echo or any(beat.rank == self.rank for beat in verdict.gone))
        patience = LINGER_SECONDS if fault else BACKSTOP_SECONDS
        backstop = threading.Timer(patience, self._end, [verdict.exit_code])
        backstop.daemon = True
        backstop.start()
        if not fault and self._me.local_rank == speaker(self._me.host, verdict):
            # Past Python's streams, whose locks the main thread may hold.
            os.write(2, f"\nerror: {verdict.text}\n".encode())
        for beat in verdict.gone:
            end_stopped(beat, self._me.host)
        with contextlib.suppress(OSError):
            if verdict.kind == "hangs":
                write_stacks(self.log.path.with_suffix(".stacks"), f"{self._beat()} {self._beat().progress}")
        if not fault:
            for line in verdict.text.splitlines():
                self.log.line(line)
            self._end(verdict.exit_code)


def is_echo(error: BaseException) -> bool:
    """Whether an error may be the fault of another rank: it came out of a collective."""
    if not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError":
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(_ECHO.search(str(error))) or any(
        part in frame.filename for frame in frames[-2:] for part in _COLLECTIVES
    )


def end_stopped(beat: Beat, host: str) -> None:
    """Kill a silent rank of this host that is stopped or stuck, for its launcher would give it another half minute.

    Nothing is done unless it is, without doubt, a process of the same launcher.
    """
    parent = beat.born.partition(":")[0]
    if beat.host == host and beat.pid != os.getpid() and parent == str(os.getppid()) and born(beat.pid) == beat.born:
        with contextlib.suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGKILL)


def _listener(ranks: int) -> socket.socket:
    """A listening socket on a free port, for both versions of the protocol where the host has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # switched off on this host
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=ranks, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=ranks)
