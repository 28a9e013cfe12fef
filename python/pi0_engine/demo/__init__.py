"""The closed loop: a small trained π0 and the simulated robot that it drives (docs/closed_loop.md)."""
