"""What gunicorn serves: `gunicorn wsgi:app`."""

import sys

from app import create_app
from config import SettingError
from ops import access_log

access_log.open_log()

try:
    app = create_app(serving=True)
except SettingError as error:
    sys.exit(f"Lanyard will not start: {error}")
