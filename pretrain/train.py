"""`pretrain train`: read the configuration, then train."""

import argparse
import os
import resource
from contextlib import suppress
from pathlib import Path

import yaml

from pretrain import config, scheduler
from pretrain.cli import fail
from pretrain.imports import importing


def main(argv: list[str]) -> int:
    """Train, or go on with, a run. What a user can mend ends as one line; an error in the loop keeps its traceback.

    An OSError (the machine's problem) ends the job for good, status 2, only at its first start; at a restart the status is
    LATER, because what worked before may work again.
    """
    stop = scheduler.Stop()
    _open_many_files()
    try:
        settings = config.parse(argv)
        run_dir = Path(settings.run_dir)
        _refuse_another_folder(argv, run_dir)
        with importing():  # not before: torch and lightning take seconds, and a typing error should not
            from pretrain import checkpoint, parallel, preparation, ranks, trainer

        scheduler.check_restarts(run_dir, checkpoint.updates(run_dir), settings.train.max_restarts)
        run = preparation.prepare(settings, stop)
    except ValueError as error:
        fail("pretrain train", error)
    except OSError as error:
        fail("pretrain train", error, scheduler.LATER if scheduler.repeated() else 2)
    scheduler.note_training()
    status = trainer.train(run, stop)
    stop.over()
    ranks.barrier()  # a launcher gives the others seconds from the first that leaves; rank 0 has logs to finish
    parallel.leave()
    return status


def _refuse_another_folder(argv: list[str], run_dir: Path) -> None:
    """Raise ValueError for a run's own config.yaml where the run's folder was moved or copied: it names the folder before."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config", type=Path, action="append", default=[])
    options.add_argument("--run_dir")
    given, _ = options.parse_known_args(argv)
    copied = os.environ.get("CRIA_CONFIG")  # launch/slurm.sbatch's word for the file that it has made a copy of
    files = [*given.config, *([Path(copied)] if copied else [])]
    for file in files if given.run_dir is None else ():
        if not (file.name == "config.yaml" and file.is_file() and (file.parent / "metrics.jsonl").exists()):
            continue  # no run's own
        with suppress(yaml.YAMLError, KeyError, TypeError):  # the original of the copy has been changed since
            says = Path(yaml.safe_load(file.read_text())["run_dir"])
            if says != run_dir or (run_dir.exists() and file.parent.samefile(run_dir)):  # a later file says another one
                continue
            raise ValueError(
                f"{file} lies in a run's folder and says run_dir {run_dir}, which is another one: was it moved or copied? Say "
                f"which is meant: --run_dir {file.parent}, or --run_dir {run_dir}"
            )


def _open_many_files() -> None:
    """As many as this process may: shards stay open, 256 a dataset, and 1,024 is what many systems begin with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
