"""Do the gains of LASER, 2-simplicial attention and SONew add up?

python experiments/all_ideas.py               the same GPT and data, on GPUs
python experiments/all_ideas.py --minutes 8   stop then; call again to go on

Writes results/all-gpu.json and .png.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

from experiments import language_models
from experiments.harness import check_writable, deadline_after, study_parser


def main(argv=None):
    parser = study_parser(__doc__)
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after so many minutes")
    args = parser.parse_args(argv)
    out = check_writable(args.out)
    return language_models.run("all", out, deadline_after(args.minutes))


if __name__ == "__main__":
    cli.run_main(main)
