"""`pretrain train`: read the configuration, then train."""

from pretrain import config
from pretrain.cli import fail


def main(argv: list[str]) -> int:
    """Train, or go on with, a run. What a user can mend ends as one line; an error in the loop keeps its traceback."""
    try:
        settings = config.parse(argv)
        from pretrain import (  # torch and lightning take seconds: a typing error should not
            parallel,
            preparation,
            trainer,
        )

        run = preparation.prepare(settings)
    except (ValueError, OSError) as error:
        fail("pretrain train", error)
    status = trainer.train(run)
    parallel.leave()
    return status
