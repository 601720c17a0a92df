"""What gunicorn serves: `gunicorn wsgi:app`."""

import sys

from app import create_app
from config import SettingError

try:
    app = create_app()
except SettingError as error:
    sys.exit(f"Lanyard will not start: {error}")
