"""`python -m pid_runtime` is `pid-decode`."""

import sys

from pid_runtime.command.entry import pid_decode

if __name__ == "__main__":
    sys.exit(pid_decode())
