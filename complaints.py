"""What a database's driver complains of, as one sentence for an operator."""

from __future__ import annotations

from typing import Any

# PostgreSQL's codes (its manual, appendix A), and what to do.
_HELP = {
    "3D000": "make it with createdb",
    "42501": "the role must own the database: ALTER DATABASE … OWNER TO …",
}


def sentence(error: Any) -> str:
    """What went wrong and, where it is known, what to do: one line, without a full stop.

    The further lines of PostgreSQL's are left out: they may hold values.
    """
    cause = getattr(error, "orig", None) or error
    text = (str(cause).strip() or repr(cause)).splitlines()[0].rstrip(". ")
    # Before there is a session, the code is in the text alone.
    is_missing = "database" in text and text.endswith("does not exist")
    code = "3D000" if is_missing else getattr(cause, "sqlstate", None)
    return f"{text}; {_HELP[code]}" if code in _HELP else text
