"""A Ray cluster of two nodes on this machine, until stdin ends; in a Python that has ray.

Says its address, and on a line "kill" of stdin kills a replica, of whatever node.
"""

# pyright: basic, reportMissingImports=false

import os
import signal
import sys
from pathlib import Path

from ray.cluster_utils import Cluster


def replicas():
    """Processes of replicas, but for the ingress."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if words.startswith(b"ray::ServeReplica") and b":ingress" not in words:
            yield int(path.parent.name)


def main():
    # Actors that take every processor leave none for what Ray itself does.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    try:
        cluster.add_node(num_cpus=3)
        sys.stdout.write(cluster.address + "\n")
        sys.stdout.flush()
        for line in sys.stdin:
            if line == "kill\n":
                killed = next(iter(sorted(replicas())))
                os.kill(killed, signal.SIGKILL)
                sys.stdout.write(f"{killed}\n")
                sys.stdout.flush()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
