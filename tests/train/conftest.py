"""What the tests of training share."""

import pytest
from forked_runs import ForkServer
from small_runs import outcome, small_recipe, train


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """The start of commands in processes of their own, at no cost."""
    server = ForkServer(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Outcomes of runs without an interruption, by their overrides."""
    outcomes = {}

    def of(overrides=()):
        if overrides not in outcomes:
            outcomes[overrides] = outcome(train(small_recipe(tmp_path_factory.mktemp("run") / "whole", overrides)))
        return outcomes[overrides]

    return of
