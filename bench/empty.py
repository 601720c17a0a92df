"""The floor: a Flask route that does nothing."""

from typing import Any

from flask import Flask

app = Flask(__name__)


@app.route("/", methods=["GET", "POST"])
def nothing() -> dict[str, Any]:
    """An empty JSON object."""
    return {}
