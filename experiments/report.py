"""Turn the JSON files in results/ into the tables of README.md.

python experiments/report.py            write README.md and results/README.md
python experiments/report.py --check    write nothing, list what is outdated

A result is outdated if the code that it depends on has changed since. Comments,
docstrings and formatting do not count. If anything is outdated, --check ends
with status 2.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

from experiments.harness import paired_difference
from experiments.provenance import code_hash
from support.cli import Parser, run_main
from support.files import atomic_write

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "results"


class Idea(NamedTuple):
    name: str
    arxiv: str
    claim: str  # what the paper says
    file: str  # NAME of NAME.py, kernels/NAME.py, results/NAME-gpu.json and results/NAME-cpu.json


class Finding(NamedTuple):
    """A result that README.md shows: a variant next to its baseline, and their difference."""

    study: str  # NAME of results/NAME.json
    variant: str
    label: str
    kind: str = ""  # the difference is shown as it is, in "percent", or of a "log10" as a ratio
    baseline: str = ""  # default: the study's


IDEAS = [
    Idea(
        "LASER attention",
        "2411.03493",
        "attend over exp(V), take the log: larger gradients at the logits, a lower loss",
        "laser",
    ),
    Idea(
        "2-simplicial attention",
        "2507.02754",
        "score pairs of keys with a trilinear form: a lower loss, a steeper scaling law",
        "simplicial",
    ),
    Idea(
        "SONew",
        "2311.10085",
        "precondition with the inverse of a band of E[g gᵀ], in closed form: 30% fewer steps",
        "sonew",
    ),
    Idea(
        "LoRA-RITE",
        "2410.20625",
        "update B A in a way that does not depend on how it is factored: better fine-tuning",
        "lora_rite",
    ),
    Idea(
        "query-only test-time training",
        "2512.13898",
        "train the query projections on a long prompt instead of writing thinking tokens",
        "ttt_context",
    ),
]
FINDINGS = [
    Finding("laser-gpu", "LASER", "loss of a GPT", "percent"),
    Finding("laser-124m-gpu", "LASER", "loss of a GPT of 124 M parameters", "percent"),
    Finding(
        "laser-cpu",
        "trained with LASER, rows with max p > 0.9: LASER",
        "gradient at peaked logits",
        "log10",
    ),
    Finding("simplicial-gpu", "2-simplicial", "loss of a GPT", "percent"),
    Finding("simplicial-cpu", "composition: 2-simplicial", "accuracy, composing two functions"),
    Finding("simplicial-cpu", "Match3: 2-simplicial", "accuracy, finding triples (Match3)"),
    Finding("sonew-gpu", "SONew", "loss of a GPT", "percent"),
    Finding("sonew-gpu", "SONew, 30% fewer steps", "loss in 30% fewer steps", "percent"),
    Finding("sonew-cpu", "SONew, band 1", "loss of an autoencoder", "percent"),
    Finding("sonew-cpu", "SONew, band 0", "the same with the diagonal alone", "percent"),
    Finding("lora_rite-gpu", "LoRA-RITE", "log-probability of right answers"),
    Finding("lora_rite-cpu", "LoRA-RITE", "drift under another factorization", "log10"),
]
# against what the paper compares with, and against the better baseline that we added
for task in ("records", "columns"):
    for norm, label in (("no QK-norm", ""), ("QK-norm", ", QK-norm")):
        setting = f"{task}, {norm}, 3072"
        for baseline in ("equal-FLOP thinking", "fitted temperature"):
            FINDINGS.append(
                Finding(
                    "ttt_context-cpu",
                    f"{setting}: trained queries",
                    f"log odds on {task}{label}",
                    baseline=f"{setting}: {baseline}",
                )
            )
BEGIN = "<!-- tables: python experiments/report.py -->"
END = "<!-- end of tables -->"
STUDY_HEADER = ["baseline", "variant", "difference, 95% interval", ""]


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


def variant_means(record):
    """Return {variant: mean value of its runs}."""
    means = {}
    for variant, entry in record["variants"].items():
        means[variant] = statistics.mean(run["value"] for run in entry["runs"])
    return means


def baseline_of(record, variant):
    """Return the name of the baseline. In a study of several tasks, names are "TASK: VARIANT"."""
    task, colon, _ = variant.rpartition(": ")
    return f"{task}{colon}{record['baseline']}"


def ideas_table(records):
    """Return the table of the ideas: what the papers claim, and what was measured here."""
    header = ["idea", "the paper's claim", "measured here, with 95% intervals", "files", "command"]
    return table(header, [idea_row(idea, records) for idea in IDEAS])


def idea_row(idea, records):
    measured = []
    times = {}  # command: how long it took
    for finding in FINDINGS:
        if not finding.study.startswith(f"{idea.file}-"):
            continue
        if finding.study not in records:
            measured.append(f"{finding.label}: not measured yet")
            continue
        record = records[finding.study]
        text = finding_text(record, finding)
        measured.append(f"{text}, older code" if changed_files(record) else text)
        times[command_of(record)] = minutes_of(record)
    commands = [f"`{command}`, {time}" for command, time in times.items()]
    link = f"[{idea.name}](https://arxiv.org/abs/{idea.arxiv})"
    files = f"{file_link(f'{idea.file}.py')}, {file_link(f'kernels/{idea.file}.py')}"
    return [link, idea.claim, "<br>".join(measured), files, "<br>".join(commands)]


def finding_text(record, finding):
    """Return a finding as text, such as "loss: softmax 0.718, LASER 0.708 (-1.4 ± 0.5%)"."""
    means = variant_means(record)
    baseline = finding.baseline or baseline_of(record, finding.variant)
    values = [means[baseline], means[finding.variant]]
    difference = record["differences"][finding.variant]
    if finding.baseline:
        runs = record["variants"][finding.variant]["runs"]
        difference = paired_difference(runs, record["variants"][baseline]["runs"])
    mean = difference["mean"]
    half_width = difference["half_width_95"]

    if finding.kind == "percent":
        change = percent(difference, values[0])
    elif finding.kind == "log10":
        low = 10 ** (mean - half_width)
        high = 10 ** (mean + half_width)
        change = f"x {10**mean:.3g}, {low:.3g} to {high:.3g}"
        values = [10**value for value in values]
    else:
        change = f"{mean:+.2f} ± {half_width:.2f}"
    names = [name.rpartition(": ")[2] for name in (baseline, finding.variant)]  # without the task
    pair = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, values))
    return f"{finding.label}: {pair} ({change})"


def percent(difference, baseline):
    """Return a difference and its interval in percent of the baseline's value."""
    mean = 100 * difference["mean"] / baseline
    half_width = 100 * difference["half_width_95"] / baseline
    return f"{mean:+.1f} ± {half_width:.1f}%"


def together_text(record):
    """Return what the ideas change alone and together, in a sentence."""
    baseline = variant_means(record)[record["baseline"]]
    changes = []
    for variant, difference in record["differences"].items():
        changes.append(f"{variant} {percent(difference, baseline)}")
    return f"Loss of a GPT, against {record['baseline']}: {', '.join(changes)}."


def minutes_of(record):
    """Return how long a study took. On several GPUs its runs add up."""
    minutes = f"{record['seconds'] / 60:.0f} min"
    _, _, gpu = record["hardware"].partition("NVIDIA ")
    return f"{minutes} of one {gpu}" if gpu else minutes


def command_of(record):
    """Return the command that made a result, without the time limit of its last run."""
    return record["command"].partition(" --minutes")[0]


def file_link(path):
    """Return a link to a file of the repository, with its number of lines, rounded to tens."""
    lines = len((REPOSITORY / path).read_text().splitlines())
    return f"[{path}]({path}) ({round(lines, -1)} lines)"


def study_rows(record):
    """Return a row for each difference between a variant and a baseline, as in STUDY_HEADER."""
    means = variant_means(record)
    differences = list(record["differences"].items())
    differences += record.get("differences_at_equal_seconds", {}).items()  # to other baselines

    rows = []
    for variant, difference in differences:
        baseline = difference.get("baseline") or baseline_of(record, variant)
        mean = difference["mean"]
        half_width = difference["half_width_95"]
        rows.append(
            [
                f"{baseline} {means[baseline]:.4g}",
                f"{variant} {means[variant]:.4g}",
                f"{mean:+.3g} ± {half_width:.2g} (n = {difference['n']})",
                "resolved" if abs(mean) > half_width else "not resolved",
            ]
        )
    return rows


def kernels_table(record):
    """Return the table of our kernels, each compared with the fastest peer."""
    rows = []
    for kernel, measured in record["kernels"].items():
        peers = [row for row in measured if is_peer(kernel, row)]
        for row in measured:
            if is_ours(row):
                rows.append(kernel_row(kernel, row, peers))
    return table(["kernel", "shape", "best peer, ms", "ours, ms", "ratio", "of the floor"], rows)


def kernel_row(kernel, ours, peers):
    peers = [peer for peer in peers if peer["shape"] == ours["shape"]]
    peer_text = "none"
    ratio = ""
    if peers:
        best = min(peers, key=total_ms)
        peer_text = f"{best['name']}: {total_ms(best):.3f}"
        ratio = f"{total_ms(ours) / total_ms(best):.2f}"
    name = kernel if ours["name"] == "ours" else f"{kernel}, {ours['name']}"
    shape = " x ".join(map(str, ours["shape"]))
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
    """Return the table of training steps: a row per variant, a column per size of the model."""
    sizes = record["shapes"].values()  # for each size of the model {variant: what was measured}
    variants = {}
    for size in sizes:
        variants |= size

    rows = []
    for variant in variants:
        cells = [step_cell(size[variant]) if variant in size else "" for size in sizes]
        rows.append([variant, *cells])
    return table(["training step", *record["shapes"]], rows)


def step_cell(row):
    """Return the time of a step, and its weak scaling or its ratio to the baseline."""
    time = f"{row['ms_per_step']:.1f} ms"
    if "weak_scaling" in row:
        return f"{time}, weak scaling {row['weak_scaling']:.3f}"
    return f"{time}, {row['ratio']:.3f}"


def all_tables(records):
    """Return the Markdown between the two markers of README.md."""
    parts = []
    if "all-gpu" in records:
        parts.append("![the ideas alone and together](results/all-gpu.png)")
        parts.append(together_text(records["all-gpu"]))
    parts.append(ideas_table(records))
    if "kernels" in records:
        record = records["kernels"]
        parts.append(f"Kernels, forward + backward or one step, {made_on(record)}:")
        parts.append(kernels_table(record))
    if "bench_train" in records:
        record = records["bench_train"]
        parts.append(f"Whole training steps and their ratio to softmax + AdamW, {made_on(record)}:")
        parts.append(steps_table(record))
    return "\n\n".join(parts)


def made_on(record):
    return f"{record['hardware']}, torch {record['versions']['torch']}"


def results_readme(records):
    """Return the text of results/README.md: one section per JSON file."""
    parts = ["# Results", "Written by `python experiments/report.py`. A section per file."]
    for name, record in records.items():
        parts.append(f"## {name}")
        if "question" in record:
            parts.append(record["question"])
        versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
        origin = [
            f"- command: `{command_of(record)}`",
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
            parts.append(table(STUDY_HEADER, study_rows(record)))
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
            print(f"{stale[-1]} is older than {', '.join(files)}; run {command_of(record)}")

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
    run_main(main)
