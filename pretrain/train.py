"""`pretrain train`: read the configuration, then train."""

from pathlib import Path

from pretrain import config, scheduler
from pretrain.cli import fail
from pretrain.imports import importing


def main(argv: list[str]) -> int:
    """Train, or go on with, a run. What a user can mend ends as one line; an error in the loop keeps its traceback."""
    stop = scheduler.Stop()
    try:
        settings = config.parse(argv)
        with importing():  # not before: torch and lightning take seconds, and a typing error should not
            from pretrain import checkpoint, parallel, preparation, ranks, trainer

        run_dir = Path(settings.run_dir)
        scheduler.check_restarts(run_dir, checkpoint.updates(run_dir), settings.train.max_restarts)
        run = preparation.prepare(settings)
    except (ValueError, OSError) as error:
        fail("pretrain train", error)
    status = trainer.train(run, stop)
    stop.over()
    ranks.barrier()  # a launcher gives the others seconds from the first that leaves; rank 0 has logs to finish
    parallel.leave()
    return status
