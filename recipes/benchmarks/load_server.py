"""Load `poet serve` with many clients at once, watch it, kill it, and count what became of every job.

    python recipes/benchmarks/load_server.py               64 clients for five minutes, then `poet batch` on the same
    python recipes/benchmarks/load_server.py --kills 5     killed five times meanwhile (kill -9); no comparison then

Rules:

- Each client asks for a clip of a Toybox caption with a seed of its own, asks again as `openai-poll-after-ms` says,
  downloads the clip, looks at its format and duration, and begins anew. What is refused with 429 is sent again after
  `retry-after-ms`. Every POST has an Idempotency-Key, and one whose answer was lost is sent again.
- Seconds are those in which the server answers: while it starts again after a kill the clock stands.
- A job counts once it was accepted with 200. It must end, completed or failed with a reason, be listed once, and lie in
  one directory with one file that decodes; nothing else may lie there.
- A rate is that of files by the time of their last change, on both sides alike, without the first and the last
  `--batch-size` of them, when not all places were taken. With the first, or with the start, it is stated besides.
- Memory is PSS of the server's processes together. It is flat if the mean of its last third after `--warmup` seconds is
  within 10 % of that of the first.

Traffic goes to 127.0.0.1 alone. Exit status 1: a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import datetime
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
from machine import ROOT, commit, hardware, version_of
from server_process import ServerProcess

if TYPE_CHECKING:
    from poet.bundle import Bundle

NUM_CAPTIONS: Final = 256
NO_ANSWER: Final = "none"  # in the place of a status, with the error
UNFINISHED: Final = ".unfinished-"
POLL_SECONDS: Final = 0.5  # where the server says nothing
SETTINGS: Final = ("clients", "seconds", "warmup", "kills", "batch_size", "seed")
FLAT: Final = 0.1
BAR: Final = 0.9  # of the rate of `poet batch`
say = functools.partial(print, file=sys.stderr, flush=True)


@dataclasses.dataclass
class Asked:
    """One request for a clip, and what became of it.

    Attributes:
        key: of idempotency.
        body: what is asked for.
        begun: seconds of the clock at which it was first sent.
        id: of the job that it became; None: it was not accepted.
        status: that the client saw last.
        latency: seconds until the clip was downloaded, where no kill came in between.
        trouble: what was wrong, or None.
    """

    key: str
    body: Mapping[str, Any]
    begun: float
    id: str | None = None
    status: str | None = None
    latency: float | None = None
    trouble: str | None = None


class Load:
    """Clients that ask for clips, all in one event loop.

    Args:
        url: of the server.
        captions: what they ask for, in turn.
        seconds: that a clip lasts.
        folder: for a clip that is looked at.
        name: begins every Idempotency-Key.
    """

    def __init__(self, url: str, captions: Sequence[str], seconds: float, folder: Path, name: str) -> None:
        self.url, self._captions, self._seconds, self._folder, self._name = url, captions, seconds, folder, name
        self.asked: list[Asked] = []
        self.answers: collections.Counter[str] = collections.Counter()
        self.lost_answers = 0
        self.up = asyncio.Event()
        self.num_kills = 0
        self.is_ending = False

    async def client(self, http: httpx.AsyncClient) -> None:
        """Ask for one clip after another."""
        while not self.is_ending:
            number = len(self.asked)
            body = {"prompt": self._captions[number % len(self._captions)], "seed": number}
            asked = Asked(key=f"{self._name}-{number}", body=body, begun=time.monotonic())
            self.asked.append(asked)
            kills = self.num_kills
            await self._carry_through(http, asked)
            if asked.trouble is not None:
                await asyncio.sleep(1)  # a server that refuses everything is not asked for ever more
            if asked.status == "completed" and kills == self.num_kills:
                asked.latency = time.monotonic() - asked.begun

    async def _carry_through(self, http: httpx.AsyncClient, asked: Asked) -> None:
        answer = await self._send(http, "POST", "/v1/videos", json=asked.body, headers={"idempotency-key": asked.key})
        if answer.status_code != 200:
            asked.trouble = f"POST: {answer.status_code} {answer.text[:200]}"
            return
        video = answer.json()
        asked.id, asked.status = video["id"], video["status"]
        while asked.status in ("queued", "in_progress"):
            await asyncio.sleep(float(answer.headers.get("openai-poll-after-ms", 1000 * POLL_SECONDS)) / 1000)
            answer = await self._send(http, "GET", f"/v1/videos/{asked.id}")
            if answer.status_code != 200:
                asked.trouble = f"GET: {answer.status_code} {answer.text[:200]}"
                return
            video = answer.json()
            asked.status = video["status"]
        if asked.status != "completed":
            asked.trouble = None if (video.get("error") or {}).get("message") else "failed without a reason"
            return
        answer = await self._send(http, "GET", f"/v1/videos/{asked.id}/content")
        if answer.status_code != 200:
            asked.trouble = f"content: {answer.status_code} {answer.text[:200]}"
            return
        asked.trouble = await asyncio.to_thread(self._look, answer)

    async def _send(self, http: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response:
        """Send a request until it is answered with anything but 429."""
        while True:
            await self.up.wait()
            kills = self.num_kills
            try:
                answer = await http.request(method, self.url + path, **more)
            except httpx.TransportError as error:
                if kills == self.num_kills and self.up.is_set():  # nobody killed it
                    self.answers[f"{NO_ANSWER}: {type(error).__name__}"] += 1
                else:
                    self.lost_answers += 1
                await asyncio.sleep(0.2)
                continue
            self.answers[str(answer.status_code)] += 1
            if answer.status_code != 429:
                return answer
            await asyncio.sleep(min(10.0, float(answer.headers.get("retry-after-ms", 1000)) / 1000))

    def _look(self, answer: httpx.Response) -> str | None:
        """What is wrong with a clip as it was downloaded, by its headers; all are decoded later."""
        from poet.errors import MediaError
        from poet.media import probe

        if answer.headers.get("content-type") != "video/mp4":
            return f"content: is {answer.headers.get('content-type')}"
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".mp4") as file:
            file.write(answer.content)
            file.flush()
            try:
                info = probe(file.name)
            except MediaError as error:
                return f"content: {error}"
        if "mp4" not in info.format or not info.has_video or abs(info.duration - self._seconds) > 0.2:
            return f"content: {info.format} of {info.duration:g} seconds"
        return None


async def drive(server: ServerProcess, load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """Let the clients ask, kill the server as often as is wanted, and wait for the last answers."""
    rng = random.Random(options.seed)
    moments = sorted(rng.uniform(0.1, 0.9) * options.seconds for _ in range(options.kills))
    starts, left = [await asyncio.to_thread(server.start, options.start_seconds)], []
    say(f"the server answers after {starts[0]:.1f} seconds")
    load.up.set()
    limits = httpx.Limits(max_connections=options.clients, max_keepalive_connections=options.clients)
    # Nothing of the environment: a proxy is not for this machine.
    async with httpx.AsyncClient(limits=limits, timeout=60, trust_env=False) as http:
        begun, own = time.time(), time.process_time()
        clients = [asyncio.create_task(load.client(http)) for _ in range(options.clients)]
        passed = 0.0
        for moment in moments:
            await watch(server, moment - passed)
            passed = moment
            load.num_kills += 1
            load.up.clear()
            left += await asyncio.to_thread(server.kill)
            say(f"killed at {moment:.1f} seconds, {len(load.asked)} clips asked for")
            starts.append(await asyncio.to_thread(server.start, options.start_seconds))
            load.up.set()
        await watch(server, options.seconds - passed)
        load.is_ending, ended, own = True, time.time(), time.process_time() - own
        say(f"{options.seconds:g} seconds are over; waiting for {sum(not task.done() for task in clients)} clients")
        await watch(server, options.drain_seconds, clients)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        for task in clients:
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
        listed = await list_all(http, load.url)
    return {"window": (begun, ended), "starts": starts, "left": left, "listed": listed, "client_cpu_seconds": own}


async def watch(server: ServerProcess, seconds: float, clients: Sequence[asyncio.Task[None]] = ()) -> None:
    """Wait, and see all the while that the server runs.

    Args:
        server: that is loaded.
        seconds: to wait.
        clients: not longer than until all of them are done; none: the whole time.

    Raises:
        SystemExit: the server ended by itself.
    """
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0 and not (clients and all(task.done() for task in clients)):
        await asyncio.sleep(min(1.0, left))
        server.check()


async def list_all(http: httpx.AsyncClient, url: str) -> list[dict[str, Any]]:
    """Every job that the server lists, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        params = {"limit": 100, "order": "asc"} | ({"after": found[-1]["id"]} if found else {})
        answer = await http.get(f"{url}/v1/videos", params=params)
        if answer.status_code == 429:
            await asyncio.sleep(1)
            continue
        if answer.status_code != 200:
            sys.exit(f"GET /v1/videos: {answer.status_code} {answer.text[:200]}")
        page = answer.json()
        found += page["data"]
        if not page["has_more"]:
            return found


def broken_promises(asked: Sequence[Asked], listed: Sequence[Mapping[str, Any]], server: ServerProcess) -> list[str]:
    """What must not be, after all has ended and the server has stopped: a sentence each."""
    from poet.errors import MediaError
    from poet.media import read_clip

    broken = [f"{one.key}: {one.trouble}" for one in asked if one.trouble is not None]
    accepted = {one.id: one for one in asked if one.id is not None}
    broken += [f"{one.key}: lost, {one.status}" for one in asked if one.status not in ("completed", "failed")]
    if len(accepted) < sum(one.id is not None for one in asked):
        broken.append("two keys were answered with one job")
    counts = collections.Counter(video["id"] for video in listed)
    broken += [f"{id}: listed {count} times" for id, count in counts.items() if count > 1]
    broken += [f"{id}: accepted, and not listed" for id in accepted.keys() - counts.keys()]
    broken += [f"{id}: listed, and nobody's: one request became two jobs" for id in counts.keys() - accepted.keys()]
    for video in listed:
        if video["status"] not in ("completed", "failed"):
            broken.append(f"{video['id']}: {video['status']} at the end")
        elif video["status"] == "failed" and not (video.get("error") or {}).get("message"):
            broken.append(f"{video['id']}: failed without a reason")
    completed = {video["id"] for video in listed if video["status"] == "completed"}
    content = server.data / "content"
    for folder in sorted(content.iterdir()):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if folder.name not in completed or names != ["clip.mp4"]:
            broken.append(f"{folder.name} holds {names}, and belongs to no completed job or to more")
            continue
        try:
            read_clip(folder / "clip.mp4")
        except MediaError as error:
            broken.append(str(error))
    broken += [f"{id}: completed, and without a file" for id in completed - {path.name for path in content.iterdir()}]
    # vLLM leaves sockets among the temporary files; ours begin with our name.
    left = [
        path.name
        for place, ours in ((server.scratch, "poet-*"), (server.data / "scratch", "*"))
        for path in place.glob(ours)
    ]
    broken += [f"{name} is left" for name in left]
    return broken


def rate(times: Sequence[float], wave: int) -> float | None:
    """Files a second without the first wave and the last, when places were empty; None where there are no others.

    Args:
        times: of the files' last change, in any order.
        wave: clips that are written at once.
    """
    ordered = sorted(times)
    if len(ordered) <= 2 * wave:
        return None
    return (len(ordered) - 2 * wave) / max(1e-9, ordered[-1 - wave] - ordered[wave - 1])


def growth(memory: Sequence[tuple[float, float]], begin: float, end: float) -> dict[str, Any]:
    """How memory changed between the first and the last third of a time.

    Args:
        memory: (Unix seconds, MiB).
        begin: of the time, after the warm-up.
        end: of the time.
    """
    inside = [(at, size) for at, size in memory if begin <= at <= end]
    third = (end - begin) / 3
    first = [size for at, size in inside if at <= begin + third]
    last = [size for at, size in inside if at >= end - third]
    if not first or not last:
        return {"first_third_mib": None, "last_third_mib": None, "growth": None, "is_flat": None}
    before, after = statistics.mean(first), statistics.mean(last)
    change = after / before - 1
    return {
        "first_third_mib": round(before),
        "last_third_mib": round(after),
        "growth": round(change, 4),
        "is_flat": abs(change) <= FLAT,
    }


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that this share of all is not above; None of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def run_poet_batch(bodies: Sequence[Mapping[str, Any]], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`poet batch` on the same requests; returns its rates.

    Raises:
        SystemExit: it failed.
    """
    jobs, output = folder / "jobs.jsonl", folder / "batch"
    lines = (json.dumps({"custom_id": str(number), "body": body}) for number, body in enumerate(bodies))
    jobs.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "poet.cli.main", "batch", str(jobs), "-o", str(output), "--json"]
    command += ["--batch-size", str(options.batch_size)]
    command += [] if options.bundle is None else ["--model", str(options.bundle)]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begun
    if done.returncode:
        sys.exit(f"poet batch failed:\n{done.stderr[-3000:]}")
    facts = json.loads(done.stdout)
    times = [path.stat().st_mtime for path in (output / "media").iterdir()]
    return {
        "completed": facts["completed"],
        "failed": facts["failed"],
        "clips_per_second": rounded(rate(times, options.batch_size)),
        "clips_per_second_with_start": rounded(facts["completed"] / seconds),
    }


def rounded(value: float | None, digits: int = 3) -> float | None:
    """For the report."""
    return None if value is None else round(value, digits)


def summarise(
    load: Load, server: ServerProcess, found: Mapping[str, Any], stopped: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """What was measured, and what was broken."""
    begin, end = found["window"]
    times = [path.stat().st_mtime for path in (server.data / "content").glob("*/clip.mp4")]
    inside = [at for at in times if begin <= at <= end]
    latencies = [one.latency for one in load.asked if one.latency is not None]
    statuses = collections.Counter(video["status"] for video in found["listed"])
    errors = sum(count for status, count in load.answers.items() if status not in ("200", "429"))
    status, left = stopped
    promises = broken_promises(load.asked, found["listed"], server)
    promises += [f"a process outlived the server: {name}" for name in [*found["left"], *left]]
    promises += [] if status in (0, -15) else [f"the server ended with status {status} when it was asked to"]
    return {
        "accepted": sum(one.id is not None for one in load.asked),
        "completed": statuses["completed"],
        "failed": statuses["failed"],
        "answers": dict(sorted(load.answers.items())),
        "errors_other_than_429": errors,
        "answers_lost_to_kills": load.lost_answers,
        "clips_per_second": rounded(rate(inside, options.batch_size)) if not options.kills else None,
        "clips_per_second_with_first_wave": rounded(len(inside) / (end - begin)) if not options.kills else None,
        "latency_p50": rounded(percentile(latencies, 0.5), 2),
        "latency_p95": rounded(percentile(latencies, 0.95), 2),
        "start_seconds": [round(seconds, 1) for seconds in found["starts"]],
        "server_cpu_seconds": round(server.cpu_seconds, 1),
        "client_cpu_seconds": round(found["client_cpu_seconds"], 1),
        "memory": {
            "peak_mib": round(max((size for _, size in server.memory), default=0)),
            **({} if options.kills else growth(server.memory, begin + options.warmup, end)),
            "mib_every_ten_seconds": [round(size) for _, size in server.memory[::10]],
        },
        "broken_promises": promises,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as a table of Markdown."""
    load, settings = report["load"], report["settings"]
    memory = load["memory"]
    rows = [
        ("clients, seconds, kills", f"{settings['clients']}, {settings['seconds']:g}, {settings['kills']}"),
        ("accepted, completed, failed", f"{load['accepted']}, {load['completed']}, {load['failed']}"),
        ("answers", ", ".join(f"{status}: {count:,}" for status, count in load["answers"].items())),
        ("errors other than 429", str(load["errors_other_than_429"])),
        ("latency p50, p95", f"{load['latency_p50']}, {load['latency_p95']} s"),
    ]
    if load["clips_per_second_with_first_wave"] is not None:
        rows.append(("clips a second", str(load["clips_per_second"])))
        rows.append(("the same with the first wave", str(load["clips_per_second_with_first_wave"])))
    if report["batch"] is not None:
        rows += [
            ("clips a second of poet batch", str(report["batch"]["clips_per_second"])),
            ("the same with its start", str(report["batch"]["clips_per_second_with_start"])),
            ("server / batch", f"**{report['ratio']}** (bar: {BAR})"),
        ]
    rows.append(("memory at most", f"{memory['peak_mib']:,} MiB"))
    if memory.get("growth") is not None:
        change = f"{memory['first_third_mib']:,} to {memory['last_third_mib']:,} MiB, {100 * memory['growth']:+.1f} %"
        rows.append(("memory, first to last third", f"{change}, {'flat' if memory['is_flat'] else 'NOT FLAT'}"))
    rows.append(("broken promises", str(len(load["broken_promises"]))))
    lines = ["| | |", "|---|---|", *(f"| {title} | {value} |" for title, value in rows)]
    lines += [f"- {promise}" for promise in load["broken_promises"][:20]]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, help="directory of a bundle; none: the shipped one")
    add("--clients", type=int, default=64, help="clients at once")
    add("--seconds", type=float, default=300.0, help="of load; the time that the server takes to start is not counted")
    add("--warmup", type=float, default=30.0, help="seconds after which memory is looked at")
    add("--kills", type=int, default=0, help="times that the server is killed with SIGKILL and started again")
    add("--batch-size", type=int, default=16, help="clips that the server, and poet batch, write at once")
    add("--batch-clips", type=int, help="clips that poet batch writes at most; 0: it is not run; none: as many")
    add("--seed", type=int, default=0, help="of the moments at which the server is killed")
    add("--start-seconds", type=float, default=600.0, help="in which the server must answer")
    add("--drain-seconds", type=float, default=300.0, help="in which jobs must end once no more come")
    add("--work", type=Path, help="empty or new directory for all files; none: a temporary one, removed at the end")
    add("--output", type=Path, default=ROOT / "runs" / "benchmarks" / f"{Path(__file__).stem}.json", help="JSON report")
    options = parser.parse_args(arguments)
    if not (1 <= options.clients <= 1000 and 1 <= options.seconds <= 86_400 and options.batch_size >= 1):
        parser.error("--clients must be from 1 to 1000, --seconds from 1 to 86400, --batch-size at least 1")
    if min(options.kills, options.warmup, options.batch_clips or 0) < 0:
        parser.error("--kills, --warmup and --batch-clips must not be negative")
    if options.warmup >= options.seconds:
        options.warmup = options.seconds / 4
    if options.work is not None and options.work.exists() and any(options.work.iterdir()):
        parser.error(f"{options.work} must be empty")
    return options


def measure(bundle: Bundle, options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The server under load, then `poet batch`; returns what was found of each."""
    from poet.data.toybox import draw

    captions = [draw("seen", index).caption for index in range(NUM_CAPTIONS)]
    arguments = ["--batch-size", str(options.batch_size), "--model", str(bundle.path)]
    server = ServerProcess(folder, arguments)
    name = f"load-{os.getpid()}-{time.time_ns()}"
    stopped: tuple[int | None, list[str]] = (None, [])

    async def go() -> tuple[Load, dict[str, Any]]:
        load = Load(server.url, captions, bundle.geometry().duration, folder, name)
        return load, await drive(server, load, options)

    try:
        load, found = asyncio.run(go())
    finally:
        stopped = server.stop()
    result = summarise(load, server, found, stopped, options)
    bodies = [one.body for one in load.asked if one.status == "completed"][: options.batch_clips]
    if options.kills or not bodies:
        return result, None
    say(f"poet batch on {len(bodies)} of the same requests")
    return result, run_poet_batch(bodies, folder, options)


def main() -> None:
    """Measure, print the table, write the report."""
    options = parse()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from poet.bundle import Bundle, default_bundle

    about = hardware(os.cpu_count() or 1)
    bundle = Bundle.open(options.bundle or default_bundle())
    with tempfile.TemporaryDirectory(prefix="poet-load-") as temporary:
        folder = Path(temporary) if options.work is None else options.work
        folder.mkdir(parents=True, exist_ok=True)
        load, batch = measure(bundle, options, folder)
    ratio = None
    if batch is not None and load["clips_per_second"] and batch["clips_per_second"]:
        ratio = round(load["clips_per_second"] / batch["clips_per_second"], 3)
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit("recipes/benchmarks/*.py", "serving", "poet"),
        "hardware": about,
        "bundle": bundle.path.name,
        "weights": bundle.weights_sha256[:12],
        "versions": {package: version_of(package) for package in ("torch", "vllm")},
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "load": load,
        "batch": batch,
        "ratio": ratio,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    print(f"written to {options.output}")
    if load["broken_promises"] or load["errors_other_than_429"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
