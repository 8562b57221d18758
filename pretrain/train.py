"""`pretrain train`: read the configuration, then train."""

import resource
from pathlib import Path

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
        with importing():  # not before: torch and lightning take seconds, and a typing error should not
            from pretrain import checkpoint, parallel, preparation, ranks, trainer

        run_dir = Path(settings.run_dir)
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


def _open_many_files() -> None:
    """As many as this process may: shards stay open, 256 a dataset, and 1,024 is what many systems begin with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
