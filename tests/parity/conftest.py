"""Numbers are compared with the public code's as a user's process would compute them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def as_users_compile(fully_optimised):
  """For every module of this folder."""
