"""Text to shards: the first half of Cria's journey. The command is `data-prep`; `data_prep.shard` is the door out."""


def not_installed(error: ModuleNotFoundError) -> str:
    """The line for a package that is missing, with what installs it. Raises `error` again where a file of Cria's own is."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "data_prep", "pretrain"):
        raise error
    return f"{package} is not installed here; in Cria's folder `make setup` installs all it needs, in .venv"
