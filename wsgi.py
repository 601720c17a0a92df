"""What gunicorn serves: `gunicorn wsgi:app`."""

import logging
import sys

from app import create_app
from config import SettingError

logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")

try:
    app = create_app(serving=True)
except SettingError as error:
    sys.exit(f"Lanyard will not start: {error}")
