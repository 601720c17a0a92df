"""A receiver of Lanyard's webhooks: verifies each signature, and handles each event once.

pip install flask standardwebhooks
WEBHOOK_SECRET=whsec_… python webhook_receiver.py 5001
"""

import os
import sys
from collections import OrderedDict

from flask import Flask, abort, request
from standardwebhooks import Webhook, WebhookVerificationError

app = Flask(__name__)
webhook = Webhook(os.environ["WEBHOOK_SECRET"])
# A delivery may arrive twice, with the same id. Store the ids together with your data.
seen: OrderedDict[str, None] = OrderedDict()


@app.post("/hook")
def receive() -> tuple[str, int]:
    """Answer 2xx within ten seconds; any other answer makes Lanyard try again later."""
    try:
        event = webhook.verify(request.get_data(), dict(request.headers))
    except WebhookVerificationError:
        abort(401)
    if event["id"] not in seen:
        seen[event["id"]] = None
        print(event["timestamp"], event["type"], event["data"], flush=True)
        while len(seen) > 10_000:
            seen.popitem(last=False)
    return "", 204


if __name__ == "__main__":
    app.run(port=int(sys.argv[1]))
