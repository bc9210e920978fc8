"""The `pid-decode` command, and what every command line of pid-trt shares."""
