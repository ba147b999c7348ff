"""The selection set of CUDA graphs: what each way of calling a model costs on it, and what choosing by measurement loses.

python tests/regression/bench_graphs.py [--out DIR] [--only mlp,bert] [--seconds 1.0] [--limit 450] [--warm] [--device cpu --tiny]

Arms: eager, torch.compile (twice: A/A), reduce-overhead, a graph captured by hand of the eager and of the compiled call, ours under
each strategy through `kernel_pytorch.optimize`. A workload has a process of its own. All of them build their peers at the same time;
then one at a time builds ours, which decide by timing, and times all arms in turns. `latency` waits after every call, `throughput`
after 20 or more. Arms are checked against eager on fresh numbers, at known addresses and at new ones; a wrong one is shown as WRONG.
One JSON file a workload, rewritten as arms are done. --warm compiles into Inductor's cache and times nothing. Records, asserts no time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from graph_arms import work
from graph_workloads import WORKLOADS


def options_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--only", default="", help="workloads, comma-separated; default all but bert_plain")
    parser.add_argument("--arms", default="", help="only arms whose name holds one of these words; eager and compile always run")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of timing an arm")
    parser.add_argument("--limit", type=float, default=450.0, help="seconds in all; workloads that are left then are not timed")
    parser.add_argument("--build-seconds", type=float, default=200.0, help="seconds for all peers of a workload to compile")
    parser.add_argument("--arm-seconds", type=int, default=120, help="seconds for one arm to compile and capture")
    parser.add_argument("--jobs", type=int, default=6, help="workloads that compile at the same time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class Worker:
    """The process of one workload: compiles, says that it is ready, and goes on when told to."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.began = name, time.monotonic()
        self.ready_file = options.out / f"{name}.ready"
        for old in (self.ready_file, options.out / f"graphs_{name}.json"):
            old.unlink(missing_ok=True)
        self.log = (options.out / f"{name}.log").open("w", encoding="utf-8")
        command = [sys.executable, __file__, "--worker", name, *sys.argv[1:], "--out", str(options.out)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT, text=True)

    def is_ready(self) -> bool:
        return self.ready_file.exists() or self.process.poll() is not None

    def go(self, seconds: float) -> str | None:
        """Lets it build ours and time; why there is no result, or None."""
        if self.process.poll() is None:
            try:
                self.process.communicate("go\n", timeout=seconds)
            except subprocess.TimeoutExpired:
                self.stop()
                return "out of time"
        return None if self.process.returncode == 0 else f"ended with {self.process.returncode}, see {self.name}.log"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.ready_file.unlink(missing_ok=True)
        self.log.close()


def compile_all(names: list[str], options: argparse.Namespace) -> list[Worker]:
    """Starts a worker a workload, at most `jobs` of them compiling; those that take too long are ended."""
    waiting, workers = list(names), []
    while waiting or not all(worker.is_ready() for worker in workers):
        busy = [worker for worker in workers if not worker.is_ready()]
        for worker in busy:
            if time.monotonic() - worker.began > options.build_seconds:
                worker.stop()
        if waiting and len(busy) < options.jobs:
            workers.append(Worker(waiting.pop(0), options))
        else:
            time.sleep(0.1)
    return workers


def main(options: argparse.Namespace) -> None:
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.only.split(",") if options.only else [name for name in WORKLOADS if name != "bert_plain"]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "kernel_pytorch_bench_inductor")))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // min(options.jobs, len(names)))))
    workers = compile_all(names, options)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    records = []
    for worker in workers:
        left = options.limit - (time.monotonic() - began)
        failed = worker.go(max(left, 0.0))
        worker.close()
        path = options.out / f"graphs_{worker.name}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"workload": worker.name, "arms": []}
        if failed is not None:
            record["failed"] = failed
            print(f"{worker.name}: {failed}\n" + "\n".join(path.with_name(f"{worker.name}.log").read_text().splitlines()[-12:]), flush=True)
        records.append(record)
        (options.out / "bench_graphs.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        print(table(record), flush=True)
    print(f"{time.monotonic() - began:.0f} s in all", flush=True)


def table(record: dict[str, Any]) -> str:
    """One workload as text. Memory: MB that the arm keeps, and the most that it has in a ring of calls, both beyond eager's."""
    lines = [f"\n{record['workload']}: {record.get('what', '')} {record.get('failed', '')}".rstrip()]
    noise = record.get("noise", {})
    if noise:
        lines[0] += f" A/A {noise['latency'] - 1:+.1%} {noise['throughput'] - 1:+.1%}"
    columns = f"{'latency us (p10-p90)':>27s} {'regret':>7s} {'thru. us':>9s} {'regret':>7s} {'of arms that keep outputs':>25s}"
    lines.append(f"  {'arm':26s} {columns} kept MB  max MB  first s build s graphs")
    for arm in record["arms"]:
        if "failed" in arm:
            lines.append(f"  {arm['arm']:26s} {arm['failed'][:110]}")
            continue
        row = f"  {arm['arm']:26s}"
        if "latency_regret" in arm:
            low, high = arm["latency_range_us"]
            row += f" {arm['latency_us']:9.1f} ({low:7.1f}-{high:7.1f}) {arm['latency_regret']:7.3f} {arm['throughput_us']:9.1f}"
            row += f" {arm['throughput_regret']:7.3f} {arm['latency_regret_keeping']:12.3f} {arm['throughput_regret_keeping']:12.3f}"
        else:
            row += " " * 81
        memory = [arm.get("kept_mb_beyond_eager"), arm.get("max_mb_beyond_eager")]
        row += " ".join(f"{value:7.1f}" if value is not None else f"{'-':>7s}" for value in memory)
        row += f" {arm.get('first_call_s', 0):7.1f} {arm.get('build_s', 0):7.1f} {arm.get('num_captures', 0):6d} {arm.get('verdict', '')}"
        lines.append(row)
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = options_of()
    if chosen.worker:
        work(chosen)
    else:
        main(chosen)
