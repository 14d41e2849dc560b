"""Text from an auxiliary model: any callable, an OpenAI-compatible endpoint, a cache on disk, and tolerant JSON."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clkit.errors import ConfigurationError, check_whole

Generator = Callable[[list[str]], Sequence[str]]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[-+.\w]+|[\[\]{}:,]', re.DOTALL)
_TRANSIENT = (408, 409, 425, 429)


class OpenAIGenerator:
    """Completions of an OpenAI-compatible endpoint, one request a prompt, several at a time.

    A request that meets no answer, an unreadable one, or status 408, 409, 425, 429 or 5xx is sent again after
    ``wait * 2**k`` seconds, or after what the endpoint's ``Retry-After`` says (at most a minute).

    Args:
        base_url: What comes before ``/chat/completions``, e.g. ``http://localhost:8000/v1``.
        model: Name of the model.
        api_key: Sent as a bearer token, if given.
        temperature: At least 0.
        max_tokens: Longest completion.
        timeout: Seconds to wait for the endpoint.
        retries: How often a request is sent again.
        wait: Seconds before the first repetition.
        workers: Requests under way at a time.

    Raises:
        ConfigurationError: If an argument is out of range; when called, if the endpoint refuses or does not answer.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        temperature: float = 0.7,
        max_tokens: int = 256,
        timeout: float = 60.0,
        retries: int = 4,
        wait: float = 1.0,
        workers: int = 4,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigurationError(f"base_url={base_url!r} is no address; let it start with http:// or https://.")
        if temperature < 0 or wait < 0 or timeout <= 0:
            raise ConfigurationError(
                f"temperature={temperature}, wait={wait} and timeout={timeout} cannot be negative, nor timeout 0."
            )
        check_whole("max_tokens", max_tokens, 1)
        check_whole("retries", retries, 0)
        check_whole("workers", workers, 1)
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model = model
        self.api_key = api_key
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.timeout = timeout
        self.retries = retries
        self.wait = wait
        self.workers = workers
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, prompts: list[str]) -> list[str]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._complete, prompts))

    def _complete(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            pause = self.wait * 2**attempt
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    content = json.load(response)["choices"][0]["message"]["content"]
                return content if isinstance(content, str) else ""
            except urllib.error.HTTPError as error:
                if error.code not in _TRANSIENT and error.code < 500:
                    said = error.read(300).decode(errors="replace")
                    raise ConfigurationError(
                        f"{self.url} refused a request with status {error.code}: {said}. "
                        "Check base_url, model and api_key; what is cached is kept."
                    ) from error
                asked = error.headers.get("Retry-After", "")
                pause = min(float(asked), 60.0) if asked.isdigit() else pause
                problem: Exception = error
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                problem = error
            if attempt < self.retries:
                time.sleep(pause)
        raise ConfigurationError(
            f"{self.url} gave no answer in {self.retries + 1} attempts, at last: {problem!r}. "
            "Check that it runs and start again; what is cached is kept."
        ) from problem


class CachedGenerator:
    """A generator's completions, each of them asked for once.

    With a folder they are kept in ``completions.jsonl`` there: one line each, appended and flushed after every batch,
    so that a run that was killed goes on where it was. The key is a hash of the request and the name of the model: the
    generator's attribute ``model``, else the name of the function or class.

    Args:
        generator: Takes prompts and returns as many completions.
        folder: Where to keep them; None keeps them in memory only.
        batch_size: Prompts in one call of the generator.

    Raises:
        ConfigurationError: When called, if the generator returns something else than one text for each prompt.
    """

    def __init__(self, generator: Generator, folder: str | Path | None = None, batch_size: int = 16) -> None:
        check_whole("batch_size", batch_size, 1)
        self.generator = generator
        self.batch_size = batch_size
        named = getattr(generator, "__qualname__", type(generator).__qualname__)
        self.model = str(getattr(generator, "model", named))
        self._path = None if folder is None else Path(folder) / "completions.jsonl"
        self._known: dict[str, str] = {}
        if self._path is not None and self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(line)
                    self._known[row["key"]] = row["completion"]
                except (ValueError, LookupError, TypeError):
                    continue  # the half line of a run that was killed

    def __call__(self, prompts: list[str]) -> list[str]:
        keys = {prompt: self._key(prompt) for prompt in prompts}
        missing = [prompt for prompt, key in keys.items() if key not in self._known]
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            completions = list(self.generator(batch))
            if len(completions) != len(batch) or not all(isinstance(text, str) for text in completions):
                raise ConfigurationError(
                    f"The generator {self.model} returned {len(completions)} completions for {len(batch)} prompts, "
                    "or some that are no text; let it return one str for each prompt."
                )
            rows = [
                {"key": keys[prompt], "model": self.model, "prompt": prompt, "completion": completion}
                for prompt, completion in zip(batch, completions, strict=True)
            ]
            self._known.update((row["key"], row["completion"]) for row in rows)
            self._append(rows)
        return [self._known[keys[prompt]] for prompt in prompts]

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.model, prompt]).encode()).hexdigest()

    def _append(self, rows: list[dict[str, str]]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                lines = lines if file.read(1) == b"\n" else "\n" + lines
            file.write(lines.encode(errors="replace"))


def parse_object(text: str) -> dict[str, Any]:
    """The first JSON object of a completion, mended where a comma is missing or too many.

    Whatever stands before and behind it (a code fence, a sentence) is left out.

    Raises:
        ValueError: If there is none.
    """
    for start in (match.start() for match in re.finditer("{", text)):
        tokens: list[str] = []
        depth = 0
        for match in _TOKEN.finditer(text, start):
            token = match[0]
            if tokens and tokens[-1] == "," and token in ("]", "}", ","):
                tokens.pop()
            elif tokens and tokens[-1] not in ("[", "{", ":", ",") and token not in ("]", "}", ":", ","):
                tokens.append(",")
            tokens.append(token)
            depth += (token in ("[", "{")) - (token in ("]", "}"))
            if depth == 0:
                break
        try:
            found = json.loads("".join(tokens), strict=False)
        except ValueError:
            continue
        return dict(found)
    raise ValueError("it holds no JSON object")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn the request into a GET."""

    def redirect_request(self, *args: Any) -> None:
        return None
