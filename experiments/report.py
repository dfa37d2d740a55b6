"""Turn the files in results/ into tables.

python experiments/report.py            write the tables of README.md, results/
python experiments/report.py --check    only say what is out of date, status 2

A result is stale if the code that it depends on has changed since the commit
that it records.
"""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

from support import cli
from support.checkpoint import atomic_write
from support.cli import Parser

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "results"
STUDIES = ["laser", "simplicial", "sonew", "lora_rite", "ttt_context", "all"]
CORE = ["train.py", "support"]
BEGIN = "<!-- tables: python experiments/report.py -->"
END = "<!-- end of tables -->"


def load_results():
    """Return {name: record} of all results, studies first."""
    records = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    order = [f"{name}-{size}" for name in STUDIES for size in ("cpu", "gpu")]
    names = [name for name in order if name in records]
    names += sorted(set(records) - set(names))
    return {name: records[name] for name in names}


# -- tables ----------------------------------------------------------------------------------------


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value):
    """Four significant digits."""
    return f"{value:.4g}"


def study_rows(name, record):
    """One row per difference: question, baseline, variant, difference, verdict."""
    rows = []
    means = {}
    for variant, content in record["variants"].items():
        means[variant] = statistics.mean(run["value"] for run in content["runs"])
    for variant, difference in record["differences"].items():
        # "TASK: VARIANT" is compared with the baseline of its own task
        task, colon, _ = variant.rpartition(": ")
        baseline = f"{task}{colon}{record['baseline']}"
        is_resolved = abs(difference["mean"]) > difference["half_width_95"]
        interval = f"{number(difference['mean'])} ± {number(difference['half_width_95'])}"
        rows.append(
            [
                f"{name.rpartition('-')[0]}, {record['metric']}",
                f"{baseline} {number(means[baseline])}",
                f"{variant} {number(means[variant])}",
                f"{interval} (n = {difference['n']})",
                "resolved" if is_resolved else "not resolved",
                f"`{record['command']}`",
                f"{record['seconds']:.0f} s",
            ]
        )
    return rows


def studies_table(records):
    header = ["study, metric", "baseline", "variant", "difference, 95%", "", "command", "time"]
    rows = []
    for name, record in records.items():
        if "differences" in record:
            rows += study_rows(name, record)
    return table(header, rows)


def kernels_table(record):
    header = ["kernel", "shape", "best peer, ms", "ours, ms", "ratio", "of the floor"]
    rows = []
    for kernel, measured in record["kernels"].items():
        for row in measured:
            if not row["name"].startswith(("ours", "band")) or "Triton" in row["name"]:
                continue
            same_shape = [peer for peer in measured if peer["shape"] == row["shape"]]
            peers = [p for p in same_shape if is_peer(kernel, p)]
            best = min(peers, key=total_ms, default=None)
            name = kernel if row["name"] == "ours" else f"{kernel}, {row['name']}"
            shape = " x ".join(map(str, row["shape"]))
            peer_text = f"{best['name']}: {total_ms(best):.3f}" if best else "none"
            ratio = f"{total_ms(row) / total_ms(best):.2f}" if best else ""
            floor = f"{row['of_floor']:.0%}"
            rows.append([name, shape, peer_text, f"{total_ms(row):.3f}", ratio, floor])
    return table(header, rows)


def is_peer(kernel, row):
    """What computes the same; plain softmax attention does not compute LASER."""
    if row["name"].startswith(("ours", "band", "eager")):
        return False
    return kernel != "laser" or row["name"].startswith("paper")


def total_ms(row):
    return sum(row[name] for name in ("forward_ms", "backward_ms", "step_ms") if name in row)


def steps_table(record):
    header = ["training step", *record["shapes"]]
    variants = list(next(iter(record["shapes"].values())))
    rows = []
    for variant in variants:
        cells = [variant]
        for shape in record["shapes"].values():
            cells.append(f"{shape[variant]['ms_per_step']:.1f} ms, {shape[variant]['ratio']:.3f}")
        rows.append(cells)
    return table(header, rows)


def all_tables(records):
    """Return the Markdown between the two markers of README.md."""
    parts = [studies_table(records)]
    if "kernels" in records:
        record = records["kernels"]
        where = f"{record['hardware']}, torch {record['versions']['torch']}"
        parts += [f"Kernels, forward + backward or one step, {where}:", kernels_table(record)]
    if "bench_train" in records:
        record = records["bench_train"]
        where = f"{record['hardware']}, torch {record['versions']['torch']}"
        note = "Whole training steps and their ratio to softmax + AdamW"
        parts += [f"{note}, {where}:", steps_table(record)]
    return "\n\n".join(parts)


def results_readme(records):
    """Return results/README.md: a section per file."""
    parts = ["# Results", "Written by `python experiments/report.py`. A section per file."]
    for name, record in records.items():
        parts.append(f"## {name}")
        if "question" in record:
            parts.append(record["question"])
        origin = [f"- command: `{record['command']}`", f"- commit: {record['commit']}"]
        versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
        origin += [f"- hardware: {record['hardware']}", f"- versions: {versions}"]
        origin.append(f"- seconds: {record['seconds']:.0f}")
        parts.append("\n".join(origin))
        if "differences" in record:
            parts.append(studies_table({name: record}))
        if (RESULTS / f"{name}.png").exists():
            parts.append(f"![{name}]({name}.png)")
    return "\n\n".join(parts) + "\n"


# -- what is out of date ---------------------------------------------------------------------------


def dependencies(name):
    """Return the files that decide the numbers of a result."""
    if name == "kernels":
        return ["kernels"]
    if name.startswith("bench_"):
        return [*CORE, "kernels", "sample.py", *(f"{study}.py" for study in STUDIES[:4])]
    study = name.rpartition("-")[0]
    own = [f"{study}.py", f"experiments/{study}.py", f"kernels/{study}*.py"]
    return [*CORE, *own, "experiments/harness.py"]


def is_stale(name, record):
    commit = record["commit"] or "unknown"
    if commit.endswith("-dirty"):
        return True
    command = ["git", "-C", str(REPOSITORY), "diff", "--quiet", commit, "--", *dependencies(name)]
    return subprocess.run(command, capture_output=True).returncode != 0


def outputs(records):
    """Return {path: text} of the generated files."""
    path = REPOSITORY / "README.md"
    text = path.read_text()
    pattern = f"{re.escape(BEGIN)}.*?{re.escape(END)}"
    if not re.search(pattern, text, re.S):
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}")
    tables = f"{BEGIN}\n\n{all_tables(records)}\n\n{END}"
    readme = re.sub(pattern, lambda _: tables, text, flags=re.S)
    return {path: readme, RESULTS / "README.md": results_readme(records)}


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only check")
    args = parser.parse_args(argv)
    records = load_results()
    stale = [name for name, record in records.items() if is_stale(name, record)]
    for name in stale:
        print(
            f"results/{name}.json is older than the code it depends on: {records[name]['command']}"
        )

    changed = []
    for path, text in outputs(records).items():
        if not path.exists() or path.read_text() != text:
            changed.append(str(path.relative_to(REPOSITORY)))
            if not args.check:
                with atomic_write(path) as file:
                    file.write(text.encode())
    if args.check and (changed or stale):
        names = changed + [f"results/{name}.json" for name in stale]
        raise ValueError(f"out of date: {', '.join(names)}")
    print("wrote " + ", ".join(changed) if changed else "all tables are up to date")
    return {"stale": stale, "changed": changed}


if __name__ == "__main__":
    cli.run_main(main)
