from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import close_all


@pytest.fixture(scope="module", autouse=True)
def _ranks_end() -> Iterator[None]:
    yield
    close_all()
