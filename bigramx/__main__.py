"""`python -m bigramx`, and the `bigramx` command."""

import signal
import sys


def main() -> None:
    """Runs the command line; where a package is missing, exits with one line that names it."""
    try:
        from bigramx.cli import run

        run()
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit(f"bigramx: the command line needs {error.name}; type: pip install typer rich matplotlib")
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
