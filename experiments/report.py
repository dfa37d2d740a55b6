"""Turn the JSON files in results/ into the tables of README.md.

python experiments/report.py            write README.md and results/README.md
python experiments/report.py --check    write nothing, list what is outdated

A result is outdated if the code that it depends on has changed since. Comments,
docstrings and formatting do not count. If anything is outdated, --check ends
with status 2.
"""

import json
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

from experiments.findings import IDEAS, baseline_of, finding_text, together_text, variant_mean
from experiments.provenance import REPOSITORY, WITHOUT_RESULTS, code_hash
from support.cli import Parser
from support.files import atomic_write

RESULTS = REPOSITORY / "results"
BEGIN = "<!-- tables: python experiments/report.py -->"
END = "<!-- end of tables -->"
AXES = {  # of the shapes in results/kernels.json
    "laser": ("B", "H", "T", "D"),
    "simplicial": ("B", "H", "Hkv", "T", "D"),
    "sonew": ("matrices", "rows", "columns"),
    "lora_rite": ("pairs", "width", "rank"),
    "loss": ("tokens", "width", "vocabulary"),
    "cross_entropy": ("tokens", "vocabulary"),
    "ttt_context": ("spans", "H", "Hkv", "span", "T", "D"),
}
KERNEL_HEADER = ["kernel", "shape", "best peer, ms", "ours, ms", "ours / peer", "floor / ours"]


def load_results():
    """Return {name: record} of all results: studies in the order of the ideas, then the others."""
    records = {}
    for path in RESULTS.glob("*.json"):
        records[path.stem] = json.loads(path.read_text())

    names = []
    for study in [*(idea.file for idea in IDEAS), "all"]:
        names += [f"{study}-gpu", f"{study}-cpu"]
    names += sorted(set(records) - set(names))
    return {name: records[name] for name in names if name in records}


# -- tables ----------------------------------------------------------------------------------------


def table(header, rows):
    """Return a Markdown table. header: a list of texts; rows: a list of such lists."""
    lines = []
    for cells in (header, ["---"] * len(header), *rows):
        escaped = [cell.replace("|", "\\|") for cell in cells]  # "|" would end the cell
        lines.append("| " + " | ".join(escaped) + " |")
    return "\n".join(lines)


def ideas_table(records):
    """Return the table of the ideas: what the papers claim, and what was measured here."""
    header = ["idea", "the paper's claim", "did it hold here?", "measured here, 95% intervals"]
    return table(header, [idea_row(idea, records) for idea in IDEAS])


def idea_row(idea, records):
    files = [file_link(f"{idea.file}.py"), file_link(f"kernels/{idea.file}.py")]
    lines = finding_lines(idea, idea.findings, records)
    commands = command_lines(idea, idea.findings + idea.controls, records)
    return [
        "<br>".join([f"[{idea.name}](https://arxiv.org/abs/{idea.arxiv})", *files]),
        idea.claim,
        idea.verdict,
        "<br>".join(lines + commands),
    ]


def record_of(idea, finding, records):
    """Return the record of the study that has a finding, None if there is none yet."""
    study = finding.study
    if study not in records and study == f"{idea.file}-gpu":
        study = "all-gpu"  # it has the losses of each idea, too
    record = records.get(study)
    return record if record and finding.variant in record["differences"] else None


def finding_lines(idea, findings, records):
    """Return what was measured, a line for each finding."""
    lines = []
    for finding in findings:
        record = record_of(idea, finding, records)
        text = finding_text(record, finding) if record else f"{finding.label}: not measured yet"
        lines.append(f"{text}, older code" if record and changed_files(record) else text)
    return lines


def command_lines(idea, findings, records):
    """Return the commands that measured the findings, and how long they took."""
    studies = {}  # {command: the records that it wrote}
    for finding in findings:
        record = record_of(idea, finding, records)
        if record and record not in studies.setdefault(record["command"], []):
            studies[record["command"]].append(record)
    return [f"`{command}`, {minutes_of(written)}" for command, written in studies.items()]


def minutes_of(records):
    """Return how long a command's studies took. On GPUs, runs at the same time add up."""
    minutes = f"{sum(record['seconds'] for record in records) / 60:.0f} min"
    gpu = records[0]["hardware"].partition("NVIDIA ")[2]
    return f"{minutes} of runs ({gpu})" if gpu else minutes


def file_link(path):
    """Return a link to a file of the repository, with its number of lines, rounded to tens."""
    lines = len((REPOSITORY / path).read_text().splitlines())
    return f"[{path}]({path}) ({round(lines, -1)} lines)"


def study_rows(record):
    """Return a row for each difference: baseline, variant, difference, whether it is resolved."""
    differences = list(record["differences"].items())
    for more in ("differences_at_equal_seconds", "differences_to_band_1"):  # other baselines
        differences += record.get(more, {}).items()

    rows = []
    for variant, difference in differences:
        baseline = difference.get("baseline") or baseline_of(record, variant)
        mean = difference["mean"]
        half_width = difference["half_width_95"]
        rows.append(
            [
                f"{baseline} {variant_mean(record, baseline):.4g}",
                f"{variant} {variant_mean(record, variant):.4g}",
                f"{mean:+.3g} ± {half_width:.2g} (n = {difference['n']})",
                "resolved" if abs(mean) > half_width else "not resolved",
            ]
        )
    return rows


def kernels_table(record):
    """Return the table of our kernels, each compared with the fastest peer."""
    rows = []
    for kernel, measured in record["kernels"].items():
        rows += kernel_rows(kernel, measured)
    return table(KERNEL_HEADER, rows)


def kernel_rows(kernel, measured):
    peers = [row for row in measured if is_peer(kernel, row)]
    return [kernel_row(kernel, row, peers) for row in measured if is_ours(row)]


def kernel_row(kernel, ours, peers):
    peers = [peer for peer in peers if peer["shape"] == ours["shape"]]
    peer_text = "none"
    ratio = ""
    if peers:
        best = min(peers, key=total_ms)
        peer_text = f"{best['name']}: {total_ms(best):.3f}"
        ratio = f"{total_ms(ours) / total_ms(best):.2f}"
    name = kernel if ours["name"] == "ours" else f"{kernel}, {ours['name']}"
    shape = ", ".join(f"{axis} {n}" for axis, n in zip(AXES[kernel], ours["shape"]))
    return [name, shape, peer_text, f"{total_ms(ours):.3f}", ratio, f"{ours['of_floor']:.0%}"]


def is_ours(row):
    """Return whether this is our fastest kernel. On Hopper, the one in plain Triton is not."""
    return row["name"].startswith(("ours", "band")) and "Triton" not in row["name"]


def is_peer(kernel, row):
    """Return whether this is a fast kernel of others that computes the same as ours."""
    if row["name"].startswith(("ours", "band", "eager")):
        return False
    return kernel != "laser" or row["name"].startswith("paper")  # softmax attention is not LASER


def total_ms(row):
    return sum(row[name] for name in ("forward_ms", "backward_ms", "step_ms") if name in row)


def steps_table(record):
    """Return the table of training steps: a row per size of the model, a column per variant."""
    variants = {}
    for size in record["shapes"].values():  # {variant: what was measured}
        variants |= size

    rows = []
    for name, size in record["shapes"].items():
        rows.append([name, *(step_cell(size[v]) if v in size else "" for v in variants)])
    return table(["model", *(v.replace("+", " + ") for v in variants)], rows)


def step_cell(row):
    """Return the time of a step, and its weak scaling or its ratio to the baseline."""
    time = f"{row['ms_per_step']:.1f} ms"
    if "weak_scaling" in row:
        return f"{time}, weak scaling {row['weak_scaling']:.3f}"
    return time if row["ratio"] == 1 else f"{time}, x {row['ratio']:.3f}"


def all_tables(records):
    """Return the Markdown between the two markers of README.md."""
    parts = []
    if "all-gpu" in records:
        parts.append(together_text(records["all-gpu"]))
    parts.append(ideas_table(records))
    if "kernels" in records:
        record = records["kernels"]
        kernels = record["kernels"]
        rows = [kernel_rows(i.file, kernels[i.file])[0] for i in IDEAS if i.file in kernels]
        parts.append(
            f"Forward and backward pass or step of the kernels ({made_on(record)}). The floor is "
            f"the time of their FLOPs or bytes at the speed of a large matrix product or copy."
        )
        parts.append(table(KERNEL_HEADER, rows))
    if "bench_train" in records:
        record = records["bench_train"]
        ratio = "Time of a training step with GPT-2's vocabulary, and its ratio"
        parts.append(f"{ratio} ({made_on(record)}):")
        parts.append(steps_table(record))
    return "\n\n".join(parts)


def made_on(record):
    """Return the hardware and the version of PyTorch of a result, and whether code has changed."""
    text = f"{record['hardware']}, torch {record['versions']['torch']}"
    return f"{text}, older code" if changed_files(record) else text


def results_readme(records):
    """Return the text of results/README.md: what was found, then one section per JSON file."""
    parts = ["# Results", "Written by `python experiments/report.py`: findings, then every study."]
    parts.append(
        "A difference is resolved if its 95% interval, Student's t over n seeds, excludes 0. The "
        "commit is the one that wrote the file; its runs on GPUs may be older. They were kept when "
        "a change of the code left the first 40 steps on a CPU as they were, bit for bit; this was "
        "compared by hand. On GPUs, the last bits of SONew's steps have changed since. Some runs "
        "shared a GPU, so that their seconds cannot be compared."
    )
    for idea in IDEAS:
        lines = finding_lines(idea, idea.findings + idea.controls, records)
        parts.append(f"## {idea.name}")
        parts.append("\n".join(f"- {line}" for line in lines))
    for name, record in records.items():
        parts.append(f"## {name}")
        if "question" in record:
            parts.append(record["question"])
        versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
        origin = [
            f"- command: `{record['command']}`",
            f"- commit: {record['commit']}",
            f"- hardware: {record['hardware']}",
            f"- versions: {versions}",
            f"- seconds: {record['seconds']:.0f}",
        ]
        if "source" in record:
            origin.insert(0, f"- explained in: [{record['source']}](../{record['source']})")
        parts.append("\n".join(origin))
        if "differences" in record:
            parts.append(f"Metric: {record['metric']}.")
            header = ["baseline", "variant", "difference, 95% interval", ""]
            parts.append(table(header, study_rows(record)))
        if "kernels" in record:
            parts.append(kernels_table(record))
        if "shapes" in record:
            parts.append(steps_table(record))
        if (RESULTS / f"{name}.png").exists():
            parts.append(f"![{name}]({name}.png)")
    return "\n\n".join(parts) + "\n"


# -- what is outdated ------------------------------------------------------------------------------


def changed_files(record):
    """Return the source files that a result depends on and that have changed since it was made."""
    commit = record["commit"] or "unknown"
    if "code" not in record or not re.fullmatch("[0-9a-f]{40}", commit):
        return [f"unknown code ({commit})"]
    changed = []
    for path, recorded_hash in record["code"].items():
        file = REPOSITORY / path
        if path in WITHOUT_RESULTS:
            continue
        if not file.is_file() or code_hash(file) != recorded_hash:
            changed.append(path)
    return changed


def outputs(records):
    """Return {path: text} of the generated files."""
    path = REPOSITORY / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}")
    readme = f"{before}{BEGIN}\n\n{all_tables(records)}\n\n{END}{after}"
    return {path: readme, RESULTS / "README.md": results_readme(records)}


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only check")
    args = parser.parse_args(argv)
    records = load_results()

    # results made with older code
    stale = []
    for name, record in records.items():
        files = changed_files(record)
        if files:
            stale.append(f"results/{name}.json")
            print(f"{stale[-1]} is older than {', '.join(files)}; run {record['command']}")

    # generated files
    changed = []
    for path, text in outputs(records).items():
        if not path.exists() or path.read_text() != text:
            changed.append(str(path.relative_to(REPOSITORY)))
            if not args.check:
                with atomic_write(path) as file:
                    file.write(text.encode())

    if args.check and (changed or stale):
        raise ValueError(f"out of date: {', '.join(changed + stale)}")
    print("wrote " + ", ".join(changed) if changed else "all tables are up to date")
    return {"stale": stale, "changed": changed}


if __name__ == "__main__":
    cli.run_main(main)
