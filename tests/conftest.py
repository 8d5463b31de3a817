"""Tests keep nothing outside of their own folders."""

import os

os.environ["ITA_TEXT_CACHE"] = "off"
