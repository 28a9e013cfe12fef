"""The subcommands of ``pi0-engine``, one typed dataclass each: its fields are the options, ``run`` the work.

In: what was typed. Out: text or JSON, and an exit status. torch is imported when a command runs, not for its help.
"""
