"""What several tests share: small models, checkpoints, servers, checks of ops, and the long runs of the Makefile."""
