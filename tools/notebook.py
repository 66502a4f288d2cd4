"""Execute a notebook and store what its cells print: python tools/notebook.py docs/compare.ipynb

The cells of docs/ are plain Python that prints text, so that neither Jupyter nor a kernel is needed; in Jupyter they run
as well."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import chdir, redirect_stdout  # type: ignore[attr-defined,unused-ignore]
from pathlib import Path
from typing import Any
