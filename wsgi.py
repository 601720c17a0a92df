"""What gunicorn serves: `gunicorn wsgi:app`."""

import sys

import journal
from app import create_app
from config import SettingError

journal.open_log()

try:
    app = create_app(serving=True)
except SettingError as error:
    sys.exit(f"Lanyard will not start: {error}")
