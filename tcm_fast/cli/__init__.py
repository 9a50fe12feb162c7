"""The command line. A command is a dataclass of its arguments and a function that returns an exit status."""

FAILED, USER_MISTAKE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
STOPPED = 75  # asked to stop and saved: --resume auto goes on (sysexits' EX_TEMPFAIL)
