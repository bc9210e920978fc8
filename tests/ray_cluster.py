"""A Ray cluster of two nodes on this machine, until stdin ends; in a Python that has ray.

Says its address, and on a line of stdin kills a process whose title begins so, of whatever node:
"ray::ServeReplica", "ray::MapWorker".
"""

# pyright: basic, reportMissingImports=false

import os
import signal
import sys
from pathlib import Path

from ray.cluster_utils import Cluster


def processes(title):
    """Those of a title, but for the ingress of Ray Serve, which is a replica too."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if words.startswith(title.encode()) and b":ingress" not in words:
            yield int(path.parent.name)


def main():
    # Actors that take every processor leave none for what Ray itself does.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    try:
        cluster.add_node(num_cpus=3)
        sys.stdout.write(cluster.address + "\n")
        sys.stdout.flush()
        for line in sys.stdin:
            killed = next(iter(sorted(processes(line.strip()))), 0)
            if killed:
                os.kill(killed, signal.SIGKILL)
            sys.stdout.write(f"{killed}\n")
            sys.stdout.flush()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
