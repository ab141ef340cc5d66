"""`kd`, and `python -m kdlib`, for torchrun and wherever `kd` is not on the path."""

import os
import sys

from kdlib.runs import processes


def main() -> None:
    """Entry point: from here on an interrupt has our last words, also amid imports, and also a second one."""
    os.environ[processes.IS_COMMAND] = str(os.getpid())
    try:
        with processes.bare_errors():
            from kdlib.workbench import cli
        cli.main()
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code > 128:
            sys.stdout.flush()
            os._exit(ended.code)  # all is on disk, and to take torch apart would take seconds
        raise


if __name__ == "__main__":
    main()
