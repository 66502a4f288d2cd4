"""The page at /, in Chromium, on a server of the bundled chat model."""

import pytest

pytest.register_assert_rewrite("page.actions")
