"""Tests keep nothing outside of their own folders."""

import os

from helpers.transformers_source import MARKERS, why_not_here

os.environ["ITA_TEXT_CACHE"] = "off"


def pytest_configure(config):
    if why_not_here() is None:
        for marker in MARKERS:
            config.addinivalue_line("markers", f"{marker}: of transformers' common tests")
