"""download.sh, run for real against a server on this machine: each case is a way in which downloads went wrong."""

import pytest

pytest.register_assert_rewrite("download.server")
