"""download.sh, run against a local server: each test is a way in which downloads failed."""

import pytest

pytest.register_assert_rewrite("download.server")
