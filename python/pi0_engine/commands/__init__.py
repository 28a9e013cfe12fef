"""The subcommands of ``pi0-engine``, one file each: a typed dataclass whose ``run`` returns the exit status."""
