"""A client for an OpenAI-compatible chat endpoint: it retries requests, parses replies and reports failures."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ws.base.errors import UserError
from ws.model.chat import Message

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the API key, if the endpoint needs one."""
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses of temporary failures: the same request may succeed later."""


class Reply(NamedTuple):
    """First choice of a chat completion: text, finish reason, tokens written; None if the endpoint omits a value."""

    text: str
    finish: str | None
    tokens: int | None


@dataclass(frozen=True)
class ChatEndpoint:
    """`model` at `url` (up to and including /v1); `user` ("judge" or "responses") appears in messages and option names.

    The key comes from the environment variable `key_variable` and never appears in messages. A temporary failure is
    retried with growing waits, up to `retries` requests in total. `timeout` is in seconds. A missing url or model is a
    UserError.
    """

    url: str
    model: str
    user: str
    key_variable: str = KEY_VARIABLE
    retries: int = 5
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not self.model:
            raise UserError(
                f"no URL of an endpoint and no model name is given for the endpoint of the {self.user}",
                f"Give --{self.user}-url http://host/v1 and --{self.user}-model NAME.",
            )

    def complete(self, messages: Sequence[Message], **options: Any) -> Reply:
        """Post the conversation and `options` (temperature, max_tokens ...); a lasting failure is a UserError."""
        url = self.url.rstrip("/") + "/chat/completions"
        body = json.dumps({"model": self.model, "messages": list(messages), **options}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        problem = ""
        for attempt in range(self.retries):
            try:
                request = urllib.request.Request(url, body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return _parsed(json.load(answer))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                if error.code not in _PASSING:
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                problem = str(getattr(error, "reason", error))
            except http.client.InvalidURL as error:
                problem = str(error)
                break
            except http.client.HTTPException as error:
                problem = type(error).__name__
            except (KeyError, IndexError, TypeError, ValueError):
                problem = "a reply without choices[0].message.content"
                break
            if attempt + 1 < self.retries:
                time.sleep(min(0.5 * 2**attempt, 20))
        raise UserError(
            f"the endpoint of the {self.user} at {url} failed ({problem})",
            "Check the endpoint; then run again to continue.",
        )


def _parsed(content: Any) -> Reply:
    """The reply in a chat completion; anything else raises a KeyError, IndexError or TypeError."""
    choice = content["choices"][0]
    text = choice["message"]["content"] or ""
    if not isinstance(text, str):
        raise TypeError(f"message content is {type(text).__name__}")
    usage = content.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Reply(text, choice.get("finish_reason"), tokens if isinstance(tokens, int) else None)
