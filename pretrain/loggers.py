"""What the metrics go to besides metrics.jsonl: TensorBoard, or Weights & Biases, and the life of a run there.

make_loggers ─> start_wandb: reached, offline, or refused ─> `metrics.MetricsLog` writes ─> finish_wandb: upload, for a while
"""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers import Logger, TensorBoardLogger

from data_prep.shard import write_atomically
from pretrain.sections import Config

WANDB_ID = "wandb-id.txt"
"""In the run's folder: the id of its W&B run."""
_WANDB_FINISH_S = 60
"""So long W&B may upload at the end; what it has not by then lies on the disk for `wandb sync`."""
_WANDB_ANSWERED = re.compile(r"returned error 4(?!08|29)\d\d|: input:")
"""In an error of communication: W&B was reached and says no, to the key, the project or the request."""


def make_loggers(config: Config) -> list[Logger]:
    """What `logger` in the configuration asks for, writing into the run's folder."""
    run_dir = Path(config.run_dir)
    if config.logger == "tensorboard":
        return [TensorBoardLogger(root_dir=run_dir, name="tensorboard", version="", default_hp_metric=False)]
    if config.logger == "wandb":
        from lightning.pytorch.loggers import WandbLogger  # Fabric takes it as it is; the import is slow

        number = _kept_id(run_dir) or secrets.token_hex(4)
        project = os.environ.get("WANDB_PROJECT", "cria")
        return [WandbLogger(project=project, name=run_dir.name, save_dir=str(run_dir), log_model=False, id=number)]
    return []


def _kept_id(run_dir: Path) -> str:
    """The W&B run's id; none, "", where the folder is a copy of one that is still where its id was kept."""
    kept = run_dir / WANDB_ID
    number, _, place = (kept.read_text().strip() if kept.exists() else "").partition("\n")
    original = Path(place) / WANDB_ID
    with suppress(OSError):  # it is not there any more, or somebody's own
        if place and not original.samefile(kept) and original.read_text().startswith(number):
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"{run_dir} is a copy of {place} and becomes a run of its own at W&B; if it was moved and is to go on as run "
                    f"{number}, delete {original} first",
                    flush=True,
                )
            return ""
    return number


def start_wandb(run_dir: Path, loggers: list[Logger]) -> None:
    """Join or begin the W&B run, and keep its id: started again, the run is the same one there too.

    Raises:
        ValueError: W&B was reached and refuses.
        OSError: the id cannot be kept.
    """
    wandb_logger: Any
    for wandb_logger in (logger for logger in loggers if type(logger).__name__ == "WandbLogger"):
        from wandb.errors import AuthenticationError, CommError, Error

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(_WANDB_FINISH_S))  # else it uploads for as long as it takes
        os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")
        try:
            try:
                wandb_logger.experiment  # noqa: B018  starts it; WandbLogger resumes a run whose id is known
            except (CommError, TimeoutError) as error:
                if isinstance(error, AuthenticationError) or _WANDB_ANSWERED.search(str(error)):
                    raise
                _go_offline(error)
                wandb_logger.experiment  # noqa: B018
        except Error as error:
            raise ValueError(
                f"logger is wandb, and W&B did not start: {error} Set WANDB_API_KEY, or WANDB_MODE=offline and `wandb sync` it "
                "later, or take --logger tensorboard"
            ) from error
        write_atomically(run_dir / WANDB_ID, f"{wandb_logger.version}\n{run_dir.resolve()}\n".encode())


def _go_offline(error: Exception) -> None:
    """Have the next W&B run of this process be kept on the disk."""
    import wandb

    with suppress(SystemExit):  # of a service that ended badly
        wandb.teardown()  # else the run's id stays taken, and the environment is not read again
    os.environ["WANDB_MODE"] = "offline"
    reason = " ".join(str(error).split())
    say(f"W&B cannot be reached, its run goes on offline, and `wandb sync` uploads it later: {reason}")


def finish_wandb(wandb_logger: Any) -> None:
    """Upload, for so long as it may take."""
    run = wandb_logger.experiment
    try:
        run.finish()
    except TimeoutError:
        say(f"W&B did not upload everything in time; later, `wandb sync {Path(run.dir).parent}` does")


def say(line: str) -> None:
    """On rank 0's standard output."""
    with suppress(OSError):  # which may lie on the same disk
        print(line, flush=True)
