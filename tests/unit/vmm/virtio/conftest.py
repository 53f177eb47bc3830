"""What several files of tests here use."""

from __future__ import annotations

import pytest

from .netrig import Rig


@pytest.fixture
def rig(request):
    made = []

    def make(*args, **named):
        made.append(Rig(*args, **named))
        return made[-1]

    yield make
    for one in made:
        one.close()
