"""The tests are a package, so that a helper is found by one name from every folder: ``tests.support``."""
