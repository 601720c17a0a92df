"""What gunicorn serves: `gunicorn wsgi:app`; another app may mount it."""

import sys

from flask import request_started

from app import create_app
from config import SettingError
from ops import access_log
from webhooks import delivery

access_log.open_log()

try:
    app = create_app(serving=True)
except SettingError as error:
    sys.exit(f"Lanyard will not start: {error}")

# gunicorn.conf.py starts delivery at once, but other servers do not read it. Not at the import: a server may
# fork afterwards.
request_started.connect(delivery.start, app)
