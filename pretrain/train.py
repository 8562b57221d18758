"""`pretrain train`: read the configuration, then train."""

from pathlib import Path

from pretrain import config, scheduler
from pretrain.cli import fail


def main(argv: list[str]) -> int:
    """Train, or go on with, a run. What a user can mend ends as one line; an error in the loop keeps its traceback."""
    stop = scheduler.Stop()
    try:
        settings = config.parse(argv)
        from pretrain import (  # torch and lightning take seconds: a typing error should not
            checkpoint,
            parallel,
            preparation,
            ranks,
            trainer,
        )

        run_dir = Path(settings.run_dir)
        newest = max((step for step, _ in checkpoint.committed(run_dir)), default=0)
        scheduler.check_restarts(run_dir, newest, settings.train.max_restarts)
        run = preparation.prepare(settings)
    except (ValueError, OSError) as error:
        fail("pretrain train", error)
    status = trainer.train(run, stop)
    stop.over()
    ranks.barrier()  # a launcher gives the others seconds from the first that leaves; rank 0 has logs to finish
    parallel.leave()
    return status
