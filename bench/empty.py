"""An empty Flask route, to compare with."""

from typing import Any

from flask import Flask

app = Flask(__name__)


@app.route("/", methods=["GET", "POST"])
def nothing() -> dict[str, Any]:
    """Return an empty JSON object."""
    return {}
