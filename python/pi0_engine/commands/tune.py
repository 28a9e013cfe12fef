from dataclasses import dataclass
@dataclass(frozen=True)
class Tune:
    """x"""
    def run(self) -> int: return 0
