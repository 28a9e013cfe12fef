"""The closed loop: a small trained π0, a simulated robot, and how often it does what it is told (docs/closed_loop.md).

In: an instruction and a scene. Out: films, success rates, and the demonstrations and weights that the demo ships with.
"""
