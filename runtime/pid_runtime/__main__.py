"""`python -m pid_runtime` is `pid-decode`."""

import sys

from pid_runtime.command.decode_cli import main

if __name__ == "__main__":
    sys.exit(main())
