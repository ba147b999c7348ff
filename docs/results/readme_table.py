"""The README's table of measured figures, made from the records beside this file: python docs/results/readme_table.py

Writes it between the README's `results` markers; a test compares what stands there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent
README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->\n"
HEAD = "| workload | machine, date | arm | time | against the baseline | error |\n|---|---|---|---|---|---|\n"


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def minilm() -> list[str]:
    """Sentence embeddings on a CPU, both instruction sets."""
    lines = []
    for name, isa in (("cpu_int8_amx", "AMX"), ("cpu_int8_vnni", "no AMX")):
        found = record(name)
        for shape, arms in found["shapes"].items():
            for arm in ("eager", "compiled", "torchao W8A8 + compile", "cpu_int8"):
                row = arms[arm]
                shown = "`cpu_int8`" if arm == "cpu_int8" else arm
                where = f"2-core Xeon, {isa}, {found['date']}"
                ratio, error = f"{row['ratio_to_eager']:.2f}x", f"least cosine {row['cosine_min']:.4f}"
                lines.append(
                    f"| MiniLM {shape.replace('x', ' x ')} tokens | {where} | {shown} | {row['median_ms']:.1f} ms | {ratio} | {error} |"
                )
    return lines


def decode(name: str, arms: tuple[str, ...]) -> list[str]:
    """One decode step of a Llama-3-8B shape; the baseline is compiled bf16."""
    found = record(name)
    rows = {row["arm"]: row for row in found["rows"] if "ms" in row}
    lines = []
    for arm in arms:
        row, error = rows[arm], rows[arm]["sqnr_db"]
        work = f"Llama-3-8B shape, decode, batch {row['batch']}, {found['context']:,} tokens"
        speed = f"{row['ms']:.2f} ms, {row['tokens_per_s']:,.0f} tokens/s"
        against = f"{rows['bf16']['ms'] / row['ms']:.2f}x"
        machine = found["gpu"].removeprefix("NVIDIA ").removesuffix(" 80GB HBM3")
        lines.append(f"| {work} | {machine}, {found['date']} | {arm} | {speed} | {against} | {f'{error:.1f} dB' if error else ''} |")
    return lines


def table() -> str:
    lines = minilm()
    ours = ("ours fp8 + attention *", "ours nvfp4 + attention *")
    lines += decode("h200_decode_batch1", ("bf16", "torchao fp8wo", "torchao int4 *", "gemlite fp8 *", *ours))
    lines += decode("h200_decode_batch8", ("bf16", "torchao fp8dq", "gemlite fp8 *", *ours))
    return HEAD + "\n".join(lines) + "\n"


def write() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    write()
