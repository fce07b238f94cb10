"""Train a model; started by the DeepSpeed launcher, or alone for a single process.

    deepspeed t2i/train.py nar-xl-256 --deepspeed_config deepspeed_configs/zero2.json [--train.steps 100 ...]

The first argument is a recipe's name or the recipe.json that an earlier run wrote. Every field of the recipe is an
option (`--help` after a recipe lists them). The same command again goes on from the newest checkpoint. Exit codes:
0 trained to the end, 1 a disk or the network has failed, 2 a mistake in what was asked for, 85 stopped by SIGINT (Ctrl-C),
SIGTERM or SIGUSR1 with everything saved, 130 interrupted before or while that could be done, 143 ended by SIGTERM before
training began, 86 another rank has died or failed, 87 a rank hangs: no step was done for `train.watchdog_seconds`.
docs/faults.md has more.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

# Started as a script, Python puts this file's folder first on the path, where modules would shadow libraries.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> int:
    """Parse the command line and train; returns the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--deepspeed_config", type=Path)
    parser.add_argument("--local_rank", type=int)  # inserted by the launcher, which also sets LOCAL_RANK
    known, rest = parser.parse_known_args()

    import tyro

    from t2i.config import Recipe
    from t2i.errors import RunError
    from t2i.recipes import RECIPES, find_recipe

    usage = f"usage: deepspeed t2i/train.py RECIPE --deepspeed_config FILE [--FIELD VALUE ...]\nrecipes: {', '.join(RECIPES)}"
    if known.recipe is None:
        print(usage, file=sys.stdout if {"-h", "--help"} & set(rest) else sys.stderr)
        return 0 if {"-h", "--help"} & set(rest) else 2
    started = False
    try:
        recipe = tyro.cli(
            tyro.conf.AvoidSubcommands[Recipe], default=find_recipe(known.recipe), args=rest, description=usage,
            prog="t2i/train.py RECIPE --deepspeed_config FILE",
        )  # fmt: skip
        if known.deepspeed_config is None:
            raise ValueError("no --deepspeed_config; give one of the files in deepspeed_configs/")

        from t2i.engine import (
            FOR_EVER,
            GROUP_TIMEOUT,
            broadcast_bytes,
            read_deepspeed_config,
            start_runtime,
            stop_runtime,
        )
        from t2i.liveness import START_FACTOR
        from t2i.monitor import Monitor
        from t2i.training import EXIT_SAVED, Trainer

        deepspeed_config = read_deepspeed_config(known.deepspeed_config)
        # A collective waits longer than the watchdog, which knows more of who is waited for.
        watchdog = recipe.train.watchdog_seconds
        runtime = start_runtime(GROUP_TIMEOUT + START_FACTOR * watchdog if watchdog else FOR_EVER)
        with Monitor(
            runtime.rank, runtime.ranks, local_rank=int(os.environ["LOCAL_RANK"]), folder=recipe.run_dir / "logs",
            watchdog=watchdog, share=partial(broadcast_bytes, runtime),
        ) as monitor:  # fmt: skip
            judge = None
            if recipe.eval.geneval_every and runtime.is_first:
                from eval.in_training import geneval_judge

                judge = geneval_judge(recipe.eval, recipe.train.seed, str(runtime.device))
            trainer = Trainer(recipe, deepspeed_config, runtime, judge)
            started = True
            monitor.open_log()
            outcome = trainer.run(monitor.progress)
    except (ValueError, OSError) as error:
        # All ranks of a node stumble over the same mistake, before training; later, each over its own samples.
        alike = not started or isinstance(error, RunError)
        if not alike or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        # A mistake would be made again; a disk or a network may be there the next time.
        return 1 if isinstance(error, OSError) and (started or isinstance(error, ConnectionError)) else 2
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted; the same command again goes on from the newest checkpoint", file=sys.stderr)
        return 130
    if runtime.is_first:
        print(f"{outcome.step} steps done; run folder {recipe.run_dir}")
        if outcome.stopped_by_signal:
            print("stopped by a signal and saved; the same command again goes on from here")
    stop_runtime()
    return EXIT_SAVED if outcome.stopped_by_signal else 0


if __name__ == "__main__":
    sys.exit(main())
