"""Ask the served model a question and look at the answer: status 0 if it is one.

Environment: URL, MODEL ("" is the served one), QUESTION, EXPECT (a regular expression; "" takes any text), TIMEOUT_S,
API_KEYS (a JSON list; the first one is shown).
"""

import json
import os
import re
import sys
import time
import urllib.error
import urllib.request

URL = os.environ["URL"].rstrip("/")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the service is in this cluster
END = time.monotonic() + float(os.environ.get("TIMEOUT_S") or 300)
KEYS = json.loads(os.environ.get("API_KEYS") or "[]")


def ask(path: str, body: object = None) -> dict:
    """The JSON answer; while the server is not there, or not ready, it is asked again."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {KEYS[0]}"} if KEYS else {})}
    request = urllib.request.Request(URL + path, None if body is None else json.dumps(body).encode(), headers)
    while True:
        try:
            with DIRECT.open(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = f"{error.code} {error.read(500).decode(errors='replace')}"
            if error.code not in (404, 429, 502, 503):  # 404: Serve's own, before its routes are set up
                sys.exit(f"{path}: {said}")
        except OSError as error:
            said = str(error)
        if time.monotonic() > END:
            sys.exit(f"{path}: {said}")
        time.sleep(2)


model = os.environ.get("MODEL") or ask("/v1/models")["data"][0]["id"]
question = os.environ["QUESTION"]
body = {"model": model, "prompt": question, "temperature": 0, "max_tokens": 32}
if os.environ.get("CHAT", "1") == "1":
    body = {**body, "messages": [{"role": "user", "content": body.pop("prompt")}]}
choice = ask("/v1/chat/completions" if "messages" in body else "/v1/completions", body)["choices"][0]
answer = choice["message"]["content"] if "message" in choice else choice["text"]
print(f"{model}: {question!r} → {answer!r}")
if not answer.strip() or not re.search(os.environ.get("EXPECT", ""), answer):
    sys.exit(f"the answer does not match {os.environ.get('EXPECT', '')!r}")
