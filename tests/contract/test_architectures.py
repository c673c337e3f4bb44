"""The contract tests on every architecture of our own."""

from contextlm.contract.architecture import *  # noqa: F403
