"""Parts of the training report's page."""

import html
from typing import Any

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def text(value: Any) -> str:
    """Escape anything as one line of HTML text."""
    return html.escape(" ".join(str(value).split()), quote=True)
